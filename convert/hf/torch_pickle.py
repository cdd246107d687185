"""Tensors of a PyTorch zip checkpoint (`pytorch_model.bin`), read without torch.

A `.bin` file is a zip archive: `<prefix>/data.pkl` is a pickle that describes a dict of tensors,
and every storage is one uncompressed member `<prefix>/data/<key>`. `torch_zip` reads the archive;
`torch_opcodes` evaluates the pickle without running code from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from btlm_jax.convert.hf.advice import REDOWNLOAD, RESAVE, UNQUANTIZED
from btlm_jax.convert.hf.torch_opcodes import (
    TensorView,
    UnsupportedTensor,
    describe,
    evaluate_pickle,
)
from btlm_jax.convert.hf.torch_zip import (
    Member,
    find_member,
    list_zip_members,
    prefix_errors_with,
    read_pickle_member,
    read_span,
)
from btlm_jax.utils.format import join_first


class TorchFile:
    """A `torch.save` zip file: its tensors are described on opening and read one at a time.

    Args:
      path: a file written by `torch.save(state_dict, path)` with torch 1.6 or later.

    Attributes:
      path: the file.
      tensors: name -> (shape, dtype), with a dtype of NumPy or ml_dtypes' bfloat16.

    Raises:
      OSError: the file cannot be opened.
      ValueError: the file is truncated, corrupt or in torch's old format, or its pickle holds
        anything but a flat dict of tensors, or would run code. The message names the file.
    """

    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file, prefix_errors_with(self.path):
            prefix, infos = list_zip_members(file)
            self._records = _check_state_dict(
                evaluate_pickle(read_pickle_member(file, prefix, infos))
            )
            self._members: dict[str, Member] = {}
            for name, tensor in self._records.items():
                key = tensor.storage.key
                if key not in self._members:
                    self._members[key] = find_member(file, infos, f"{prefix}/data/{key}")
                _check_bounds(name, tensor, self._members[key])
        self.tensors = MappingProxyType(
            {name: (t.shape, t.storage.dtype) for name, t in self._records.items()}
        )

    def contiguous_span(self, name: str) -> tuple[int | None, int | None]:
        """Locates a tensor's bytes, if they are one run of the file in C order.

        Returns:
          The offset in the file, and the CRC-32 of the run if the archive states one; both None
          if the elements are stored in another order.
        """
        tensor = self._records[name]
        dtype, member = tensor.storage.dtype, self._members[tensor.storage.key]
        stride, contiguous = 1, 0 not in tensor.shape
        for size, step in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
            contiguous &= size == 1 or step == stride
            stride *= size
        if not contiguous:
            return None, None
        nbytes = math.prod(tensor.shape) * dtype.itemsize
        fills_storage = tensor.offset == 0 and nbytes == member.size
        # torch writes 0 if checksums are off (set_crc32_options).
        crc32 = member.crc if fills_storage and member.crc else None
        return member.offset + tensor.offset * dtype.itemsize, crc32

    def read_tensor(self, name: str) -> np.ndarray:
        """Reads one tensor, and no bytes of the file outside the span of its elements.

        Returns:
          A new C-contiguous array with the shape and dtype of `tensors[name]`.

        Raises:
          KeyError: no tensor has this name.
          ValueError: the file ends early, or the bytes do not match the archive's checksum
            (checked when the tensor fills its storage, as those of a saved model do).
        """
        if name not in self._records:
            raise KeyError(f"{self.path} holds no tensor {name!r}")
        tensor = self._records[name]
        dtype, member = tensor.storage.dtype, self._members[tensor.storage.key]
        if 0 in tensor.shape:
            return np.empty(tensor.shape, dtype)
        with self.path.open("rb") as file, prefix_errors_with(self.path):
            start = tensor.offset * dtype.itemsize
            raw = read_span(file, member, start, tensor.extent * dtype.itemsize)
        # A bool array over bytes other than 0 and 1 misbehaves in numpy.
        flat = raw != 0 if dtype == np.bool_ else raw.view(dtype)
        # The stride of an axis of one element is arbitrary.
        byte_strides = tuple(
            s * dtype.itemsize if d > 1 else 0
            for d, s in zip(tensor.shape, tensor.strides, strict=True)
        )
        view = np.lib.stride_tricks.as_strided(flat, tensor.shape, byte_strides, writeable=False)
        # If the tensor skips no elements, `flat` has exactly its elements and needs no second copy.
        return flat.reshape(tensor.shape) if view.flags.c_contiguous else view.copy(order="C")


def _check_state_dict(value: object) -> dict[str, TensorView]:
    """Returns the value of the pickle if it is a flat dict of tensors by name; raises otherwise."""
    if not isinstance(value, dict):
        raise ValueError(f"holds a {describe(value)}, expected a dict of tensors. {RESAVE}")
    nested = [describe(k) for k, v in value.items() if isinstance(v, dict)]
    if nested:
        raise ValueError(
            f"holds dicts inside the dict, under {join_first(nested)}; expected name -> tensor. "
            "Fix: save only the state_dict of the model, for example "
            "torch.save(checkpoint['state_dict'], path)."
        )
    unsupported = [
        f"{describe(k)}: {v.dtype}" for k, v in value.items() if isinstance(v, UnsupportedTensor)
    ]
    if unsupported:
        raise ValueError(
            f"holds tensors that are not plain float weights: {join_first(unsupported)}. "
            f"{UNQUANTIZED}"
        )
    others = [
        f"{describe(k)}: {describe(v)}"
        for k, v in value.items()
        if not (isinstance(k, str) and isinstance(v, TensorView))
    ]
    if others:
        raise ValueError(
            f"holds entries that are not named tensors: {join_first(others)}. {RESAVE}"
        )
    return value


def _check_bounds(name: str, tensor: TensorView, member: Member) -> None:
    """Checks that a tensor lies inside its storage, and that the storage has the declared size."""
    dtype, key, numel = tensor.storage
    if member.size // dtype.itemsize != numel:
        raise ValueError(
            f"tensor {name[:80]!r}: storage {key} is declared with {numel} elements of {dtype}, "
            f"but has {member.size} bytes. {REDOWNLOAD}"
        )
    if math.prod(d for d in tensor.shape if d) * dtype.itemsize >= 1 << 63:
        raise ValueError(f"tensor {name[:80]!r}: shape {tensor.shape} is too large. {REDOWNLOAD}")
    if tensor.offset + tensor.extent > numel:
        raise ValueError(
            f"tensor {name[:80]!r}: shape {tensor.shape}, strides {tensor.strides} and offset "
            f"{tensor.offset} reach past the {numel} elements of storage {key}. {REDOWNLOAD}"
        )
    # Stride 0 repeats elements, so a few bytes could describe terabytes.
    if math.prod(tensor.shape) > numel:
        raise ValueError(
            f"tensor {name[:80]!r}: shape {tensor.shape} has more elements than the {numel} of "
            f"its storage (an expanded tensor). Fix: call .contiguous() on it before saving."
        )
