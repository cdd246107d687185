"""Paths as people write them, for every argument and option: the one place that reads them.

~ is a home directory, `file://` is a local path, and no URL becomes the name of a folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

AnyPath = str | os.PathLike[str]

# pathlib shortens gs://bucket to gs:/bucket, and would then create a folder called "gs:".
_SHORTENED = re.compile(
    r"(gs|gcs|s3|s3a|r2|hf|https?|s?ftp|ssh|az|abfss?|adl|dbfs|oss|hdfs|memory):/(?!/)", re.I
)
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# What to do instead, by the scheme of a URL.
_INSTEAD = {
    "gs": "copy it to or from a local disk with `gsutil -m cp -r`, or mount the bucket",
    "s3": "copy it to or from a local disk with `aws s3 cp --recursive`, or mount the bucket",
    "http": "download it first, as with `curl -LO`",
    "https": "download it first, as with `curl -LO`",
    "hf": "download it with `hf download` (a model on the Hub is named org/name)",
}
_COPY = "copy it to or from a local disk"


def split_url(path: AnyPath, name: str = "") -> tuple[str | None, str]:
    """Returns the scheme of a URL, in lower case, and the rest; for a local path None and the path.

    A leading ~ or ~user of a local path is replaced by the home directory, and a `file:` URL is
    returned as a local path.

    Args:
      path: a path or URL.
      name: the argument or option that has this value, for messages.

    Raises:
      TypeError: no path.
      ValueError: the path is empty, has a control character or bytes that are not UTF-8; there is
        no such user; a file URL names another host; or the URL went through pathlib, which removes
        a slash.
    """
    if not isinstance(path, str | bytes | os.PathLike):
        raise TypeError(f"{_prefix(name)}found {path!r}, expected the name of a file or directory")
    text = os.fsdecode(path)
    if not text:
        raise ValueError(
            f"{_prefix(name)}found an empty path, expected the name of a file or directory"
        )
    if shortened := _SHORTENED.match(text):
        raise path_error(
            text,
            f"which looks like a {shortened[1]}:// URL that was made a Path, which drops a slash: "
            "pass it as a string",
            name,
        )
    url = _URL.match(text)
    if url is None and not text.lower().startswith("file:/"):  # the short form of file:///
        return None, _check_characters(_expand_home(text, name), text, name)
    scheme, rest = (url[1].lower(), text[url.end() :]) if url else ("file", text[len("file:") :])
    if scheme != "file":
        return scheme, _check_characters(rest, text, name)
    host, slash, rest = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise path_error(text, "expected file:///absolute/path", name)
    rest = unquote(rest, errors="surrogateescape")
    return None, _check_characters(f"/{rest}", text, name)


def local_name(path: AnyPath, name: str = "") -> str:
    """Returns the path of a file or directory that has to be local, as it is written otherwise.

    Args:
      path: a path, or a `file://` URL.
      name: the argument or option that has this value, for messages.

    Raises:
      FileNotFoundError: the path is relative to a current directory that no longer exists.
      TypeError, ValueError: a URL of another scheme than file://, and what `split_url` refuses.
    """
    scheme, rest = split_url(path, name)
    if scheme is not None:
        raise url_error(os.fsdecode(path), scheme, "a local path", name)
    absolute_name(rest, name)
    return rest


def local_path(path: AnyPath, name: str = "") -> Path:
    """Returns `local_name` as a Path."""
    return Path(local_name(path, name))


def absolute_name(local: str, name: str = "") -> str:
    """Returns a local path as an absolute one.

    Raises:
      FileNotFoundError: the current directory no longer exists.
      ValueError: the current directory has a name that libraries cannot open.
    """
    try:
        absolute = os.path.abspath(local)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{_prefix(name)}found {quoted(local)}, but the current directory has been removed: "
            "change to another"
        ) from None
    return _check_characters(absolute, absolute, name)


def url_error(text: str, scheme: str, expected: str, name: str = "") -> ValueError:
    """Returns the error for a URL of a scheme that cannot be opened.

    Args:
      text: the URL.
      scheme: its scheme, in lower case.
      expected: what can be opened, such as "a local path".
      name: the argument or option that has this value.
    """
    return path_error(text, f"expected {expected}: {_INSTEAD.get(scheme, _COPY)}", name)


def path_error(text: str, problem: str, name: str = "") -> ValueError:
    """Returns an error that names the argument or option, the path, and the problem."""
    return ValueError(f"{_prefix(name)}found {quoted(text)}, {problem}")


def has_invalid_bytes(text: str) -> bool:
    """Returns whether a text stands for bytes that are not UTF-8 (as Python decodes file names)."""
    return any("\ud800" <= c <= "\udfff" for c in text)


def printable(text: str) -> str:
    r"""Returns the text with bytes that are not UTF-8 as escapes: "caf\xe9"."""
    return (
        "".join(f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in text)
        .encode("utf-8", "backslashreplace")
        .decode()
    )


def quoted(text: str) -> str:
    """Returns a path in quotes and on one line, whatever its characters."""
    return printable(f"'{_CONTROL.sub(lambda c: repr(c[0])[1:-1], text)}'")


def _prefix(name: str) -> str:
    return f"{name}: " if name else ""


def _expand_home(text: str, name: str) -> str:
    home = os.path.expanduser(text)
    if not home.startswith("~"):
        return home
    user = home.split("/")[0][1:]
    who = f"user {quoted(user)}" if user else "user with a home directory"
    raise path_error(
        text,
        f"but there is no {who}: write ./{printable(text)} for a name that begins with ~",
        name,
    )


def _check_characters(path: str, text: str, name: str) -> str:
    """Returns the path; raises ValueError for characters that libraries cannot open or print."""
    if has_invalid_bytes(path):
        raise path_error(
            text,
            "whose bytes are not UTF-8: JAX's storage libraries cannot open it, so rename it",
            name,
        )
    if _CONTROL.search(path):
        raise path_error(text, "with a line break or another control character: rename it",
                         name)  # fmt: skip
    return path
