"""Where files lie: local paths, and the object stores that Orbax and TensorStore write to."""

from __future__ import annotations

import importlib.util
import os
import re
from urllib.parse import unquote, urlsplit

from etils import epath

# Scheme -> the fsspec driver that etils needs for it, and the extra of ours that installs it.
_DRIVERS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}


def location(path: str | os.PathLike[str]) -> epath.Path:
    """The place that a path or URL names; local ones come back absolute.

    Args:
      path: a local path, `file:///absolute/path`, `gs://bucket/path` or `s3://bucket/path`.

    Raises:
      ValueError: another scheme, a file URL of another host, or a store whose driver is missing.
    """
    text = os.fspath(path)
    scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://", text)
    if scheme is None:
        return epath.Path(os.path.abspath(text))
    name = scheme[1].lower()
    if name == "file":
        url = urlsplit(text)
        if url.netloc not in ("", "localhost") or not url.path.startswith("/"):
            raise ValueError(f"{text}: expected file:///absolute/path")
        return epath.Path(os.path.abspath(unquote(url.path)))
    if name not in _DRIVERS:
        raise ValueError(
            f"{text}: unknown scheme {name}://, expected a local path, file://, gs:// or s3://"
        )
    driver, extra = _DRIVERS[name]
    if importlib.util.find_spec(driver) is None:
        raise ValueError(f"{text}: {name}:// needs {driver}: pip install 'btlm-jax[{extra}]'")
    return epath.Path(text.rstrip("/"))


def is_remote(path: epath.Path) -> bool:
    """Whether a place is in an object store, where nothing can be renamed or locked."""
    return "://" in os.fspath(path)


def kvstore(path: epath.Path) -> str | dict[str, str]:
    """The TensorStore key-value store of a folder."""
    text = os.fspath(path).rstrip("/") + "/"
    return text if is_remote(path) else {"driver": "file", "path": text}
