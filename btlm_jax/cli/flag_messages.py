"""Messages about arguments of Python functions, with the names of the options of a command."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence


@contextlib.contextmanager
def messages_with_flags(
    options: Sequence[str], other_names: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Names options instead of arguments in the errors and the notices of a block.

    `do_sample=True` becomes `--sample`, and `max_length: found 3` becomes `--max-length: found 3`.

    Args:
      options: names of the options, with underscores.
      other_names: option by argument, where their names differ.

    Raises:
      ValueError: as the block, with the translated message.
    """
    flags = {name: name for name in options} | dict(other_names or {})

    def translate(record: logging.LogRecord) -> bool:
        record.msg, record.args = with_flags(record.getMessage(), flags), ()
        return True

    handlers = logging.getLogger("btlm_jax").handlers
    for handler in handlers:
        handler.addFilter(translate)
    try:
        yield
    except ValueError as e:
        message = with_flags(str(e), flags)
        if message == str(e):
            raise
        raise ValueError(message) from e
    finally:
        for handler in handlers:
            handler.removeFilter(translate)


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """Returns a message with options in the place of arguments.

    Args:
      message: the message.
      flags: option, without dashes and with underscores, by argument.
    """

    def replace(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        # A name of one word is also an English word, unless a value or a colon follows.
        if "_" not in name and value is None and not message.startswith(": found", match.end()):
            return match[0]
        flag = f"--{flags[name].replace('_', '-')}"
        return flag if value in (None, "True") else f"{flag} {value}"

    names = "|".join(sorted(map(re.escape, flags), key=len, reverse=True))
    return re.sub(
        rf"(?<![\w./-])(?P<name>{names})\b(?![\w.])(?:=(?P<value>[^\s,;)]+))?", replace, message
    )
