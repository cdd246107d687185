"""Local paths as people write them: ~ is a home directory, and a URL names no folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

# pathlib shortens gs://bucket to gs:/bucket, and would then create a folder called "gs:".
_SHORTENED = re.compile(r"(gs|s3|hf|https?|az|abfss?|r2|hdfs|memory):/(?!/)")
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


def split_url(path: str | os.PathLike[str]) -> tuple[str | None, str]:
    """Returns the scheme of a URL, in lower case, and the rest; for a local path None and the path.

    A leading ~ or ~user of a local path is replaced by the home directory, and a `file://` URL is
    returned as a local path.

    Raises:
      ValueError: the path is empty or has bytes that are not UTF-8; there is no such user; a file
        URL names another host; or the URL went through pathlib, which removes a slash.
    """
    text = os.fspath(path)
    if not text:
        raise ValueError("found an empty path, expected the name of a file or directory")
    if has_invalid_bytes(text):
        raise ValueError(
            f"{printable(text)}: the name has bytes that are not UTF-8, which JAX's storage "
            "libraries cannot open: rename it"
        )
    if shortened := _SHORTENED.match(text):
        raise ValueError(
            f"{text}: looks like a {shortened[1]}:// URL that was made a Path, which drops a "
            "slash: pass it as a string"
        )
    url = _URL.match(text)
    if url is None:
        home = os.path.expanduser(text)
        if home.startswith("~"):
            name = home.split("/")[0]
            raise ValueError(
                f"{text}: there is no user {name[1:] or 'with a home directory'!r}: write "
                f"./{text} for a file whose name begins with ~"
            )
        return None, home
    scheme, rest = url[1].lower(), text[url.end() :]
    if scheme != "file":
        return scheme, rest
    host, slash, rest = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise ValueError(f"{text}: expected file:///absolute/path")
    return None, f"/{unquote(rest)}"


def local_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a file or directory that has to be local.

    Raises:
      ValueError: a URL of another scheme than file://, and what `split_url` refuses.
    """
    scheme, rest = split_url(path)
    if scheme is not None:
        raise ValueError(
            f"{os.fspath(path)}: found a {scheme}:// URL, expected a local path: copy it to or "
            "from the local disk, or mount the bucket"
        )
    return Path(rest)


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
