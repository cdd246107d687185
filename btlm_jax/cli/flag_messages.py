"""Messages about arguments of Python functions, with the names of the options of a command."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any


def option_names(command: Any) -> dict[str, str]:
    """Returns the option for every argument that messages may name, both with underscores.

    A command can have attributes `OTHER_NAMES`, pairs of argument and option where the names
    differ, and `NOT_ARGUMENTS`, options whose names mean something else in messages.

    Args:
      command: an instance of a command's dataclass, with or without a subcommand; None for none.
    """
    command = getattr(command, "command", command)
    if command is None:
        return {}
    names = set(_field_names(command))
    names -= {*getattr(command, "NOT_ARGUMENTS", ())}
    return {name: name for name in sorted(names)} | dict(getattr(command, "OTHER_NAMES", ()))


def _field_names(command: Any) -> Iterator[str]:
    """Yields the names of the options, also of groups whose options carry no prefix."""
    for field in dataclasses.fields(command):
        if str(field.type).startswith("OmitArgPrefixes"):
            yield from _field_names(getattr(command, field.name))
        else:
            yield field.name


@contextlib.contextmanager
def notices_with_options(options: Mapping[str, str]) -> Iterator[None]:
    """Names options instead of arguments in the notices of a block.

    Args:
      options: as from `option_names`.
    """

    def translate(record: logging.LogRecord) -> bool:
        record.msg, record.args = with_options(record.getMessage(), options), ()
        return True

    handlers = logging.getLogger("btlm_jax").handlers
    for handler in handlers:
        handler.addFilter(translate)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(translate)


def with_options(message: str, options: Mapping[str, str]) -> str:
    """Returns a message with options in the place of arguments.

    `do_sample=True` becomes `--sample`, `on_error='skip'` becomes `--on-error skip`, and
    `max_length: found 3` becomes `--max-length: found 3`.

    Args:
      message: the message.
      options: as from `option_names`.
    """
    if not options:
        return message

    def replace(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        # A name of one word is also an English word, unless it has a value or begins a clause.
        begins = re.search(r"(^|[:(;] ?)$", message[: match.start()]) is not None
        is_named = begins and message.startswith(": found", match.end())
        if "_" not in name and value is None and not is_named:
            return match[0]
        option, value = f"--{options[name].replace('_', '-')}", (value or "").strip("'")
        return option if value in ("", "True") else f"{option} {value}"

    names = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
    # A value ends before the punctuation of the sentence.
    value = r"(?:=(?P<value>[^\s,;)]*?)(?=\.?(?:[\s,;)]|$)))?"
    return re.sub(rf"(?<![\w./-])(?P<name>{names})\b(?![\w.]){value}", replace, message)
