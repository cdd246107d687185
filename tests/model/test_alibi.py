"""ALiBi against the original's bias tensors and float64."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from btlm_jax import AlibiScaling, BTLMConfig
from btlm_jax.model import alibi
from support import golden
from support.golden import max_error

BIAS = dict(np.load(golden.GOLDEN / "alibi_bias.npz"))
SCALINGS = {
    "none": None,
    "factor4": AlibiScaling(factor=4.0),
    "dyn16": AlibiScaling(train_seq_len=16),
}


@pytest.mark.parametrize("key", BIAS)
@pytest.mark.parametrize("traced", [False, True])
def test_bias_equals_the_original(key, traced):
    kind, heads, shape = re.fullmatch(r"(\w+)/H(\d+)/(q\d+_past\d+)", key).groups()
    T, past = map(int, re.fullmatch(r"q(\d+)_past(\d+)", shape).groups())

    def run(past):
        scale = alibi.scale(SCALINGS[kind], past + T)
        slopes = jnp.asarray(alibi.slopes(int(heads)), jnp.float32) / scale
        return alibi.bias(slopes, past + jnp.arange(T), jnp.arange(BIAS[key].shape[-1]))

    got = jax.jit(run)(past) if traced else run(past)
    # fp32 rounding of values up to 22.6; measured 1.9e-6.
    assert max_error(got, BIAS[key].reshape(got.shape)) < 5e-6


@given(st.integers(1, 200))
def test_slopes_follow_the_rule_for_any_head_count(n):
    s = alibi.slopes(n)
    p = 2 ** int(np.log2(n))
    assert s.shape == (n,) and s.dtype == np.float64
    np.testing.assert_allclose(s[:p], [2.0 ** (-8 * (i + 1) / p) for i in range(p)], rtol=1e-15)
    # Appended, not interleaved: the odd-numbered slopes of twice as many heads.
    expected = [2.0 ** (-8 * (2 * i + 1) / (2 * p)) for i in range(n - p)]
    np.testing.assert_allclose(s[p:], expected, rtol=1e-15)


def test_stored_slopes_override_exact_ones():
    c = dataclasses.replace(BTLMConfig.preset("tiny"), alibi_slopes=(0.5, 0.25, 0.125, 0.83984375))
    assert alibi.model_slopes(c).tolist() == [0.5, 0.25, 0.125, 0.83984375]


def test_dynamic_scale_is_1_up_to_the_training_length():
    scaling = AlibiScaling(train_seq_len=16)
    assert [alibi.scale(scaling, n) for n in (1, 16, 17, 64)] == [1.0, 1.0, 17 / 16, 4.0]
    traced = jax.jit(lambda n: alibi.scale(scaling, n))
    assert [float(traced(n)) for n in (1, 16, 17, 64)] == [1.0, 1.0, 17 / 16, 4.0]


def test_only_dynamic_scales_vary_and_only_beyond_the_training_length():
    dynamic = AlibiScaling(train_seq_len=16)
    assert [alibi.scale_varies(dynamic, n) for n in (1, 16, 17)] == [False, False, True]
    assert not alibi.scale_varies(None, 17) and not alibi.scale_varies(AlibiScaling(factor=4.0), 17)


def bf16_exact(x) -> bool:
    return bool(np.all(np.asarray(x, np.float64).astype(jnp.bfloat16).astype(np.float64) == x))


def test_key_features_are_exact():
    positions = np.arange(131072 + 256)
    f = np.asarray(alibi.key_features(positions)).astype(np.float64)
    np.testing.assert_array_equal(f[:, 0] + f[:, 1], positions)
    np.testing.assert_array_equal(f[:, :2], f[:, 2:])
    assert np.abs(f[:, 1]).max() <= 256
    with pytest.raises(ValueError, match="found 0 to 131328, expected 0 to 131327"):
        alibi.key_features(np.arange(alibi.MAX_POSITIONS + 1))


@given(st.integers(1, 64), st.floats(0.1, 100))
def test_query_features_sum_to_the_slope(heads, factor):
    s = alibi.slopes(heads) / factor
    f = np.asarray(jax.jit(alibi.query_features)(jnp.asarray(s, jnp.float32))).astype(np.float64)
    assert f.shape == (heads, 4) and bf16_exact(f)
    # Two bf16 pieces hold 16 bits and a sign: 2**-17 relative, plus fp32 rounding.
    np.testing.assert_allclose(f[:, 0] + f[:, 2], s, rtol=2.0**-16)
    assert np.all(f[:, 0] == f[:, 1]) and np.all(f[:, 2] == f[:, 3])
    assert np.abs(f[:, 2]).max() > 0 or bf16_exact(s)  # the low piece survives jit


def test_features_equal_the_bias_up_to_a_constant_per_row():
    heads, T = 32, 2048
    s = alibi.slopes(heads)
    q = np.asarray(alibi.query_features(jnp.asarray(s, jnp.float32))).astype(np.float64)
    k = np.asarray(alibi.key_features(np.arange(T))).astype(np.float64)
    expected = s[:, None] * np.arange(T)
    # Two bf16 pieces of the slopes of 32 heads hold them to 1.6e-6 (measured).
    assert np.all(np.abs(q @ k.T - expected) <= 2e-6 * expected)
