"""Quantization of a matrix to int8 or int4 with NumPy, in tiles that fit in the cache.

I is the number of inputs of a matrix, O the number of its outputs; int4 has G = I / group scales
for each output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from btlm_jax.checkpoint.schemes import INT4_BLOCK, Scheme, padded_inputs

_BF16 = np.dtype(ml_dtypes.bfloat16)
# Elements of a tile: it and its intermediates should stay in the cache.
_TILE = 1 << 17
# The smallest normal number: hardware may flush smaller scales to zero.
_SMALLEST_SCALE = np.float32(2.0**-126)
# Fractions of Q4_0's scale to try: the largest weight is clipped, and the others gain.
_SCALE_FRACTIONS = (0.95, 0.9, 0.85)


class QuantizationErrors(NamedTuple):
    """Sums of squares over the weights of an array.

    Attributes:
      error: of the differences between weights and quantized weights.
      weights: of the weights.
      q4_0: of the errors of llama.cpp's Q4_0 rule in the same groups; int4 only.
    """

    error: float
    weights: float
    q4_0: float = 0.0

    def relative(self) -> dict[str, float]:
        """Returns relative RMS errors: "rms", and for int4 also that of Q4_0's rule, "q4_0"."""
        sums = {"rms": self.error} | ({"q4_0": self.q4_0} if self.q4_0 else {})
        return {name: math.sqrt(x / self.weights) if x else 0.0 for name, x in sums.items()}


class QuantizedArray(NamedTuple):
    """The values and scales of an array, as stored, and its quantization errors."""

    values: np.ndarray
    scales: np.ndarray
    errors: QuantizationErrors


def quantize_int8(x: np.ndarray, scheme: Scheme, axis: int) -> QuantizedArray:
    """Quantizes a matrix to int8; the largest magnitude of an output becomes 127.

    Args:
      x: floats.
      scheme: int8.
      axis: the axis of the inputs.

    Returns:
      Values of the shape of x; scales, fp32, with size 1 along `axis`, NaN for an output that holds
      NaN or Inf.
    """
    rows = max(1, _TILE // x.shape[1])
    tiles = [slice(i, i + rows) for i in range(0, len(x), rows)]
    maxima = [np.abs(x[t].astype(np.float32)).max(axis, keepdims=True) for t in tiles]
    size = np.concatenate(maxima, 0) if axis else np.max(maxima, 0)
    top = np.finfo(np.float32).max / 127 * (1 - 2**-22)  # 127 times the scale must be finite
    scales = np.where(size == 0, 0, np.clip(size / 127, _SMALLEST_SCALE, top)).astype(np.float32)
    scales = np.where(np.isfinite(size), scales, np.nan)
    values, error, total = np.empty(x.shape, np.int8), 0.0, 0.0
    for tile in tiles:
        scale = scales[tile] if axis else scales
        ratio = x[tile].astype(np.float32) * _inverse(scale)
        values[tile] = rounded = np.clip(np.rint(ratio), -127, 127)
        square = np.square(scale.astype(np.float64))
        error += float((_sum_squares(ratio - rounded, axis) * square).sum())
        total += float((_sum_squares(ratio, axis) * square).sum())
    return QuantizedArray(values, scales, QuantizationErrors(error, total))


def quantize_int4(x: np.ndarray, scheme: Scheme, axis: int) -> QuantizedArray:
    """Quantizes a matrix to int4 in groups of inputs.

    Args:
      x: floats [I, O]; I is padded with zeros to whole blocks of 128.
      scheme: int4 with its group.
      axis: 0.

    Returns:
      Packed values, uint8 [I / 2, O], and scales, bf16 [I / group, O], of the padded I.
    """
    group = scheme.group
    assert group is not None and axis == 0
    inputs, outputs = x.shape
    padded = padded_inputs(inputs)
    packed = np.empty((padded // 2, outputs), np.uint8)
    scales = np.empty((padded // group, outputs), _BF16)
    sums, columns = np.zeros(3), _TILE // INT4_BLOCK
    for row in range(0, padded, INT4_BLOCK):
        for column in range(0, outputs, columns):
            tile = x[row : row + INT4_BLOCK, column : column + columns].astype(np.float32)
            if len(tile) < INT4_BLOCK:
                tile = np.pad(tile, ((0, INT4_BLOCK - len(tile)), (0, 0)))
            values, scale, tile_sums = _best_int4(tile.reshape(-1, group, tile.shape[1]))
            low, high = values.reshape(2, INT4_BLOCK // 2, -1)
            outs = slice(column, column + columns)
            packed[row // 2 : (row + INT4_BLOCK) // 2, outs] = (low & 15) | (high << 4)
            scales[row // group : (row + INT4_BLOCK) // group, outs] = scale
            sums += tile_sums
    return QuantizedArray(packed, scales, QuantizationErrors(*sums.tolist()))


# By `Scheme.layout`.
QUANTIZERS: Mapping[str, Callable[[np.ndarray, Scheme, int], QuantizedArray]] = {
    "int8": quantize_int8,
    "int4": quantize_int4,
}


def unpack_host(packed: np.ndarray) -> np.ndarray:
    """Returns int8 [..., I] of packed uint8 [..., I / 2]; `packed.unpack` with NumPy."""
    pairs = packed.view(np.int8).reshape(*packed.shape[:-1], -1, INT4_BLOCK // 2)
    return np.stack([(pairs << 4) >> 4, pairs >> 4], -2).reshape(*packed.shape[:-1], -1)


def _best_int4(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns values and scales of least squared error among some candidates.

    Candidates are Q4_0's scale (the largest magnitude becomes -8; ggml's quantize_row_q4_0_ref) and
    some smaller ones, absmax / 7, (max - min) / 15, and the least-squares scale for the values of
    the best of these; each is rounded to bf16 first. Some value is always 7 or -8, so that
    dequantized weights are quantized to themselves.

    Args:
      x: groups, fp32 [n, group, C].

    Returns:
      Values from -8 to 7 as uint8 [n, group, C], scales fp32 [n, C], and the sums of squares of
      `QuantizationErrors`.
    """
    high, low = x.max(1, keepdims=True), x.min(1, keepdims=True)
    largest = np.where(high >= -low, high, low)  # NaN ends up in the scale
    n, _, column = np.nonzero(high == -low)  # in a tie Q4_0 takes the first
    tied = x[n, :, column]
    largest[n, 0, column] = tied[np.arange(len(n)), np.abs(tied).argmax(1)]
    size = np.maximum(np.abs(largest), _SMALLEST_SCALE)
    q4_0 = largest / -8
    spread = -np.sign(largest) * (high / 15 - low / 15)  # (high - low) / 15 may overflow
    spread = np.where(spread == 0, q4_0, spread)  # zero would look like a perfect scale
    fractions = [q4_0 * np.float32(f) for f in _SCALE_FRACTIONS]
    candidates = [q4_0, *fractions, np.abs(largest) / 7, spread]
    ratio, rounded = np.empty_like(x), np.empty_like(x)

    def round_with(scale: np.ndarray) -> None:
        np.multiply(x, _inverse(scale), out=ratio)
        np.clip(np.rint(ratio, out=rounded), -8, 7, out=rounded)

    def squared_error(difference: np.ndarray, scale: np.ndarray) -> np.ndarray:
        # Relative to the largest weight: squares of small weights would underflow, of large ones
        # overflow.
        return _sum_squares(difference, 1) * np.square(scale / size)

    def error_with(scale: np.ndarray) -> np.ndarray:
        round_with(scale)
        return squared_error(np.subtract(ratio, rounded, out=ratio), scale)

    scales = np.stack([_round_scale(scale) for scale in candidates])
    errors = np.stack([error_with(scale) for scale in scales])
    best = np.take_along_axis(scales, errors.argmin(0, keepdims=True), 0)[0]
    least = errors.min(0)
    round_with(best)
    slope = (ratio * rounded).sum(1, keepdims=True) * _inverse(_sum_squares(rounded, 1))
    fitted = _round_scale(best * slope)
    error = squared_error(ratio - rounded * (fitted * _inverse(best)), best)
    best, least = np.where(error < least, fitted, best), np.minimum(error, least)
    scaled = _sum_squares(x / size, 1)
    sums = [(e * np.square(size.astype(np.float64))).sum() for e in (least, scaled, errors[0])]
    return rounded.astype(np.int8).view(np.uint8), best[:, 0], np.array(sums)


def _round_scale(scale: np.ndarray) -> np.ndarray:
    """Returns a scale rounded to bf16, in fp32: zero, or normal and finite times eight."""
    top = np.float32(ml_dtypes.finfo(_BF16).max) / 8
    size = np.clip(np.abs(scale), _SMALLEST_SCALE, top)
    size = np.where(scale == 0, scale, np.copysign(size, scale))
    size = np.where(np.isfinite(scale), size, np.float32(np.nan))
    return size.astype(_BF16).astype(np.float32)


def _inverse(x: np.ndarray) -> np.ndarray:
    """Returns 1 / x, and 0 where x is 0."""
    return np.divide(1, x, out=np.zeros_like(x), where=x != 0)


def _sum_squares(x: np.ndarray, axis: int) -> np.ndarray:
    """Returns the sum of squares along an axis, which stays with size 1."""
    return np.square(x).sum(axis, keepdims=True)
