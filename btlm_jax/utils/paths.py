"""Locations of files: local paths, and Google Cloud Storage, as Orbax and TensorStore use it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from typing import Any

import tensorstore as ts
from etils import epath
from etils.epath.backend import fsspec_backend

from btlm_jax.utils.local_paths import AnyPath, absolute_name, path_error, split_url, url_error


def location(path: AnyPath, name: str = "") -> epath.Path:
    """Returns the location that a path or URL names; local paths become absolute.

    Args:
      path: a local path (~ is the home directory), `file:///absolute/path`, or `gs://bucket/path`.
      name: the argument or option that has this value, for messages.

    Raises:
      FileNotFoundError: the path is relative to a current directory that no longer exists.
      TypeError, ValueError: another scheme, gs:// without its driver, or what `split_url` refuses.
    """
    scheme, rest = split_url(path, name)
    if scheme is None:
        return epath.Path(absolute_name(rest, name))
    text = os.fsdecode(path)
    if scheme != "gs":
        raise url_error(text, scheme, "a local path, file:// or gs://", name)
    if importlib.util.find_spec("gcsfs") is None:
        raise path_error(text, "but gs:// needs gcsfs: pip install 'btlm-jax[gcs]'", name)
    if bad := set("#?") & set(text):  # Orbax treats these as the end of a name
        raise path_error(text, f"with {' '.join(sorted(bad))}: choose another name", name)
    return epath.Path(f"gs://{rest.rstrip('/')}")


def is_remote(path: epath.Path) -> bool:
    """Returns whether a location is in an object store, which can neither rename nor lock."""
    return "://" in os.fspath(path)


def kvstore(path: epath.Path) -> dict[str, str]:
    """Returns the TensorStore key-value store of a directory.

    It is a specification and not a URL, because TensorStore decodes % in URLs, while etils and
    Orbax do not.
    """
    text = os.fspath(path).rstrip("/") + "/"
    if not is_remote(path):
        return {"driver": "file", "path": text}
    bucket, key = text.removeprefix("gs://").split("/", 1)
    return {"driver": "gcs", "bucket": bucket, "path": key}


def forget_listings(path: epath.Path) -> None:
    """Clears the cached directory listings of an object store.

    fsspec, which etils and Orbax use to list files, caches listings for as long as the process
    lives and does not see the writes of TensorStore and of other processes.
    """
    if is_remote(path):
        fsspec_backend.fs(path).invalidate_cache()


def remove_files(folder: epath.Path) -> None:
    """Removes all files below a directory of an object store.

    It does not use fsspec, which works from cached listings and treats * and [ in names as
    patterns.
    """
    store = ts.KvStore.open(kvstore(folder)).result()
    store.delete_range(ts.KvStore.KeyRange()).result()
    forget_listings(folder)


def read_files(
    folder: epath.Path | dict[str, Any], names: Iterable[str]
) -> dict[str, bytes | None]:
    """Returns the contents of small files, fetched concurrently; None for missing files.

    Args:
      folder: the directory of the files, or a TensorStore key-value store.
      names: their names in it.
    """
    spec = folder if isinstance(folder, dict) else kvstore(folder)
    store = ts.KvStore.open(spec).result()
    futures = {name: store.read(name) for name in names}
    results = {name: future.result() for name, future in futures.items()}
    return {name: r.value if r.state == "value" else None for name, r in results.items()}
