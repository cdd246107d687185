"""Arrays on disk, written and read in blocks of rows to bound memory.

The format is Zarr 3, uncompressed, as Orbax lays it out without OCDBT: a directory per array with
`zarr.json` and files `c/i/0…` that each hold one block of rows. A block is divided into smaller
chunks, with a checksummed index, so that a reader of a few rows can fetch them alone. Uncompressed,
because trained bf16 weights shrink by a quarter at best and decompression would take longer than
the disk. Without OCDBT, because every byte is then in the directory of its array: a run that was
killed can resume, two conversions are byte-identical, and a damaged file names its array.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np
import tensorstore as ts
from etils import epath

from btlm_jax.utils import paths

# A block is read, hashed and written at once, and is the size of a file. It is a constant, so that
# the bytes on disk do not depend on a memory budget.
BLOCK_BYTES = 16 << 20
# The least that a reader fetches: small enough for the rows of one device out of many.
_CHUNK_BYTES = 2 << 20

BF16 = np.dtype(ml_dtypes.bfloat16)


# Blocks -------------------------------------------------------------------------------------------


def block_rows(shape: tuple[int, ...], itemsize: int, limit: int = BLOCK_BYTES) -> int:
    """Returns the number of rows (of axis 0) in a block of an array.

    It is a divisor of the number of rows if a suitable one exists, because Zarr pads the last block
    to full size: the vocabulary, 50257 = 29 · 1733, has one; 6826 = 2 · 3413 has none that fits.
    """
    if 0 in shape:
        return 1
    row = math.prod(shape[1:]) * itemsize
    most = max(1, min(shape[0], limit // row))
    divisor = next(n for n in range(most, 0, -1) if shape[0] % n == 0)
    return divisor if divisor * 8 >= most else most


def block_size(shape: tuple[int, ...], itemsize: int) -> int:
    """Returns the number of elements in a block of an array."""
    return block_rows(shape, itemsize) * math.prod(shape[1:])


def split_blocks(array: np.ndarray, size: int | None = None) -> Iterator[np.ndarray]:
    """Yields an array as consecutive 1-D blocks, the last of which may be shorter.

    Args:
      array: C-contiguous, or it is copied.
      size: elements in a block; default `block_size` of the array.
    """
    size = size or block_size(array.shape, array.dtype.itemsize)
    flat = array.reshape(-1)
    for start in range(0, len(flat), size):
        yield flat[start : start + size]


def join_blocks(
    blocks: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Returns the array whose consecutive 1-D blocks are given; the inverse of `split_blocks`."""
    flat = np.empty(math.prod(shape), dtype)
    start = 0
    for block in blocks:
        flat[start : start + len(block)] = block
        start += len(block)
    return flat.reshape(shape)


class Digest:
    """SHA-256 and count of NaN and Inf of an array, block by block.

    The hash is that of the array's bytes in C order, little-endian, whatever the file format.

    Attributes:
      nonfinite: number of NaN and Inf so far.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.nonfinite = 0

    def update(self, block: np.ndarray) -> None:
        """Adds the next block: contiguous, 1-D, of a dtype that `count_nonfinite` accepts."""
        self._sha256.update(block.view(np.uint8).data)
        self.nonfinite += count_nonfinite(block)

    def watch(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields the blocks unchanged, and adds each one before it is yielded."""
        for block in blocks:
            self.update(block)
            yield block

    @property
    def sha256(self) -> str:
        """SHA-256 of all blocks so far, in hexadecimal digits."""
        return self._sha256.hexdigest()


def count_nonfinite(block: np.ndarray) -> int:
    """Returns the number of NaN and Inf in a contiguous 1-D array of ints or 16/32-bit floats."""
    if np.issubdtype(block.dtype, np.integer):
        return 0
    bits = {2: np.uint16, 4: np.uint32}[block.dtype.itemsize]
    infinity = np.array(np.inf, block.dtype).view(bits)
    magnitude = bits(~np.array(1 << (8 * block.dtype.itemsize - 1)).astype(bits))
    flat = block.view(bits)
    size = 1 << 17  # fits in the cache, so that the intermediate causes no memory traffic
    scratch = np.empty(min(size, len(flat)), bits)
    count = 0
    for tile in split_blocks(flat, size):
        absolute = np.bitwise_and(tile, magnitude, out=scratch[: len(tile)])
        if absolute.max() >= infinity:
            count += int((absolute >= infinity).sum())
    return count


# Files --------------------------------------------------------------------------------------------


def create_array(folder: epath.Path, shape: tuple[int, ...], dtype: np.dtype) -> ts.TensorStore:
    """Creates an array and replaces whatever an interrupted run left in the directory."""
    rows = block_rows(shape, dtype.itemsize)
    chunk = block_rows((rows, *shape[1:]), dtype.itemsize, _CHUNK_BYTES)
    chunk = chunk if rows % chunk == 0 else rows
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [chunk, *shape[1:]],
            "codecs": [little_endian],
            "index_codecs": [little_endian, {"name": "crc32c"}],
        },
    }
    grid = {"name": "regular", "configuration": {"chunk_shape": [rows, *shape[1:]]}}
    metadata = {
        "shape": list(shape),
        "data_type": "bfloat16" if dtype == BF16 else dtype.name,
        "chunk_grid": grid,
        "codecs": [sharding],
    }
    spec = {
        "driver": "zarr3",
        "kvstore": paths.kvstore(folder),
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,  # otherwise biases of zero would leave no file
    }
    return ts.open(spec, create=True, delete_existing=True, context=_context()).result()


def write_blocks(
    folder: epath.Path, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[np.ndarray]
) -> Digest:
    """Writes a new array from consecutive blocks.

    Args:
      folder: directory of the array; its content is replaced.
      shape: of the array, with at least one axis.
      dtype: of the array.
      blocks: 1-D arrays of `block_size(shape, dtype.itemsize)` elements each; the last may be
        shorter.

    Returns:
      The digest of the array.

    Raises:
      OSError: the disk is full or fails.
      ValueError: the blocks do not match the shape or dtype.
    """
    digest, start, rows = Digest(), 0, block_rows(shape, dtype.itemsize)
    with _storage_errors(folder):
        array = create_array(folder, shape, dtype)
    pending: ts.WriteFutures | None = None  # the next block is read and hashed during this write
    for block in blocks:
        if block.dtype != dtype:
            raise ValueError(f"{folder.name}: found a block of {block.dtype}, expected {dtype}")
        digest.update(block)
        part = block.reshape(-1, *shape[1:])
        stop = start + len(part)
        region = array[start:stop]
        with _storage_errors(folder):
            if pending is not None:
                pending.result()
            pending = region.write(part, can_reference_source_data_indefinitely=True)
        start = stop
        if stop % rows and stop != shape[0]:
            raise ValueError(f"{folder.name}: found a block of {len(part)} rows, expected {rows}")
    with _storage_errors(folder):
        if pending is not None:
            pending.result()
    if start != shape[0]:
        raise ValueError(f"{folder.name}: found {start} rows, expected {shape}")
    return digest


def read_blocks(store: str | dict, rows: int) -> Iterator[np.ndarray]:
    """Yields an array as consecutive 1-D blocks of `rows` rows; the last may be shorter.

    Args:
      store: TensorStore's key-value store of the array.
      rows: rows in a block.

    Raises:
      ValueError: the files are damaged or missing (TensorStore's own message).
    """
    array = _open_array(store)
    edges = [*range(0, array.shape[0], rows), array.shape[0]]
    regions = [array[start:stop] for start, stop in itertools.pairwise(edges)]
    pending = regions[0].read()  # the next block is read while the caller uses this one
    for region in [*regions[1:], None]:
        block = pending.result()
        if region is not None:
            pending = region.read()
        yield np.ascontiguousarray(block).reshape(-1)


def read_slice(store: str | dict, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a part of an array.

    Args:
      store: TensorStore's key-value store of the array.
      index: one slice with bounds for every axis.

    Raises:
      ValueError: the files are damaged or missing (TensorStore's own message).
    """
    return _open_array(store)[index].read().result()


def parse_header(data: bytes | None) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and dtype of an array from its `zarr.json`; None stands for a missing file.

    Raises:
      ValueError: the file is missing or damaged, in words that follow its name.
    """
    if data is None:
        raise ValueError("is missing")
    if not data.strip(b"\0 \n"):
        raise ValueError("is empty" if not data else "holds nothing but zero bytes")
    try:
        values = json.loads(data)
        shape, name = tuple(map(int, values["shape"])), values["data_type"]
    except (ValueError, TypeError, KeyError):
        raise ValueError("is damaged: no JSON object with shape and data_type") from None
    try:
        return shape, BF16 if name == "bfloat16" else np.dtype(name)
    except TypeError:
        raise ValueError(f"is damaged: unknown data_type {name!r}") from None


def _open_array(store: str | dict) -> ts.TensorStore:
    """Opens an array for reading; a missing file is damage, not zeros."""
    spec = {"driver": "zarr3", "kvstore": store, "fill_missing_data_reads": False}
    return ts.open(spec, context=_context()).result()


@functools.cache
def _context() -> ts.Context:
    # No cache: every block is read once, and a cache would hold memory outside the budget.
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}})


@contextlib.contextmanager
def _storage_errors(folder: epath.Path) -> Iterator[None]:
    """Raises OSError for the errors of storage, which TensorStore raises as ValueError."""
    try:
        yield
    except (ValueError, RuntimeError) as e:
        full = "No space left" in str(e) or "Disk quota" in str(e)
        message = str(e).splitlines()[0][:300]
        raise OSError(errno.ENOSPC if full else errno.EIO, message, str(folder)) from None
