"""Where files lie: local paths, and Google's object store, to which Orbax and TensorStore write."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable
from urllib.parse import unquote

import tensorstore as ts
from etils import epath
from etils.epath.backend import fsspec_backend


def location(path: str | os.PathLike[str]) -> epath.Path:
    """The place that a path or URL names; local ones come back absolute.

    Args:
      path: a local path, `file:///absolute/path`, or `gs://bucket/path`.

    Raises:
      ValueError: another scheme, a file URL of another host, or gs:// without its driver.
    """
    text = os.fspath(path)
    scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://", text)
    if scheme is None:
        return epath.Path(os.path.abspath(text))
    name = scheme[1].lower()
    if name == "file":
        host, slash, rest = text[len("file://") :].partition("/")
        if host not in ("", "localhost") or not slash:
            raise ValueError(f"{text}: expected file:///absolute/path")
        return epath.Path(os.path.abspath(f"/{unquote(rest)}"))
    if name == "s3":
        raise ValueError(
            f"{text}: Orbax cannot read or write arrays in s3://; use a mounted bucket (s3fs, "
            "Mountpoint), or a local path and `aws s3 cp --recursive`"
        )
    if name != "gs":
        raise ValueError(
            f"{text}: unknown scheme {name}://, expected a local path, file:// or gs://"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{text}: gs:// needs gcsfs: pip install 'btlm-jax[gcs]'")
    if bad := set("#?") & set(text):  # Orbax takes these for the end of a name
        raise ValueError(f"{text}: found {' '.join(sorted(bad))} in a URL: choose another name")
    return epath.Path(f"gs://{text[len('gs://') :].rstrip('/')}")


def is_remote(path: epath.Path) -> bool:
    """Whether a place is in an object store, where nothing can be renamed or locked."""
    return "://" in os.fspath(path)


def kvstore(path: epath.Path) -> dict[str, str]:
    """The TensorStore key-value store of a folder.

    Not a URL, in which TensorStore decodes %, as etils and Orbax do not.
    """
    text = os.fspath(path).rstrip("/") + "/"
    if not is_remote(path):
        return {"driver": "file", "path": text}
    bucket, key = text.removeprefix("gs://").split("/", 1)
    return {"driver": "gcs", "bucket": bucket, "path": key}


def forget_listings(path: epath.Path) -> None:
    """Makes the next look into an object store a fresh one.

    fsspec, through which etils and Orbax look, remembers folders for as long as the process lives,
    and learns neither of what TensorStore writes nor of other processes.
    """
    if is_remote(path):
        fsspec_backend.fs(path).invalidate_cache()


def remove_files(folder: epath.Path) -> None:
    """Removes all that is below a folder of an object store.

    Not fsspec's way, which goes by what it remembers and takes * and [ in a name for a pattern.
    """
    store = ts.KvStore.open(kvstore(folder)).result()
    store.delete_range(ts.KvStore.KeyRange()).result()
    forget_listings(folder)


def read_files(folder: epath.Path, names: Iterable[str]) -> dict[str, bytes | None]:
    """The contents of small files, all fetched at once; None for those that are missing."""
    store = ts.KvStore.open(kvstore(folder)).result()
    futures = {name: store.read(name) for name in names}
    found = {name: future.result() for name, future in futures.items()}
    return {name: r.value if r.state == "value" else None for name, r in found.items()}
