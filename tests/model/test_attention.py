"""Attention against float64, and chunks of queries against all of them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btlm_jax.model import alibi, attention, attention_xla
from support.golden import max_error


def exact(q, k, v, slopes, segments, offset):
    """Returns float64 attention, computed for one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h, t in np.ndindex(q.shape[:3]):
        position = offset + t
        keys = [j for j in range(k.shape[2]) if j <= position]
        if segments is not None:
            keys = [j for j in keys if segments[0][b, t] == segments[1][b, j]]
        if not keys:
            continue
        s = k[b, h, keys] @ q[b, h, t]
        if slopes is not None:
            s = s - slopes[h] * (position - np.array(keys))
        p = np.exp(s - s.max())
        out[b, h, t] = (p / p.sum()) @ v[b, h, keys]
    return out


class Problem(NamedTuple):
    """What decides the program: shapes, masks, chunks; S > T as where a mesh splits sequences."""

    B: int
    H: int
    T: int
    S: int
    K: int
    alibi: bool
    segmented: bool
    chunk: int


# One program each. Together they hold every mask, chunks of every kind, and single entries.
PROBLEMS = [
    Problem(B=1, H=1, T=1, S=1, K=1, alibi=True, segmented=False, chunk=1),
    Problem(B=2, H=3, T=9, S=9, K=5, alibi=False, segmented=True, chunk=2),
    Problem(B=2, H=2, T=7, S=7, K=4, alibi=True, segmented=True, chunk=512),
    Problem(B=1, H=2, T=8, S=15, K=2, alibi=False, segmented=False, chunk=3),
    Problem(B=2, H=3, T=5, S=8, K=3, alibi=True, segmented=True, chunk=512),
    Problem(B=1, H=3, T=6, S=13, K=5, alibi=True, segmented=False, chunk=1),
]


@functools.cache
def compiled(problem: Problem):
    """Returns a jitted function of (q, k, v, slopes, segments, offset)."""

    def run(q, k, v, slopes, segments, offset):
        if problem.S == problem.T:
            return attention.attention(q, k, v, slopes_H=slopes, segments=segments)
        positions = offset + jnp.arange(problem.T, dtype=jnp.int32)
        return attention_xla.xla_attention(
            q, k, v, slopes_H=slopes, segments=segments, positions_T=positions, precision=None
        )

    return jax.jit(run)


@settings(max_examples=60)
@given(st.sampled_from(PROBLEMS), st.integers(0, 1000), st.data())
def test_attention_equals_float64(problem, seed, data):
    B, H, T, S, K = problem[:5]
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, H, T, K)).astype(np.float32)
    k, v = (rng.normal(size=(B, H, S, K)).astype(np.float32) for _ in range(2))
    offset = data.draw(st.integers(0, S - T))
    segments = None
    if problem.segmented:
        key_segments = np.sort(rng.integers(0, 3, (B, S)), 1)
        segments = key_segments[:, offset : offset + T], key_segments
    slopes = alibi.slopes(H) if problem.alibi else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_xla, "QUERY_CHUNK", problem.chunk)
        slopes_fp32 = None if slopes is None else jnp.asarray(slopes, jnp.float32)
        got = compiled(problem)(q, k, v, slopes_fp32, segments, offset)
    expected = exact(q, k, v, slopes, segments, offset)
    assert max_error(got, expected) < 2e-6  # fp32 rounding of values of size 3; measured 2.5e-7


def test_chunks_change_neither_result_nor_gradients(monkeypatch):
    rng = np.random.default_rng(0)
    B, H, T, K = 2, 3, 50, 8
    q, k, v, w = (jnp.asarray(rng.normal(size=(B, H, T, K)), jnp.float32) for _ in range(4))
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (B, T)), 1))
    slopes = jnp.asarray(alibi.slopes(H), jnp.float32)

    def loss(q, k, v, slopes):
        out = attention.attention(q, k, v, slopes_H=slopes, segments=(segments, segments))
        return (out * w).sum()

    results = {}
    for chunk in (512, 16, 7):
        monkeypatch.setattr(attention_xla, "QUERY_CHUNK", chunk)
        results[chunk] = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(q, k, v, slopes)
    for chunk in (16, 7):
        for a, b in zip(*(jax.tree.leaves(results[c]) for c in (512, chunk)), strict=True):
            assert max_error(a, b) < 1e-5 * max(1.0, float(jnp.abs(a).max()))


def test_gradients_equal_finite_differences_in_float64():
    rng = np.random.default_rng(1)
    q, k, v, w = (rng.normal(size=(1, 2, 5, 3)) for _ in range(4))
    slopes = alibi.slopes(2)

    def loss(q, k, v):
        out = attention.attention(q, k, v, slopes_H=jnp.asarray(slopes, jnp.float32))
        return (out * w.astype(np.float32)).sum()

    grads = jax.grad(loss, argnums=(0, 1, 2))(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    for i, grad in enumerate(grads):
        for index in [(0, 0, 0, 0), (0, 1, 2, 1), (0, 0, 4, 2)]:
            quotient = 0.0
            for sign in (1, -1):
                inputs = [x.copy() for x in (q, k, v)]
                inputs[i][index] += sign * 1e-5
                quotient += sign * (exact(*inputs, slopes, None, 0) * w).sum() / 2e-5
            assert abs(float(grad[index]) - quotient) < 1e-5


def test_bf16_inputs_keep_fp32_softmax():
    """Only P is rounded to bf16: the relative error is that of bf16 flash attention, 2.3e-3."""
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 4, 1024, 80)), jnp.bfloat16) for _ in range(3))
    slopes = alibi.slopes(4)
    got = attention.attention(q, k, v, slopes_H=jnp.asarray(slopes, jnp.float32))
    assert got.dtype == jnp.bfloat16
    rows = [0, 1, 511, 512, 1023]
    kk, vv = np.asarray(k, np.float64), np.asarray(v, np.float64)
    for t in rows:
        expected = exact(np.asarray(q)[:, :, t : t + 1], kk, vv, slopes, None, t)
        error = np.linalg.norm(np.asarray(got, np.float64)[:, :, t : t + 1] - expected)
        assert error < 4e-3 * np.linalg.norm(expected)


def test_unknown_implementation_is_an_error():
    x = jnp.zeros((1, 1, 2, 2))
    with pytest.raises(ValueError, match="implementation: found 'flash', expected one of 'xla'"):
        attention.attention(x, x, x, slopes_H=None, implementation="flash")
