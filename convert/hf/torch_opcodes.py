"""Evaluation of the pickle inside a `torch.save` archive without running code from it.

Unpickling can run arbitrary code, so nothing is unpickled here. `pickletools` splits the pickle
into opcodes, and a small evaluator supports the few that `torch.save` writes for a plain
state_dict. It calls nothing, hashes only plain keys (hashing a deeply nested tuple crashes the
interpreter) and keeps its memo in a dict (`pickle.Unpickler` allocates memory up to the largest
memo index, so that five bytes can allocate tens of GB).
"""

from __future__ import annotations

import pickletools
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from btlm_jax.convert.hf.advice import REDOWNLOAD, RESAVE

_STORAGES = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch DoubleStorage": np.dtype(np.float64),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}
# Dtypes that weights cannot have here: storages of their own, or dtypes beside bytes (torch 2.3).
_UNSUPPORTED_STORAGES = {
    "torch ComplexFloatStorage": "complex64",
    "torch ComplexDoubleStorage": "complex128",
    "torch QInt8Storage": "qint8",
    "torch QUInt8Storage": "quint8",
    "torch QInt32Storage": "qint32",
    "torch QUInt4x2Storage": "quint4x2",
    "torch QUInt2x4Storage": "quint2x4",
    "torch.storage UntypedStorage": "bytes",
}
_DTYPE = re.compile(
    r"torch ((?:float|bfloat|u?int|complex|bits|q?u?int)\w*|float4_\w+|float8_\w+|bool|half|double)"
)
_ORDERED_DICT = "collections OrderedDict"
_REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
# Functions that rebuild tensors of other kinds; never called, their tensors are named in an error.
_UNSUPPORTED_TENSORS = {
    "torch._utils _rebuild_tensor_v3": "of a dtype without a storage of its own",
    "torch._utils _rebuild_qtensor": "quantized",
    "torch._utils _rebuild_sparse_tensor": "sparse",
    "torch._utils _rebuild_sparse_csr_tensor": "sparse",
    "torch._utils _rebuild_nested_tensor": "nested",
    "torch._utils _rebuild_meta_tensor_no_storage": "on the meta device, without values",
    "torch._utils _rebuild_parameter_with_state": "with Python attributes",
}
_GLOBALS = frozenset(
    {
        _ORDERED_DICT,
        _REBUILD_TENSOR,
        _REBUILD_PARAMETER,
        *_STORAGES,
        *_UNSUPPORTED_STORAGES,
        *_UNSUPPORTED_TENSORS,
    }
)

_MAX_NDIM = 32


class _Global(NamedTuple):
    """A global that the pickle names. It is only a label; nothing is imported."""

    name: str


class Storage(NamedTuple):
    """A flat run of `numel` elements, stored in the zip member `data/<key>`."""

    dtype: np.dtype
    key: str
    numel: int


class UnsupportedTensor(NamedTuple):
    """A tensor or storage whose values cannot be read; `dtype` describes it."""

    dtype: str


class TensorView(NamedTuple):
    """A tensor, whose `shape`, `strides` and `offset` count elements of `storage`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Number of elements from the first to the last one of the tensor, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((d - 1) * s for d, s in zip(self.shape, self.strides, strict=True))


def evaluate_pickle(data: bytes) -> object:
    """Returns the value of a pickle: dicts, lists, tuples, scalars and `TensorView`.

    Nothing that the pickle names is imported or called.

    Args:
      data: the bytes of `data.pkl`.

    Raises:
      ValueError: the pickle is corrupt, or holds anything that `torch.save` does not write for a
        plain state_dict.
    """
    try:
        return _run_opcodes(data)
    except IndexError:
        raise ValueError(f"data.pkl is corrupt (stack underflow). {REDOWNLOAD}") from None
    except KeyError as error:
        raise ValueError(f"data.pkl is corrupt (no memo {error}). {REDOWNLOAD}") from None


def _run_opcodes(data: bytes) -> object:
    stack: list[object] = []
    marks: list[int] = []
    memo: dict[object, object] = {}

    def pop_from(start: int) -> list[object]:
        if not 0 <= start <= len(stack):
            raise IndexError
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, arg, position in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(arg)
            case "BINFLOAT":
                stack.append(arg)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop_from(len(stack) - int(opcode.name[-1]))))
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_from(marks.pop())))
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "SETITEM" | "SETITEMS":
                pairs = pop_from(len(stack) - 2 if opcode.name == "SETITEM" else marks.pop())
                _set_items(stack[-1], pairs)
            case "APPEND" | "APPENDS":
                items = pop_from(len(stack) - 1 if opcode.name == "APPEND" else marks.pop())
                _append(stack[-1], items)
            case "GLOBAL":
                stack.append(_global(str(arg)))
            case "STACK_GLOBAL":
                module, name = pop_from(len(stack) - 2)
                if not (isinstance(module, str) and isinstance(name, str)):
                    raise ValueError(f"data.pkl is corrupt (nameless global). {REDOWNLOAD}")
                stack.append(_global(f"{module} {name}"))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                function, args = pop_from(len(stack) - 2)
                stack.append(_reduce(function, args))
            case "BUILD":
                # torch sets the attribute `_metadata` (module versions) of the OrderedDict, which
                # is not needed.
                if not isinstance(stack.pop(), dict) or not isinstance(stack[-1], dict):
                    raise ValueError(f"refused: data.pkl sets attributes on an object. {RESAVE}")
            case "STOP":
                return stack.pop()
            case other:
                raise ValueError(
                    f"refused: data.pkl uses opcode {other} at byte {position}, which torch.save "
                    f"does not write for a plain state_dict. {RESAVE}"
                )
    raise ValueError(f"data.pkl has no end. {REDOWNLOAD}")


def _set_items(target: object, pairs: list[object]) -> None:
    """Adds `[key, value, key, value, ...]` to a dict; raises if a key occurs twice."""
    if not isinstance(target, dict) or len(pairs) % 2:
        raise ValueError(f"data.pkl is corrupt (items for a {describe(target)}). {REDOWNLOAD}")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not isinstance(key, str | int | float | None):
            raise ValueError(f"data.pkl has a {describe(key)} as a dict key. {RESAVE}")
        if key in target:
            raise ValueError(f"the name {describe(key)} occurs twice in one dict. {RESAVE}")
        target[key] = value


def _append(target: object, items: list[object]) -> None:
    if not isinstance(target, list):
        raise ValueError(f"data.pkl is corrupt (appends to a {describe(target)}). {REDOWNLOAD}")
    target.extend(items)


def _global(name: str) -> _Global:
    if name not in _GLOBALS and not _DTYPE.fullmatch(name):
        raise ValueError(
            f"refused: data.pkl names {name.replace(' ', '.')[:80]!r}, which is not part of a "
            f"plain state_dict of supported dtypes; loading it would run code. {RESAVE}"
        )
    return _Global(name)


def _storage(pid: Any) -> Storage | UnsupportedTensor:
    """Returns the storage of a persistent id `('storage', class, key, device, numel)`."""
    match pid:
        case ("storage", _Global(name), str(key), str(), int(numel)) if (
            name in _STORAGES and key.isdecimal() and key.isascii() and _is_count(numel)
        ):
            return Storage(_STORAGES[name], key, numel)
        case ("storage", _Global(name), str(), str(), int()) if name in _UNSUPPORTED_STORAGES:
            return UnsupportedTensor(_UNSUPPORTED_STORAGES[name])
    raise ValueError(
        "data.pkl is corrupt: a persistent id is not ('storage', storage class, decimal key, "
        f"device, element count). {REDOWNLOAD}"
    )


def _reduce(function: Any, args: Any) -> object:
    """Returns the result of one of the three known functions, from checked arguments."""
    match function, args:
        case _Global(name), () if name == _ORDERED_DICT:
            return {}
        case _Global(name), (UnsupportedTensor() as tensor, *_):
            return _unsupported(name, tensor, args)
        case _Global(name), tuple() if name in _UNSUPPORTED_TENSORS:
            return UnsupportedTensor(_UNSUPPORTED_TENSORS[name])
        case _Global(name), (TensorView() as tensor, bool(), hooks) if name == _REBUILD_PARAMETER:
            if hooks == {}:
                return tensor
        case _Global(name), (storage, offset, shape, strides, bool(), hooks, *rest) if (
            name == _REBUILD_TENSOR
        ):
            # `rest` may be one dict of flags (conjugate, negative), which change the values.
            if rest in ([], [{}]) and hooks == {}:
                return _tensor(storage, offset, shape, strides)
    name = function.name.replace(" ", ".") if isinstance(function, _Global) else describe(function)
    raise ValueError(
        f"refused: data.pkl calls {name} with arguments that torch.save does not write for a "
        f"plain tensor. {RESAVE}"
    )


def _unsupported(name: str, tensor: UnsupportedTensor, args: tuple) -> UnsupportedTensor:
    """Returns the description of a tensor over an unsupported storage, with its dtype if named."""
    dtypes = [d for x in args if isinstance(x, _Global) and (d := _DTYPE.fullmatch(x.name))]
    if dtypes:
        return UnsupportedTensor(dtypes[0][1])
    known = tensor.dtype != _UNSUPPORTED_STORAGES["torch.storage UntypedStorage"]
    return tensor if known else UnsupportedTensor(_UNSUPPORTED_TENSORS.get(name, tensor.dtype))


def _tensor(storage: object, offset: Any, shape: Any, strides: Any) -> TensorView:
    if (
        not isinstance(storage, Storage)
        or not _is_count(offset)
        or not (isinstance(shape, tuple) and isinstance(strides, tuple))
        or not len(shape) == len(strides) <= _MAX_NDIM
        or not all(_is_count(n) for n in (*shape, *strides))
    ):
        raise ValueError(
            "data.pkl is corrupt: a tensor needs a storage and non-negative whole numbers for "
            f"offset, shape and strides, at most {_MAX_NDIM} dimensions. {REDOWNLOAD}"
        )
    return TensorView(storage, offset, shape, strides)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def describe(value: object) -> str:
    """Returns a short name of a value for messages; no repr of containers, which may be cyclic."""
    if isinstance(value, str):
        return repr(value[:80])
    if isinstance(value, TensorView | UnsupportedTensor):
        return "tensor"
    if isinstance(value, _Global):
        return value.name.replace(" ", ".")
    return type(value).__name__
