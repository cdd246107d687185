"""Writing of safetensors files tensor by tensor; the library needs all tensors in memory.

A file consists of the length of the header in 8 bytes; the header, which is JSON with dtype, shape
and offsets by tensor name and free text under `__metadata__`; and the bytes of the tensors without
gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from btlm_jax.checkpoint import zarr
from btlm_jax.convert.hf.headers import SAFETENSORS_DTYPES

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
WRITER_KEY = "btlm_jax"  # entry of `__metadata__` that marks files of this package
SHA256_KEY = "sha256"  # entry of `__metadata__`: JSON, tensor name -> SHA-256 of its bytes
_PLACEHOLDER = "0" * 64


class TensorSpec(NamedTuple):
    """Name, dtype and shape of a tensor to write."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def plan_shards(tensors: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Groups tensors, in order, into files of at most `max_bytes`, or of one larger tensor.

    Within a file, wider dtypes come first, so that every tensor is aligned to its element size.
    """
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return [sorted(shard, key=lambda t: -t.dtype.itemsize) for shard in shards]


class SafetensorsFile:
    """A file whose tensors are written in any order and from several threads.

    Args:
      path: created with its full size, unless an interrupted run left a file of that size.
      tensors: tensors in the order of the file.
      version: version of this package, for the header.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorSpec], version: str) -> None:
        self.path, self._tensors, self._version = path, tensors, version
        header = self._header({})
        self._start, position = {}, len(header)
        for tensor in tensors:
            self._start[tensor.name] = position
            position += tensor.nbytes
        if not (path.is_file() and path.stat().st_size == position):
            with path.open("wb") as file:
                file.truncate(position)

    def write(self, name: str, blocks: Iterable[np.ndarray]) -> zarr.Digest:
        """Writes a tensor from consecutive blocks and flushes it to the disk.

        Args:
          name: the tensor.
          blocks: 1-D arrays that concatenate to its elements.

        Returns:
          The digest of its bytes.

        Raises:
          OSError: the disk is full or fails.
        """
        digest, position = zarr.Digest(), self._start[name]
        with self.path.open("r+b", buffering=0) as file:
            file.seek(position)
            for block in blocks:
                digest.update(block)
                view = block.view(np.uint8).data
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
        return digest

    def finish(self, sha256: dict[str, str]) -> None:
        """Writes the header with the SHA-256 of every tensor, which makes the file valid."""
        with self.path.open("r+b") as file:
            file.write(self._header(sha256))
            file.flush()
            os.fsync(file.fileno())

    def _header(self, sha256: dict[str, str]) -> bytes:
        """Returns the header, whose length does not depend on the hashes."""
        hashes = {t.name: sha256.get(t.name, _PLACEHOLDER) for t in self._tensors}
        metadata = {"format": "pt", WRITER_KEY: self._version, SHA256_KEY: json.dumps(hashes)}
        entries: dict[str, object] = {"__metadata__": metadata}
        position = 0
        for t in self._tensors:
            offsets = [position, position + t.nbytes]
            entries[t.name] = {
                "dtype": _DTYPE_NAMES[t.dtype],
                "shape": t.shape,
                "data_offsets": offsets,
            }
            position += t.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text
