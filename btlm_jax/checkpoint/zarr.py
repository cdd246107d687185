"""Arrays on disk, written and read in blocks of rows so that memory stays bounded.

The format is Zarr 3, uncompressed, as Orbax lays it out without OCDBT: a folder per array, in it
`zarr.json` and files `c/i/0…` that each hold one block of rows, divided into smaller chunks that a
reader of some rows can fetch alone, with a checksummed index. Uncompressed because trained bf16
weights shrink by a quarter at best and decompressing would cost more time than the disk; without
OCDBT because every byte is then where its array is: a run that was killed can go on, two
conversions are byte-identical, and a damaged file names its array.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np
import tensorstore as ts
from etils import epath

from btlm_jax.utils import paths

# A block is what is read, hashed and written at once, and the size of a file. It is a constant, so
# that the bytes on disk do not depend on a memory budget.
BLOCK_BYTES = 16 << 20
# What a reader fetches at least: small enough for the rows of one device of many.
_CHUNK_BYTES = 2 << 20

BF16 = np.dtype(ml_dtypes.bfloat16)


def block_rows(shape: tuple[int, ...], itemsize: int, limit: int = BLOCK_BYTES) -> int:
    """Rows (of axis 0) in a block of an array.

    A divisor of the number of rows where there is a fitting one, because Zarr pads the last block
    to full size: the vocabulary, 50257 = 29 · 1733, has one; 6826 = 2 · 3413 has none that fits.
    """
    if 0 in shape:
        return 1
    row = math.prod(shape[1:]) * itemsize
    most = max(1, min(shape[0], limit // row))
    divisor = next(n for n in range(most, 0, -1) if shape[0] % n == 0)
    return divisor if divisor * 8 >= most else most


def block_size(shape: tuple[int, ...], itemsize: int) -> int:
    """Elements in a block of an array."""
    return block_rows(shape, itemsize) * math.prod(shape[1:])


def create_array(folder: epath.Path, shape: tuple[int, ...], dtype: np.dtype) -> ts.TensorStore:
    """Creates an array, in place of whatever an interrupted run left in the folder."""
    rows = block_rows(shape, dtype.itemsize)
    chunk = block_rows((rows, *shape[1:]), dtype.itemsize, _CHUNK_BYTES)
    chunk = chunk if rows % chunk == 0 else rows
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    codec = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [chunk, *shape[1:]],
            "codecs": [little],
            "index_codecs": [little, {"name": "crc32c"}],
        },
    }
    grid = {"name": "regular", "configuration": {"chunk_shape": [rows, *shape[1:]]}}
    metadata = {
        "shape": list(shape),
        "data_type": "bfloat16" if dtype == BF16 else dtype.name,
        "chunk_grid": grid,
        "codecs": [codec],
    }
    spec = {
        "driver": "zarr3",
        "kvstore": paths.kvstore(folder),
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,  # or zero biases would leave no file
    }
    return ts.open(spec, create=True, delete_existing=True, context=_context()).result()


def write_blocks(
    folder: epath.Path, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[np.ndarray]
):
    """Writes a new array from consecutive blocks. Returns its `Digest`.

    Args:
      folder: where; its content is replaced.
      shape, dtype: of the array, which has at least one axis.
      blocks: 1-D arrays of `block_size(shape, dtype.itemsize)` elements each, but for the last.

    Raises:
      OSError: the disk is full or fails.
      ValueError: the blocks are not what shape and dtype say.
    """
    digest, start, rows = Digest(), 0, block_rows(shape, dtype.itemsize)
    with _as_os_error(folder):
        array = create_array(folder, shape, dtype)
    pending: ts.WriteFutures | None = None  # while it is written, the next block is read and hashed
    for block in blocks:
        if block.dtype != dtype:
            raise ValueError(f"{folder.name}: found a block of {block.dtype}, expected {dtype}")
        digest.update(block)
        part = block.reshape(-1, *shape[1:])
        stop = start + len(part)
        target = array[start:stop]
        with _as_os_error(folder):
            if pending is not None:
                pending.result()
            pending = target.write(part, can_reference_source_data_indefinitely=True)
        start = stop
        if stop % rows and stop != shape[0]:
            raise ValueError(f"{folder.name}: found a block of {len(part)} rows, expected {rows}")
    with _as_os_error(folder):
        if pending is not None:
            pending.result()
    if start != shape[0]:
        raise ValueError(f"{folder.name}: found {start} rows, expected {shape}")
    return digest


def read_blocks(kvstore: str | dict, rows: int) -> Iterator[np.ndarray]:
    """Yields an array in consecutive 1-D blocks of `rows` rows; the last may be shorter.

    Raises:
      ValueError: the files are damaged or missing (TensorStore's own message).
    """
    # A missing file is damage, not zeros.
    spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}
    array = ts.open(spec, context=_context()).result()
    edges = [*range(0, array.shape[0], rows), array.shape[0]]
    parts = [array[a:b] for a, b in itertools.pairwise(edges)]
    ahead = parts[0].read()  # while a block is used, the next is read
    for following in [*parts[1:], None]:
        block = ahead.result()
        if following is not None:
            ahead = following.read()
        yield np.ascontiguousarray(block).reshape(-1)


def read_slice(kvstore: str | dict, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a part of an array, of slices with bounds.

    Raises:
      ValueError: the files are damaged or missing (TensorStore's own message).
    """
    spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}
    return ts.open(spec, context=_context()).result()[index].read().result()


class Digest:
    """SHA-256 and count of NaN and Inf of an array, block by block.

    The hash is that of the array's bytes in C order, little-endian, whatever the file format.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.nonfinite = 0

    def update(self, block: np.ndarray) -> None:
        """Takes the next block: contiguous, 1-D, of a dtype that `count_nonfinite` takes."""
        self._sha256.update(block.view(np.uint8).data)
        self.nonfinite += count_nonfinite(block)

    @property
    def sha256(self) -> str:
        """Of all blocks so far, in hexadecimal digits."""
        return self._sha256.hexdigest()


def count_nonfinite(block: np.ndarray) -> int:
    """The number of NaN and Inf in a contiguous 1-D array: ints, or floats of 16 or 32 bits."""
    if np.issubdtype(block.dtype, np.integer):
        return 0
    bits = {2: np.uint16, 4: np.uint32}[block.dtype.itemsize]
    infinity = np.array(np.inf, block.dtype).view(bits)
    magnitude = bits(~np.array(1 << (8 * block.dtype.itemsize - 1)).astype(bits))
    flat = block.view(bits)
    size = 1 << 17  # fits the cache, so that the pass costs no memory traffic of its own
    scratch = np.empty(min(size, len(flat)), bits)
    found = 0
    for start in range(0, len(flat), size):
        part = flat[start : start + size]
        absolute = np.bitwise_and(part, magnitude, out=scratch[: len(part)])
        if absolute.max() >= infinity:
            found += int((absolute >= infinity).sum())
    return found


@functools.cache
def _context() -> ts.Context:
    # No cache: every block is read once, and a cache would hold what the budget does not know of.
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}})


class _as_os_error:
    """TensorStore reports a full disk as ValueError; callers expect OSError."""

    def __init__(self, folder: epath.Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, ValueError | RuntimeError):
            full = "No space left" in str(error) or "Disk quota" in str(error)
            first = str(error).splitlines()[0][:300]
            raise OSError(errno.ENOSPC if full else errno.EIO, first, str(self._folder)) from None
