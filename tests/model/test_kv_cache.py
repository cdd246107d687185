"""The KV cache: attention over prefix and ring against float64, int8, growth, reordering."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btlm_jax import BTLM, BTLMConfig, make_mesh
from btlm_jax.model import kv_cache
from btlm_jax.model.kv_cache import CacheContext, KVArray, LayerKV

R, B, H, K = 4, 2, 3, 8  # two prompts, two rows each
P, S = 6, 5  # slots of the prefix and of the ring
# Sums of K and of 11 products in fp32, of values of order 1.
TOLERANCE = 5e-6


def reference(q, k, v, slopes):
    """softmax(q k - slope * distance) v of one query after keys [n, K], in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = k @ q - slopes * np.arange(len(k) - 1, -1, -1)
    p = np.exp(scores - scores.max())
    return (p / p.sum()) @ v


def extended(lengths, at, prefix_lengths, dtype=jnp.float32, T=1, seed=0):
    """(the output, what each row should see: its keys and values in order, queries, slopes)."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    own, before = (normal(2, n, H, size, K) for n, size in ((R, S), (B, P)))
    q, new = normal(R, H, T, K), normal(2, R, H, T, K)
    slopes = np.array([0.5, 0.1, 0.0], np.float32)
    part, prefix = (
        LayerKV(*(KVArray.from_floats(jnp.asarray(x), dtype) for x in kv)) for kv in (own, before)
    )
    shared = CacheContext(
        jnp.asarray(slopes),
        jnp.asarray(lengths),
        jnp.int32(at % S),
        jnp.ones((R, T), jnp.int32),
        jnp.ones((R, S), jnp.int32),
        jnp.asarray(prefix_lengths),
        jnp.ones((B, P), jnp.int32),
    )
    out, part = kv_cache.cached_attention(
        jnp.asarray(q), *map(jnp.asarray, new), part, prefix, shared,
        precision=jax.lax.Precision.HIGHEST, on_cpu=True, shard=None,
    )  # fmt: skip
    seen = []
    for row in range(R):
        mine = [(at - lengths[row] + i) % S for i in range(lengths[row])]
        filled = before[:, row // 2, :, : prefix_lengths[row // 2]]
        seen.append(np.concatenate([filled, own[:, row][:, :, mine], new[:, row]], axis=2))
    return np.asarray(out), seen, q, slopes


@pytest.mark.parametrize(
    "lengths, at",
    [([2, 2, 2, 2], 2), ([0, 3, 1, 4], 4), ([4, 0, 2, 1], 13)],
    ids=["alike", "unlike", "round the ring"],
)
def test_one_token_after_a_prefix_and_the_own_slots(lengths, at):
    out, seen, q, slopes = extended(lengths, at, [6, 3])
    for row in range(R):
        for head in range(H):
            k, v = seen[row][:, head]
            expected = reference(q[row, head, 0], k, v, slopes[head])
            np.testing.assert_allclose(out[row, head, 0], expected, atol=TOLERANCE)


def test_several_tokens_see_each_other_in_order():
    out, seen, q, slopes = extended([1, 1, 1, 1], 1, [5, 2], T=3)
    for row in range(R):
        for head in range(H):
            k, v = seen[row][:, head]
            for t in range(3):
                end = k.shape[0] - 2 + t
                expected = reference(q[row, head, t], k[:end], v[:end], slopes[head])
                np.testing.assert_allclose(out[row, head, t], expected, atol=TOLERANCE)


def test_int8_errs_by_half_a_step():
    """Each entry by at most half of a 127th of its slot's largest; so does their mean, a value."""
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 8)).astype(np.float32)
    slots = KVArray.from_floats(jnp.asarray(x), jnp.int8)
    assert slots.data.dtype == jnp.int8
    back = np.asarray(slots.data, np.float32) * np.asarray(slots.scales)[..., None]
    assert (np.abs(back - x) <= np.abs(x).max(-1, keepdims=True) / 127 * 0.501).all()
    out, seen, q, slopes = extended([2, 0, 3, 1], 4, [6, 3], dtype=jnp.int8)
    for row in range(R):
        for head in range(H):
            k, v = seen[row][:, head]
            expected = reference(q[row, head, 0], k, v, slopes[head])
            # Scores err by |q| |k| / 254 or so, 3 x 3 / 254; probabilities by that much of them.
            np.testing.assert_allclose(out[row, head, 0], expected, atol=0.06)


@pytest.fixture(scope="module")
def tiny():
    model = BTLM(dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=64))
    return model, model.init(jax.random.key(0))


def test_growth_and_branches_change_nothing(tiny):
    """Whole text at once; in a cache that grows; as two branches of a prompt, reordered."""
    model, params = tiny
    ids = np.random.default_rng(1).integers(0, 64, (2, 9))
    expected = np.asarray(model.apply(params, ids))
    cache = model.init_cache(params, 2, 5)
    logits, cache = model.apply(params, ids[:, :5], cache=cache)
    prompt = cache
    cache = kv_cache.resized(jax.tree.map(jnp.copy, cache), 9)
    for t in range(5, 9):
        logits, cache = model.apply(params, ids[:, t : t + 1], cache=cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=2e-5)

    rows = np.array([[1, 0], [1, 1]])  # which beam of its prompt each continues
    cache = model.fork(params, prompt, 2, 4)
    text = np.repeat(ids, 2, 0)
    text[::2, 5] += 1  # the first beam takes another token
    _, cache = model.apply(params, text[:, 5:6] % 64, cache=cache)
    cache = kv_cache.reordered(cache, jnp.asarray(rows), None)
    text = text.reshape(2, 2, 9)[np.arange(2)[:, None], rows].reshape(4, 9) % 64
    logits, cache = model.apply(params, text[:, 6:7], cache=cache)
    expected = np.asarray(model.apply(params, text[:, :7]))[:, -1]
    np.testing.assert_allclose(logits[:, 0], expected, atol=2e-5)
    assert cache.end.tolist() == [7] * 4


def test_branches_on_a_mesh(tiny):
    model, _ = tiny
    mesh = make_mesh(data=2, fsdp=1, tensor=4)
    params = model.init(jax.random.key(0), mesh=mesh)
    ids = np.random.default_rng(1).integers(0, 64, (2, 7))
    _, prompt = model.apply(params, ids[:, :5], cache=model.init_cache(params, 2, 8))
    cache = model.fork(params, prompt, 2, 4)
    assert cache.layers[0].keys.data.sharding.spec[:2] == (("data", "fsdp"), "tensor")
    text = np.repeat(ids, 2, 0)
    for t in (5, 6):
        logits, cache = model.apply(params, text[:, t : t + 1], cache=cache)
    expected = np.asarray(model.apply(params, text[::2]))[:, -1].repeat(2, 0)
    np.testing.assert_allclose(logits[:, 0], expected, atol=2e-5)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_closed_ring_grows(tiny, devices):
    """A row begins anew where another had been, goes round the ring, and on in a larger one."""
    model, params = tiny
    if devices > 1:
        params = model.init(jax.random.key(0), mesh=make_mesh(data=2, fsdp=1, tensor=4))
    ids = np.random.default_rng(1).integers(0, 64, (2, 16))
    _, prompt = model.apply(params, ids[:, :5], cache=model.init_cache(params, 2, 8))
    cache = model.fork(params, prompt, 1, 4)

    def go_on(cache, tokens):
        for t in range(tokens.shape[1]):
            logits, cache = model.apply(params, tokens[:, t : t + 1], cache=cache)
        return logits, cache

    _, cache = go_on(cache, ids[:, 5:8])
    cache = dataclasses.replace(cache, length=jnp.zeros_like(cache.length))  # both begin anew
    _, cache = go_on(cache, ids[:, 8:12])
    assert int(cache.cursor) == 7
    logits, cache = go_on(kv_cache.resized(cache, 8), ids[:, 12:])
    expected = model.apply(tiny[1], np.concatenate([ids[:, :5], ids[:, 8:]], 1))
    np.testing.assert_allclose(logits[:, 0], np.asarray(expected)[:, -1], atol=2e-5)


def test_a_row_that_runs_over_is_nan(tiny):
    model, params = tiny
    cache = model.init_cache(params, 1, 2)
    _, cache = model.apply(params, np.array([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match="the cache holds 2 tokens, of which 2 are used"):
        model.apply(params, np.array([[3]]), cache=cache)
    inside = jax.jit(lambda p, ids, cache: model.apply(p, ids, cache=cache))
    assert np.isnan(inside(params, np.array([[3]]), cache)[0]).all()


def test_a_dtype_no_cache_can_have(tiny):
    model, params = tiny
    with pytest.raises(ValueError, match="dtype of the cache: found int4, expected int8"):
        model.init_cache(params, 1, 2, dtype=jnp.int4)
