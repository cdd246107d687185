"""Headers of weight files, read and checked against the index without tensor data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from btlm_jax.convert.hf.advice import REDOWNLOAD, UNQUANTIZED
from btlm_jax.convert.hf.foreign_files import describe_foreign_weights
from btlm_jax.convert.hf.json_objects import parse_json_object
from btlm_jax.convert.hf.torch_pickle import TorchFile
from btlm_jax.utils.format import join_first

SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint, as the header of its file describes it.

    Attributes:
      name: name in the checkpoint.
      shape: shape; `()` for a scalar.
      dtype: stored dtype, of NumPy or ml_dtypes' bfloat16.
      file: the file that holds the tensor.
      offset: position of the first byte in the file; None if the bytes are not one run in C order.
      crc32: checksum of the bytes as the file states it; None if it states none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    offset: int | None = None
    crc32: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.itemsize


def check_index(
    index: Path, weight_map: Mapping[str, str], headers: Mapping[Path, Mapping[str, TensorInfo]]
) -> None:
    """Checks that index and shards agree on every tensor.

    Args:
      index: the file, for the message.
      weight_map: tensor name -> file name, from the index.
      headers: the header of every shard, by file.

    Raises:
      ValueError: they disagree; the message lists the first tensors concerned.
    """
    shards_of: dict[str, list[str]] = {}
    for file, header in headers.items():
        for name in header:
            shards_of.setdefault(name, []).append(file.name)
    problems = [
        f"{name!r} is not in {shard}"
        for name, shard in weight_map.items()
        if shard not in shards_of.get(name, [])
    ]
    problems += [
        f"{name!r} is in {files[0]} but not in the index"
        for name, files in shards_of.items()
        if name not in weight_map
    ]
    problems += [
        f"{name!r} is in {len(files)} shards: {', '.join(files)}"
        for name, files in shards_of.items()
        if len(files) > 1
    ]
    if problems:
        raise ValueError(
            f"{index}: index and shards disagree: {join_first(problems)}. "
            "Fix: download the index and all its shards again, from one revision."
        )


def read_torch_header(file: TorchFile) -> dict[str, TensorInfo]:
    """Returns the tensors of a torch file, by name."""
    return {
        name: TensorInfo(name, shape, dtype, file.path, *file.contiguous_span(name))
        for name, (shape, dtype) in file.tensors.items()
    }


def read_safetensors_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads the header of a safetensors file.

    Returns:
      Its tensors by name, and its free text by key.

    Raises:
      ValueError: the file is damaged, names a tensor twice, or has an unsupported dtype.
    """
    # The library checks that offsets lie inside the file and do not overlap, and that sizes fit
    # shapes and dtypes.
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(_explain_damage(file, str(error))) from None
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        # The library would silently keep the last of two tensors with one name; this raises.
        entries = parse_json_object(opened.read(size), f"{file} (header)")
    free_text = entries.pop("__metadata__", None) or {}
    # The library accepts entries that are lists and shapes that no NumPy array can have.
    unusable = [repr(name) for name, entry in entries.items() if not _is_plain_entry(entry)]
    if unusable:
        raise ValueError(f"{file}: unusable header entries: {join_first(unusable)}. {REDOWNLOAD}")
    unsupported = [
        f"{name!r}: {entry['dtype']}"
        for name, entry in entries.items()
        if entry["dtype"] not in SAFETENSORS_DTYPES
    ]
    if unsupported:
        raise ValueError(
            f"{file}: unsupported dtypes {join_first(unsupported)}; expected one of "
            f"{', '.join(SAFETENSORS_DTYPES)}. {UNQUANTIZED}"
        )
    tensors = {
        name: TensorInfo(
            name,
            tuple(entry["shape"]),
            SAFETENSORS_DTYPES[entry["dtype"]],
            file,
            8 + size + entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    }
    return tensors, free_text


def _is_plain_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape = entry["shape"]
    # NumPy allows 64 axes, and checks the product of the other axes even if one is zero.
    return len(shape) <= 64 and math.prod(n for n in shape if n) < 1 << 59


def _explain_damage(file: Path, error: str) -> str:
    if wrong := describe_foreign_weights(file):
        return f"{file} {wrong}"
    if unknown := re.search(r"unknown variant `(\w+)`", error):
        return f"{file}: unsupported dtype {unknown[1]}. {UNQUANTIZED}"
    return f"{file}: truncated or corrupt safetensors file ({error}). {REDOWNLOAD}"
