"""Quantization of arrays: errors against an independent float64 computation, and bit layouts."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from btlm_jax import BTLMConfig
from btlm_jax.checkpoint import quantization
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.checkpoint.quantize_arrays import QuantizationErrors, unpack_host
from btlm_jax.checkpoint.schemes import INT4, INT4_BLOCK
from btlm_jax.model import packed as packed_lib
from btlm_jax.model import weights

BF16 = np.dtype(ml_dtypes.bfloat16)
INT8 = Quantization(8)
KINDS = [Quantization.parse(text) for text in ("int8", "int4:32", "int4:64", "int4:128")]
CONFIG = BTLMConfig.preset("tiny")


def leaf_of(inputs: int, outputs: int) -> weights.DiskLeaf:
    """Returns a kernel of a layer with these numbers of inputs and outputs."""
    w = dataclasses.replace(
        weights.weights_by_path(CONFIG)["blocks", "mlp", "c_fc", "kernel"], shape=(inputs, outputs)
    )
    return weights.DiskLeaf(w, 0)


def quantize(
    x: np.ndarray, quantized: Quantization
) -> tuple[np.ndarray, np.ndarray, QuantizationErrors]:
    """Returns values as int8 [O, I], scales [O, G] and errors of a kernel [I, O]."""
    leaf = leaf_of(*x.shape)
    values, scales = quantization.stored_parts(leaf, quantized)
    result = quantization.quantize_array(x, values, quantized)
    for array, part in ((result.values, values), (result.scales, scales)):
        assert array.shape == part.shape and array.dtype == part.dtype
    unpacked = result.values if quantized.group is None else unpack_host(result.values)
    assert not unpacked[:, len(x) :].any()  # padding
    return unpacked[:, : len(x)], result.scales, result.errors


def dequantize(values: np.ndarray, scales: np.ndarray, group: int | None) -> np.ndarray:
    """Returns the weights, float64 [I, O], by the definition."""
    repeated = np.repeat(scales.astype(np.float64), group or values.shape[1], axis=1)
    return (values * repeated[:, : values.shape[1]]).T


def q4_0(x: np.ndarray, group: int, dtype: type | np.dtype) -> np.ndarray:
    """Returns the squared error of every group, float64 [G, O], of x [I, O] by Q4_0's rule.

    That is ggml's quantize_row_q4_0_ref: d = max / -8, q = floor(x / d + 8.5) up to 15, a weight is
    (q - 8) d.
    """
    x = np.pad(x.astype(np.float64), ((0, -len(x) % group), (0, 0)))
    x = x.reshape(-1, group, x.shape[1])
    index = np.abs(x).argmax(1, keepdims=True)
    d = (np.take_along_axis(x, index, 1) / -8).astype(dtype).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(d == 0, 0, np.minimum(np.floor(x / d + 8.5), 15) - 8)
    return np.square(x - q * d).sum(1)


def squared(x: np.ndarray, approximation: np.ndarray, group: int) -> np.ndarray:
    """Returns the squared error of every group, float64 [G, O]."""
    e = np.pad(np.square(x.astype(np.float64) - approximation), ((0, -len(x) % group), (0, 0)))
    return e.reshape(-1, group, x.shape[1]).sum(1)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
moderate = st.floats(-2.0, 2.0, width=32) | st.sampled_from([0.0, 1.0, -1.0, 7.0, -8.0, 0.5])
shapes = st.tuples(st.integers(1, 140), st.integers(1, 3))


def matrices(elements):
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements))


@given(matrices(moderate), st.sampled_from(sorted(INT4)))
@example(np.full((32, 1), 1.1, np.float32), 32)  # max - min is zero
def test_int4_is_at_least_as_exact_as_the_rule_of_q4_0(x, group):
    values, scales, _ = quantize(x, Quantization(4, group))
    assert values.min() >= -8 and values.max() <= 7
    error = squared(x, dequantize(values, scales, group), group)
    # Q4_0's scale, rounded to bf16, is one of the candidates. The fp32 sums of 128 squares below 1
    # that decide between candidates are off by less than 128 * 2^-24 of their value, and every
    # difference by 2^-20 of the group's largest weight, for which the floor allows.
    largest = squared(np.abs(x), 0 * x, 1).reshape(x.shape)
    floor = np.pad(largest, ((0, -len(x) % group), (0, 0))).reshape(-1, group, x.shape[1]).max(1)
    with_bf16 = q4_0(x, group, BF16)
    slack = 2.0**-19 * np.sqrt(with_bf16 * group * floor) + group * 2.0**-38 * floor
    slack += group * (8 * 2.0**-126) ** 2  # the smallest scale
    assert (error <= with_bf16 * (1 + 2e-5) + slack).all()
    # Rounding a scale to bf16 moves 8 of its steps by at most 8 * 2^-8. By the triangle inequality,
    # a rule that keeps its scale in fp32 can be better by that much for each weight.
    step = np.sqrt(floor) / 8
    bound = np.sqrt(q4_0(x, group, np.float64)) + math.sqrt(group) * step * 8 * 2.0**-8
    assert (np.sqrt(error) <= bound * (1 + 2e-5) + 1e-12).all()


@given(matrices(finite), st.sampled_from(KINDS))
@example(np.full((3, 2), 2.0**-149, np.float32), KINDS[2])
@example(np.full((3, 2), np.finfo(np.float32).max, np.float32), KINDS[2])
@example(np.full((3, 2), -np.finfo(np.float32).max, np.float32), KINDS[0])
def test_every_finite_weight_can_be_quantized(x, quantized):
    """Tiny and huge ones too: the error is half a step, or at most that of Q4_0's rule."""
    values, scales, errors = quantize(x, quantized)
    scale = scales.astype(np.float64)
    normal = (scale == 0) | (np.abs(scale) >= 2.0**-126)
    assert np.isfinite(scale).all() and normal.all()
    weight = dequantize(values, scales, quantized.group)
    assert np.isfinite(weight.astype(np.float32)).all()
    assert not weight[x == 0].any()
    if quantized.group is None:  # fp32 rounds x / scale, up to 127, by 2^-17 of a step
        assert (np.abs(x - weight) <= np.abs(scale.T) * (0.5 + 2.0**-16)).all()
        return
    error = squared(x, weight, quantized.group).sum()
    # 8 steps of the smallest scale, where Q4_0's scale would be smaller.
    floor = x.size * (8 * 2.0**-126) ** 2
    largest = np.square(np.abs(x).max(0).astype(np.float64)).sum() * quantized.group * 2.0**-8
    assert error <= q4_0(x, quantized.group, np.float64).sum() * 1.01 + largest + floor
    assert math.isfinite(errors.error)


@given(matrices(finite | moderate), st.sampled_from(KINDS))
def test_dequantized_weights_are_quantized_to_themselves(x, quantized):
    values, scales, _ = quantize(x, quantized)
    once = dequantize(values, scales, quantized.group).astype(np.float32)
    again = quantize(once, quantized)
    if quantized.group is None:
        # int8 times an fp32 scale is rounded to fp32: a scale may come back one ulp away.
        np.testing.assert_array_equal(again[0], values)
        nonzero = values.any(1)  # tiny weights became zero
        np.testing.assert_allclose(again[1][nonzero], scales[nonzero], rtol=2.0**-22)
    else:
        # int4 times bf16 is exact in fp32. A scale's sign may turn, with the values'.
        np.testing.assert_array_equal(dequantize(*again[:2], quantized.group), once)
        assert again[2].error <= 2.0**-40 * again[2].weights  # of x / scale, rounded to fp32


@given(matrices(moderate), st.sampled_from(KINDS))
@example(np.array([[-1.0], [1.0]] * 3 + [[1.0]], np.float32), KINDS[1])  # a tie
def test_reported_errors_are_those_of_the_dequantized_weights(x, quantized):
    assume(np.abs(x).max() > 1e-3)
    values, scales, errors = quantize(x, quantized)
    exact = np.square(x - dequantize(values, scales, quantized.group)).sum()
    size = np.square(x.astype(np.float64)).sum()
    # fp32 differences are off by 2^-20 of the largest weight, below size^0.5.
    close = dict(rtol=1e-4, atol=2.0**-18 * size)
    np.testing.assert_allclose(errors.error, exact, **close)
    np.testing.assert_allclose(errors.weights, size, rtol=1e-5)
    if quantized.group is not None:
        np.testing.assert_allclose(errors.q4_0, q4_0(x, quantized.group, BF16).sum(), **close)
    relative = errors.relative()
    assert relative["rms"] == math.sqrt(errors.error / errors.weights)
    if quantized.group is None:
        assert "q4_0" not in relative
    else:
        assert relative.get("q4_0", 0) >= relative["rms"]


@pytest.mark.parametrize("group, bound", [(32, 0.082), (64, 0.0905), (128, 0.0972)])
def test_int4_is_more_exact_than_q4_0_on_normal_weights(group, bound):
    """Q4_0's rule gives 0.0859, 0.0949 and 0.1031 for groups of 32, 64 and 128."""
    x = np.random.default_rng(0).standard_normal((1280, 256), np.float32) * 0.02
    relative = quantize(x.astype(BF16), Quantization(4, group))[2].relative()
    assert relative["rms"] < bound and relative["rms"] < 0.955 * relative["q4_0"]


def test_int8_has_one_scale_per_output():
    x = np.array([[1.0, 127.0], [-0.25, -254.0], [0.5, 3.0]], np.float32)
    values, scales, _ = quantize(x, INT8)
    np.testing.assert_array_equal(scales, np.array([[1 / 127], [2.0]], np.float32))
    np.testing.assert_array_equal(values, [[127, -32, 64], [64, -127, 2]])  # 1.5 to even


def test_two_int4_share_a_byte():
    """Byte i of 128 inputs holds input i in its low half and input 64 + i in its high half."""
    assert INT4_BLOCK == packed_lib.BLOCK
    x = ((np.arange(256) * 7 + np.arange(256) // 64) % 16 - 8).astype(np.float32)[:, None]
    leaf = leaf_of(256, 1)
    packed = quantization.quantize_array(x, leaf, Quantization(4, 64)).values
    assert packed.shape == (1, 128) and packed.dtype == np.uint8
    values = x[:, 0].astype(int).reshape(2, 2, 64)
    np.testing.assert_array_equal(packed.reshape(2, 64) & 15, values[:, 0] & 15)
    np.testing.assert_array_equal(packed.reshape(2, 64) >> 4, values[:, 1] & 15)
    for unpacked in (unpack_host(packed), packed_lib.unpack(jnp.asarray(packed))):
        assert unpacked.dtype == np.int8
        np.testing.assert_array_equal(unpacked[0], x[:, 0])


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.sampled_from([64, 128]))))
def test_unpacking_on_host_and_device_agree(packed):
    np.testing.assert_array_equal(unpack_host(packed), packed_lib.unpack(packed))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantized", KINDS[:3], ids=str)
def test_nan_and_infinity_are_refused(quantized, bad):
    x = np.ones((130, 3), np.float32)
    x[129, 1] = bad
    with pytest.raises(ValueError, match=r"blocks/0/mlp/c_fc/kernel/int. holds NaN or Inf"):
        quantize(x, quantized)
