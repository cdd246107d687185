"""int8 and int4: errors against an independent float64 computation, and what is stored."""

from __future__ import annotations

import dataclasses
import math

import jax
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
from btlm_jax.checkpoint.schemes import INT4
from btlm_jax.model import packed as packed_lib
from btlm_jax.model import weights
from btlm_jax.model.params import (
    check_params,
    flatten_tree,
    init_params,
    unflatten_tree,
    unstack_params,
)

BF16 = np.dtype(ml_dtypes.bfloat16)
INT8 = Quantization(8)
KINDS = [Quantization.parse(text) for text in ("int8", "int4:32", "int4:64", "int4:128")]
# Awkward: 171 inputs are filled up to 256; outputs of three dimensions; an untied head.
CONFIG = dataclasses.replace(BTLMConfig.preset("tiny"), n_inner=171, tie_word_embeddings=False)


def leaf_of(inputs: int, outputs: int) -> weights.DiskLeaf:
    """A kernel of a layer."""
    w = dataclasses.replace(
        weights.weights_by_path(CONFIG)["blocks", "mlp", "c_fc", "kernel"], shape=(inputs, outputs)
    )
    return weights.DiskLeaf(w, 0)


def quantize(x: np.ndarray, to: Quantization) -> tuple[np.ndarray, np.ndarray, QuantizationErrors]:
    """Values as int8 [O, I], scales [O, G] and errors of a kernel [I, O]."""
    leaf = leaf_of(*x.shape)
    values, scales = quantization.stored_parts(leaf, to)
    found = quantization.quantize_array(x, values, to)
    for array, part in ((found.values, values), (found.scales, scales)):
        assert array.shape == part.shape and array.dtype == part.dtype
    whole = found.values if to.group is None else unpack_host(found.values)
    assert not whole[:, len(x) :].any()  # the filling
    return whole[:, : len(x)], found.scales, found.errors


def dequantize(values: np.ndarray, scales: np.ndarray, group: int | None) -> np.ndarray:
    """float64 [I, O], by the definition."""
    each = np.repeat(scales.astype(np.float64), group or values.shape[1], axis=1)
    return (values * each[:, : values.shape[1]]).T


def q4_0(x: np.ndarray, group: int, dtype: type | np.dtype) -> np.ndarray:
    """float64 squared error of every group [G, O] of x [I, O] by the rule of ggml's
    quantize_row_q4_0_ref: d = max / -8, q = floor(x / d + 8.5) up to 15, a weight is (q - 8) d.
    """
    x = np.pad(x.astype(np.float64), ((0, -len(x) % group), (0, 0)))
    x = x.reshape(-1, group, x.shape[1])
    at = np.abs(x).argmax(1, keepdims=True)
    d = (np.take_along_axis(x, at, 1) / -8).astype(dtype).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(d == 0, 0, np.minimum(np.floor(x / d + 8.5), 15) - 8)
    return np.square(x - q * d).sum(1)


def squared(x: np.ndarray, got: np.ndarray, group: int) -> np.ndarray:
    """float64 squared error of every group."""
    e = np.pad(np.square(x.astype(np.float64) - got), ((0, -len(x) % group), (0, 0)))
    return e.reshape(-1, group, x.shape[1]).sum(1)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
moderate = st.floats(-2.0, 2.0, width=32) | st.sampled_from([0.0, 1.0, -1.0, 7.0, -8.0, 0.5])
shapes = st.tuples(st.integers(1, 140), st.integers(1, 3))


def matrices(elements):
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements))


@given(matrices(moderate), st.sampled_from(sorted(INT4)))
@example(np.full((32, 1), 1.1, np.float32), 32)  # max - min is zero
def test_int4_is_no_worse_than_the_rule_of_q4_0(x, group):
    values, scales, _ = quantize(x, Quantization(4, group))
    assert values.min() >= -8 and values.max() <= 7
    error = squared(x, dequantize(values, scales, group), group)
    # That scale, as rounded to bf16, is one of those tried. fp32 sums of 128 squares of numbers
    # below 1 that choose between scales are off by less than 128 * 2^-24 of their sum, and each
    # residue by 2^-20 of the group's largest weight, which is what the square's floor allows for.
    largest = squared(np.abs(x), 0 * x, 1).reshape(x.shape)
    floor = np.pad(largest, ((0, -len(x) % group), (0, 0))).reshape(-1, group, x.shape[1]).max(1)
    with_bf16 = q4_0(x, group, BF16)
    slack = 2.0**-19 * np.sqrt(with_bf16 * group * floor) + group * 2.0**-38 * floor
    slack += group * (8 * 2.0**-126) ** 2  # no scale is smaller
    assert (error <= with_bf16 * (1 + 2e-5) + slack).all()
    # Rounding a scale moves 8 steps of it by 8 * 2^-8 at most: so much per weight, by the triangle
    # inequality, may the rule gain that keeps its scale in fp32.
    step = np.sqrt(floor) / 8
    bound = np.sqrt(q4_0(x, group, np.float64)) + math.sqrt(group) * step * 8 * 2.0**-8
    assert (np.sqrt(error) <= bound * (1 + 2e-5) + 1e-12).all()


@given(matrices(finite), st.sampled_from(KINDS))
@example(np.full((3, 2), 2.0**-149, np.float32), KINDS[2])
@example(np.full((3, 2), np.finfo(np.float32).max, np.float32), KINDS[2])
@example(np.full((3, 2), -np.finfo(np.float32).max, np.float32), KINDS[0])
def test_every_finite_weight_can_be_quantized(x, to):
    """Tiny and huge ones too: within half a step, or clipped by Q4_0's rule or a better one."""
    values, scales, errors = quantize(x, to)
    scale = scales.astype(np.float64)
    normal = (scale == 0) | (np.abs(scale) >= 2.0**-126)
    assert np.isfinite(scale).all() and normal.all()
    got = dequantize(values, scales, to.group)
    assert np.isfinite(got.astype(np.float32)).all()
    assert not got[x == 0].any()
    if to.group is None:  # fp32 rounds x / scale, up to 127, by 2^-17 of a step
        assert (np.abs(x - got) <= np.abs(scale.T) * (0.5 + 2.0**-16)).all()
        return
    error = squared(x, got, to.group).sum()
    # 8 steps of the smallest scale, where the rule's own would be smaller.
    floor = x.size * (8 * 2.0**-126) ** 2
    largest = np.square(np.abs(x).max(0).astype(np.float64)).sum() * to.group * 2.0**-8
    assert error <= q4_0(x, to.group, np.float64).sum() * 1.01 + largest + floor
    assert math.isfinite(errors.error)


@given(matrices(finite | moderate), st.sampled_from(KINDS))
def test_what_was_dequantised_is_quantized_to_itself(x, to):
    values, scales, _ = quantize(x, to)
    once = dequantize(values, scales, to.group).astype(np.float32)
    again = quantize(once, to)
    if to.group is None:
        # int8 times an fp32 scale is rounded to fp32: a scale may come back one ulp away.
        np.testing.assert_array_equal(again[0], values)
        some = values.any(1)  # else they were tiny, and are zero now
        np.testing.assert_allclose(again[1][some], scales[some], rtol=2.0**-22)
    else:
        # int4 times bf16 is exact in fp32. A scale's sign may turn, with the values'.
        np.testing.assert_array_equal(dequantize(*again[:2], to.group), once)
        assert again[2].error <= 2.0**-40 * again[2].weights  # of x / scale, rounded to fp32


@given(matrices(moderate), st.sampled_from(KINDS))
@example(np.array([[-1.0], [1.0]] * 3 + [[1.0]], np.float32), KINDS[1])  # the rule takes the first
def test_the_errors_that_are_told(x, to):
    assume(np.abs(x).max() > 1e-3)
    values, scales, errors = quantize(x, to)
    exact = np.square(x - dequantize(values, scales, to.group)).sum()
    size = np.square(x.astype(np.float64)).sum()
    # fp32 residues are off by 2^-20 of the largest weight, below size^0.5.
    close = dict(rtol=1e-4, atol=2.0**-18 * size)
    np.testing.assert_allclose(errors.error, exact, **close)
    np.testing.assert_allclose(errors.weights, size, rtol=1e-5)
    if to.group is not None:
        np.testing.assert_allclose(errors.q4_0, q4_0(x, to.group, BF16).sum(), **close)
    told = errors.relative()
    assert told["rms"] == math.sqrt(errors.error / errors.weights)
    assert "q4_0" not in told if to.group is None else told.get("q4_0", 0) >= told["rms"]


@pytest.mark.parametrize("group, bound", [(32, 0.082), (64, 0.0905), (128, 0.0972)])
def test_gain_over_q4_0_on_normal_weights(group, bound):
    """A tenth of a bit's worth: 0.0859, 0.0949 and 0.1031 by the rule, at 32, 64 and 128."""
    x = np.random.default_rng(0).standard_normal((1280, 256), np.float32) * 0.02
    told = quantize(x.astype(BF16), Quantization(4, group))[2].relative()
    assert told["rms"] < bound and told["rms"] < 0.955 * told["q4_0"]


def test_int8_is_one_scale_per_output():
    x = np.array([[1.0, 127.0], [-0.25, -254.0], [0.5, 3.0]], np.float32)
    values, scales, _ = quantize(x, INT8)
    np.testing.assert_array_equal(scales, np.array([[1 / 127], [2.0]], np.float32))
    np.testing.assert_array_equal(values, [[127, -32, 64], [64, -127, 2]])  # 1.5 to even


def test_two_int4_share_a_byte():
    """Of 128 inputs, number i is the low and number 64 + i the high half of byte i."""
    x = ((np.arange(256) * 7 + np.arange(256) // 64) % 16 - 8).astype(np.float32)[:, None]
    leaf = leaf_of(256, 1)
    to = Quantization(4, 64)
    packed = quantization.quantize_array(x, quantization.stored_parts(leaf, to)[0], to).values
    assert packed.shape == (1, 128) and packed.dtype == np.uint8
    values = x[:, 0].astype(int).reshape(2, 2, 64)
    np.testing.assert_array_equal(packed.reshape(2, 64) & 15, values[:, 0] & 15)
    np.testing.assert_array_equal(packed.reshape(2, 64) >> 4, values[:, 1] & 15)
    for back in (unpack_host(packed), packed_lib.unpack(jnp.asarray(packed))):
        assert back.dtype == np.int8
        np.testing.assert_array_equal(back[0], x[:, 0])


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.sampled_from([64, 128]))))
def test_unpacking_on_host_and_device_agree(packed):
    np.testing.assert_array_equal(unpack_host(packed), packed_lib.unpack(packed))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("to", KINDS[:3], ids=str)
def test_what_is_not_finite_is_refused(to, bad):
    x = np.ones((130, 3), np.float32)
    x[129, 1] = bad
    with pytest.raises(ValueError, match=r"blocks/0/mlp/c_fc/kernel/int. holds NaN or Inf"):
        quantize(x, to)


# The whole model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), CONFIG)


@pytest.mark.parametrize("to", KINDS, ids=str)
def test_quantized(params, to):
    found = quantization.quantize_params(params, CONFIG, to)
    assert check_params(found, CONFIG) == {}
    flat = flatten_tree(found)
    for leaf in weights.disk_leaves(CONFIG):
        w, got = leaf.weight, flat[leaf.path]
        x = flatten_tree(params)[w.path]
        x = np.asarray(x if leaf.layer is None else x[leaf.layer])
        if not w.inputs:
            np.testing.assert_array_equal(got, x)
            continue
        four = w.stacked and to.bits == 4
        assert got.packed == four and got.scales.dtype == (BF16 if four else np.float32)
        outputs = [i for i in range(x.ndim) if i not in w.inputs]
        expected = x.transpose(*outputs, *w.inputs).reshape(got.shape)
        error = np.asarray(packed_lib.dequantize(got, jnp.float32)) - expected
        relative = np.linalg.norm(error) / np.linalg.norm(expected)
        assert relative < (0.11 if four else 0.01), w.name  # normal weights: 0.097, 0.007


@pytest.mark.parametrize("to", [KINDS[0], Quantization(4, 64, "bfloat16")], ids=str)
def test_quantized_takes_weights_by_layer(params, to):
    expected = quantization.quantize_params(params, CONFIG, to)
    apart = flatten_tree(unstack_params(CONFIG, params))
    for leaf in weights.disk_leaves(CONFIG):
        if leaf.weight.inputs:
            apart[leaf.path] = packed_lib.transposed(apart[leaf.path], leaf.weight.inputs)
    for tree in (unstack_params(CONFIG, params), unflatten_tree(apart)):
        found = quantization.quantize_params(tree, CONFIG, to)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, expected))


def test_bf16_stays_where_nothing_is_quantized(params):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    found = quantization.quantize_params(half, CONFIG, Quantization(4, 64, "bfloat16"))
    assert found["wte"].values.dtype == found["lm_head"].values.dtype == jnp.bfloat16
    assert found["ln_f"]["scale"].dtype == jnp.bfloat16
    full = quantization.quantize_params(params, CONFIG, Quantization(8, embedding="bfloat16"))
    assert full["ln_f"]["scale"].dtype == jnp.float32
    np.testing.assert_array_equal(full["wte"].values, half["wte"])


def test_what_cannot_be_quantized(params):
    once = quantization.quantize_params(params, CONFIG, INT8)
    with pytest.raises(ValueError, match="wte: found int8 with scales, expected floats"):
        quantization.quantize_params(once, CONFIG, INT8)
    padded = init_params(jax.random.key(0), CONFIG, padding={"mlp": 172})
    with pytest.raises(ValueError, match="padded for a mesh, expected unpadded"):
        quantization.quantize_params(padded, CONFIG, INT8)
    with pytest.raises(ValueError, match="do not match"):
        quantization.quantize_params(params, dataclasses.replace(CONFIG, n_layer=3), INT8)


# What is stored -----------------------------------------------------------------------------------


def test_stored_arrays():
    leaves = {leaf.path: leaf for leaf in quantization.stored_leaves(CONFIG, KINDS[2])}
    c = CONFIG
    expected = {
        ("wte", "int8"): ((c.vocab_size, 64), "int8"),
        ("wte", "scales"): ((c.vocab_size, 1), "float32"),
        ("lm_head", "int8"): ((c.vocab_size, 64), "int8"),
        ("blocks", "1", "attn", "c_attn", "kernel", "int4"): ((3, 4, 16, 64), "uint8"),
        ("blocks", "1", "attn", "c_attn", "kernel", "scales"): ((3, 4, 16, 2), "bfloat16"),
        ("blocks", "1", "mlp", "c_proj", "kernel", "int4"): ((64, 128), "uint8"),
        ("blocks", "1", "mlp", "c_proj", "kernel", "scales"): ((64, 4), "bfloat16"),
        ("blocks", "1", "mlp", "c_proj", "bias"): ((64,), None),
    }
    assert {p: (leaves[p].shape, leaves[p].dtype) for p in expected} == expected
    assert ("wte",) not in leaves and ("blocks", "1", "mlp", "c_proj", "kernel") not in leaves
    assert leaves["wte", "scales"].hf_name == "transformer.wte.weight.scales"
    assert len({leaf.hf_name for leaf in leaves.values()}) == len(leaves)
    assert list(quantization.stored_leaves(c, None)) == list(weights.disk_leaves(c))


def test_parse():
    assert Quantization.parse("int8") == Quantization(8, None, "int8")
    assert Quantization.parse("int4") == Quantization.parse("int4:64") == Quantization(4, 64)
    assert Quantization.parse("int4:128", "bfloat16") == Quantization(4, 128, "bfloat16")
    assert str(Quantization(4, 128)) == "int4 in groups of 128, embedding int8"
    for text in ("int4:96", "int2", "int8:64", "Int4", ""):
        with pytest.raises(ValueError, match=r"quantize: found .*, expected one of int8, int4"):
            Quantization.parse(text)


@pytest.mark.parametrize(
    "fields, message",
    [
        ((2,), "bits: found 2, expected 8 or 4"),
        ((8, 64), "group: found 64, expected None for 8 bits"),
        ((4,), "group: found None, expected 32 or 64 or 128 for 4 bits"),
        ((4, 64, "int4"), "embedding: found 'int4', expected int8 or bfloat16"),
    ],
)
def test_fields_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        Quantization(*fields)
