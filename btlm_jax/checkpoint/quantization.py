"""Weights in int8 and int4: what is quantized, how, and which arrays a checkpoint then holds.

Quantized are the weights that products read: the kernels of the layers, in int8 (one scale per
output) or int4 (one scale per group of consecutive inputs), and the embedding and an untied head,
in int8 (one scale per row) or bfloat16. Everything else stays as it is. O and I are outputs and
inputs as in `kernels`; scales are symmetric: a weight is its value times its scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from btlm_jax.config import BTLMConfig
from btlm_jax.model import weights
from btlm_jax.model.packed import BLOCK, PackedWeight, transposed, unpack
from btlm_jax.model.params import Params, check_params, iter_unstacked, unflatten_tree

GROUPS = (32, 64, 128)
EMBEDDINGS = ("int8", "bfloat16")
_BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What the weights of a model are quantized to.

    Attributes:
      bits: of the kernels: 8 or 4.
      group: of int4, the consecutive inputs that share a scale: 32, 64 or 128; None for int8.
      embedding: what embedding and untied head become: "int8" or "bfloat16".

    Raises:
      ValueError: a field is none of these.
    """

    bits: int
    group: int | None = None
    embedding: Literal["int8", "bfloat16"] = "int8"

    def __post_init__(self) -> None:
        groups = {8: (None,), 4: GROUPS}
        if self.bits not in groups:
            raise ValueError(f"quantization bits: found {self.bits!r}, expected 8 or 4")
        if self.group not in groups[self.bits]:
            raise ValueError(
                f"quantization group: found {self.group!r}, expected "
                f"{' or '.join(map(str, groups[self.bits]))} for {self.bits} bits"
            )
        if self.embedding not in EMBEDDINGS:
            raise ValueError(
                f"quantization embedding: found {self.embedding!r}, expected "
                f"{' or '.join(EMBEDDINGS)}"
            )

    @classmethod
    def parse(cls, text: str, embedding: Any = "int8") -> Quantization:
        """Of "int8", "int4" (groups of 64), "int4:32", "int4:64" or "int4:128".

        Raises:
          ValueError: none of these.
        """
        known = {"int8": cls(8), "int4": cls(4, 64)} | {f"int4:{g}": cls(4, g) for g in GROUPS}
        if text not in known:
            raise ValueError(f"quantize: found {text!r}, expected one of {', '.join(known)}")
        return dataclasses.replace(known[text], embedding=embedding)

    def __str__(self) -> str:
        group = f" in groups of {self.group}" if self.group else ""
        return f"int{self.bits}{group}, embedding {self.embedding}"


# The arrays of a checkpoint -----------------------------------------------------------------------


def stored_leaves(config: BTLMConfig, to: Quantization | None) -> Iterator[weights.DiskLeaf]:
    """Every stored array, layer by layer; `to` None is a checkpoint of floats."""
    for leaf in weights.disk_leaves(config):
        yield from stored_parts(leaf, to)


def stored_parts(leaf: weights.DiskLeaf, to: Quantization | None) -> tuple[weights.DiskLeaf, ...]:
    """The arrays in which a weight is stored: itself, or values ("int8", "int4") and "scales"."""
    w = leaf.weight
    if to is None or not w.inputs:
        return (leaf,)
    if not w.stacked and to.embedding == "bfloat16":
        return (dataclasses.replace(leaf, dtype="bfloat16"),)
    *outputs, inputs = w.transposed_shape({})
    if w.stacked and to.group:
        filled = padded_inputs(inputs)
        stored = ("int4", filled // 2, "uint8"), ("scales", filled // to.group, "bfloat16")
    else:
        stored = ("int8", inputs, "int8"), ("scales", 1, "float32")
    return tuple(
        dataclasses.replace(leaf, part=name, part_shape=(*outputs, n), dtype=dtype)
        for name, n, dtype in stored
    )


def padded_inputs(inputs: int) -> int:
    """The inputs of an int4 kernel, filled up to whole blocks of 128."""
    return -(-inputs // BLOCK) * BLOCK


# Arrays to values and scales ----------------------------------------------------------------------


class QuantizationErrors(NamedTuple):
    """Sums of squares over the weights of an array."""

    error: float
    weights: float
    q4_0: float = 0.0  # of int4: the error of llama.cpp's Q4_0 rule in the same groups

    def relative(self) -> dict[str, float]:
        """Relative RMS errors: "rms", and for int4 that of Q4_0's rule, "q4_0"."""
        found = {"rms": self.error} | ({"q4_0": self.q4_0} if self.q4_0 else {})
        return {name: math.sqrt(x / self.weights) if x else 0.0 for name, x in found.items()}


class QuantizedArray(NamedTuple):
    """An array's values and scales, as stored (`stored_parts`), and the errors made."""

    values: np.ndarray
    scales: np.ndarray
    errors: QuantizationErrors


def quantize_array(x: np.ndarray, leaf: weights.DiskLeaf, to: Quantization) -> QuantizedArray:
    """Quantizes the weights of a layer, the embedding or the head.

    Beside x and the result it holds a copy of the values, in their bytes, and a few MiB.

    Args:
      x: floats of the table's shape; or of an embedding or head any rows.
      leaf: which weight; one of two `stored_parts`.

    Raises:
      ValueError: NaN or Inf, naming the weight.
    """
    w = leaf.weight
    with np.errstate(invalid="ignore"):  # of NaN and Inf, which are told of at the end
        if 0 not in w.inputs:
            found = _int8(x, 1)
        else:
            flat = x.reshape(-1, math.prod(w.transposed_shape({})[:-1]))
            found = _int8(flat, 0) if to.group is None else _int4(flat, to.group)
    if 0 in w.inputs:
        outputs = w.transposed_shape({})[:-1]
        values = np.ascontiguousarray(found.values.T).reshape(*outputs, -1)
        scales = np.ascontiguousarray(found.scales.T).reshape(*outputs, -1)
        found = QuantizedArray(values, scales, found.errors)
    if not np.isfinite(found.scales.astype(np.float32)).all():
        raise ValueError(
            f"{'/'.join(leaf.path)} holds NaN or Inf, which cannot be quantized: mend the source"
        )
    return found


# Elements that are worked on at once: they and what is made of them should stay in the cache.
_TILE = 1 << 17


def _int8(x: np.ndarray, axis: int) -> QuantizedArray:
    """int8 and scales of a matrix whose inputs are `axis`, in its layout: largest -> 127."""
    rows = max(1, _TILE // x.shape[1])
    tiles = [slice(i, i + rows) for i in range(0, len(x), rows)]
    largest = [np.abs(x[t].astype(np.float32)).max(axis, keepdims=True) for t in tiles]
    size = np.concatenate(largest, 0) if axis else np.max(largest, 0)
    top = np.finfo(np.float32).max / 127 * (1 - 2**-22)  # 127 times it must be finite
    scales = np.where(size == 0, 0, np.clip(size / 127, _TINY, top)).astype(np.float32)
    scales = np.where(np.isfinite(size), scales, np.nan)
    values, error, total = np.empty(x.shape, np.int8), 0.0, 0.0
    for tile in tiles:
        scale = scales[tile] if axis else scales
        r = x[tile].astype(np.float32) * _inverse(scale)
        values[tile] = q = np.clip(np.rint(r), -127, 127)
        square = np.square(scale.astype(np.float64))
        error += float((_squares(r - q, axis) * square).sum())
        total += float((_squares(r, axis) * square).sum())
    return QuantizedArray(values, scales, QuantizationErrors(error, total))


# Scales are normal numbers: hardware may take smaller ones for zero.
_TINY = np.float32(2.0**-126)
# The fractions of Q4_0's scale that are tried: the largest weight is clipped, the others gain.
_SHRUNK = (0.95, 0.9, 0.85)


def _int4(x: np.ndarray, group: int) -> QuantizedArray:
    """Packed int4 [I' / 2, O] and scales [I' / group, O] of a matrix [I, O]; I' is I filled up."""
    inputs, outputs = x.shape
    filled = padded_inputs(inputs)
    packed = np.empty((filled // 2, outputs), np.uint8)
    scales = np.empty((filled // group, outputs), _BF16)
    sums, columns = np.zeros(3), _TILE // BLOCK
    for row in range(0, filled, BLOCK):
        for column in range(0, outputs, columns):
            part = x[row : row + BLOCK, column : column + columns].astype(np.float32)
            if len(part) < BLOCK:
                part = np.pad(part, ((0, BLOCK - len(part)), (0, 0)))
            values, scale, tile_sums = _best(part.reshape(-1, group, part.shape[1]))
            low, high = values.reshape(2, BLOCK // 2, -1)
            here = slice(column, column + columns)
            packed[row // 2 : (row + BLOCK) // 2, here] = (low & 15) | (high << 4)
            scales[row // group : (row + BLOCK) // group, here] = scale
            sums += tile_sums
    return QuantizedArray(packed, scales, QuantizationErrors(*sums.tolist()))


def unpack_host(packed: np.ndarray) -> np.ndarray:
    """int8 [..., I] of uint8 [..., I / 2], as `kernels.unpack`, on the host."""
    pairs = packed.view(np.int8).reshape(*packed.shape[:-1], -1, BLOCK // 2)
    return np.stack([(pairs << 4) >> 4, pairs >> 4], -2).reshape(*packed.shape[:-1], -1)


def _best(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values from -8 to 7, as uint8, and the scale of least squared error, of groups [n, g, C].

    Tried are Q4_0's scale (the largest magnitude becomes -8; ggml's quantize_row_q4_0_ref) and
    some smaller ones, absmax / 7, (max - min) / 15, and the least-squares scale for the values of
    the best of these; each as rounded to bf16. Some value is always 7 or -8, so that what was
    dequantized is quantized to itself.

    Returns:
      Values [n, g, C], scales fp32 [n, C], and the sums of squares of `QuantizationErrors`.
    """
    high, low = x.max(1, keepdims=True), x.min(1, keepdims=True)
    largest = np.where(high >= -low, high, low)  # NaN ends up in the scale
    n, _, column = np.nonzero(high == -low)  # then Q4_0 takes the first
    tied = x[n, :, column]
    largest[n, 0, column] = tied[np.arange(len(n)), np.abs(tied).argmax(1)]
    size = np.maximum(np.abs(largest), _TINY)
    q4_0 = largest / -8
    spread = -np.sign(largest) * (high / 15 - low / 15)  # not (high - low) / 15: it may overflow
    spread = np.where(spread == 0, q4_0, spread)  # else all would be zero, at no apparent error
    tried = [q4_0, *(q4_0 * np.float32(f) for f in _SHRUNK), np.abs(largest) / 7, spread]
    r, q = np.empty_like(x), np.empty_like(x)

    def round_by(scale: np.ndarray) -> None:
        np.multiply(x, _inverse(scale), out=r)
        np.clip(np.rint(r, out=q), -8, 7, out=q)

    def squared(rest: np.ndarray, scale: np.ndarray) -> np.ndarray:
        # Relative to the largest: squares of small weights would vanish, of large ones overflow.
        return _squares(rest, 1) * np.square(scale / size)

    def error_of(scale: np.ndarray) -> np.ndarray:
        round_by(scale)
        return squared(np.subtract(r, q, out=r), scale)

    scales = np.stack([_as_stored(scale) for scale in tried])
    errors = np.stack([error_of(scale) for scale in scales])
    best = np.take_along_axis(scales, errors.argmin(0, keepdims=True), 0)[0]
    least = errors.min(0)
    round_by(best)
    fitted = _as_stored(best * ((r * q).sum(1, keepdims=True) * _inverse(_squares(q, 1))))
    error = squared(r - q * (fitted * _inverse(best)), best)
    best, least = np.where(error < least, fitted, best), np.minimum(error, least)
    scaled = _squares(x / size, 1)
    sums = [(e * np.square(size.astype(np.float64))).sum() for e in (least, scaled, errors[0])]
    return q.astype(np.int8).view(np.uint8), best[:, 0], np.array(sums)


def _as_stored(scale: np.ndarray) -> np.ndarray:
    """A scale as rounded to bf16, in fp32: zero, or normal and eight times it finite."""
    top = np.float32(ml_dtypes.finfo(_BF16).max) / 8
    size = np.clip(np.abs(scale), _TINY, top)
    size = np.where(scale == 0, scale, np.copysign(size, scale))
    size = np.where(np.isfinite(scale), size, np.float32(np.nan))
    return size.astype(_BF16).astype(np.float32)


def _inverse(x: np.ndarray) -> np.ndarray:
    """1 / x; 0 of 0."""
    return np.divide(1, x, out=np.zeros_like(x), where=x != 0)


def _squares(x: np.ndarray, axis: int) -> np.ndarray:
    """The sum of squares along an axis, which stays."""
    return np.square(x).sum(axis, keepdims=True)


# In memory ----------------------------------------------------------------------------------------


def quantize_params(params: Mapping[str, Any], config: BTLMConfig, to: Quantization) -> Params:
    """The weights by layer, quantized; as loading a quantized checkpoint without a mesh gives them.

    Args:
      params: float weights, stacked or by layer, on one device.
      config: their model.
      to: what they become.

    Raises:
      ValueError: the weights do not match the configuration, are padded, quantized already, or hold
        NaN or Inf.
    """
    if check_params(params, config):
        raise ValueError(
            "weights to quantize: found them padded for a mesh, expected unpadded ones"
        )
    found, on_cpu = {}, jax.default_backend() == "cpu"
    for leaf, x in iter_unstacked(config, params):
        found[leaf.path] = x
        stored = stored_parts(leaf, to)
        if len(stored) == 2:
            values, scales, _ = quantize_array(_as_table(x, leaf), stored[0], to)
            kernel = PackedWeight(
                jnp.asarray(values), jnp.asarray(scales), leaf.weight.transposed_shape({})[-1]
            )
            if kernel.packed and not on_cpu:
                four = unpack(kernel.values).astype(jnp.int4)
                kernel = dataclasses.replace(kernel, values=four)
            found[leaf.path] = kernel
        elif stored[0].dtype is not None:
            x = jnp.asarray(_as_table(x, leaf), stored[0].dtype)
            found[leaf.path] = transposed(x, leaf.weight.inputs) if on_cpu else x
    return unflatten_tree(found)


def _as_table(x: Any, leaf: weights.DiskLeaf) -> np.ndarray:
    """A float weight on the host, in the table's layout.

    Raises:
      ValueError: it is quantized.
    """
    if not isinstance(x, PackedWeight):
        return np.asarray(x)
    if x.scales is not None:
        raise ValueError(
            f"{'/'.join(leaf.path)}: found {x.values.dtype} with scales, expected floats: quantize "
            "the original weights"
        )
    values, first = np.asarray(x.values), 0 in leaf.weight.inputs
    return (np.moveaxis(values, -1, 0) if first else values).reshape(leaf.weight.shape)
