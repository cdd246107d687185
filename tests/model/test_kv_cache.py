"""The KV cache: attention over prefix and ring against float64, int8, resizing, reordering."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btlm_jax import BTLM, BTLMConfig, make_mesh
from btlm_jax.model import kv_cache
from btlm_jax.model.attention_cached import cached_attention
from btlm_jax.model.attention_context import AttentionContext
from btlm_jax.model.kv_cache import CacheSlots, KVArray, LayerKV

R, B, H, K = 4, 2, 3, 8  # two prompts, two rows each
P, S = 6, 5  # slots of the prefix and of the ring
# Sums of K and of 11 products in fp32, of values of order 1.
TOLERANCE = 5e-6


def reference(q, k, v, slopes):
    """Returns float64 softmax(q k - slope * distance) v for one query after keys [n, K]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = k @ q - slopes * np.arange(len(k) - 1, -1, -1)
    p = np.exp(scores - scores.max())
    return (p / p.sum()) @ v


def attend(lengths, cursor, prefix_lengths, dtype=jnp.float32, T=1, seed=0):
    """Returns (output, keys and values in the order each row sees them, queries, slopes)."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    slots, before = (normal(2, n, H, size, K) for n, size in ((R, S), (B, P)))
    q, new = normal(R, H, T, K), normal(2, R, H, T, K)
    slopes = np.array([0.5, 0.1, 0.0], np.float32)
    layer, prefix = (
        LayerKV(*(KVArray.from_floats(jnp.asarray(x), dtype) for x in kv)) for kv in (slots, before)
    )
    cache_slots = CacheSlots(
        jnp.asarray(lengths),
        jnp.int32(cursor % S),
        jnp.ones((R, S), jnp.int32),
        jnp.asarray(prefix_lengths),
        jnp.ones((B, P), jnp.int32),
    )
    segments = jnp.ones((R, T), jnp.int32)
    context = AttentionContext(jnp.asarray(slopes), segments, cache_slots)
    arrays = map(jnp.asarray, (q, *new))
    highest = jax.lax.Precision.HIGHEST
    out, _ = cached_attention(*arrays, (layer, prefix), context, precision=highest)
    seen = []
    for row in range(R):
        indices = [(cursor - lengths[row] + i) % S for i in range(lengths[row])]
        filled = before[:, row // 2, :, : prefix_lengths[row // 2]]
        seen.append(np.concatenate([filled, slots[:, row][:, :, indices], new[:, row]], axis=2))
    return np.asarray(out), seen, q, slopes


@pytest.mark.parametrize(
    "lengths, cursor",
    [([2, 2, 2, 2], 2), ([0, 3, 1, 4], 4), ([4, 0, 2, 1], 13)],
    ids=["equal lengths", "unequal lengths", "around the ring"],
)
def test_one_token_attends_to_the_prefix_and_its_own_row(lengths, cursor):
    out, seen, q, slopes = attend(lengths, cursor, [6, 3])
    for row in range(R):
        for head in range(H):
            k, v = seen[row][:, head]
            expected = reference(q[row, head, 0], k, v, slopes[head])
            np.testing.assert_allclose(out[row, head, 0], expected, atol=TOLERANCE)


def test_several_new_tokens_attend_causally():
    out, seen, q, slopes = attend([1, 1, 1, 1], 1, [5, 2], T=3)
    for row in range(R):
        for head in range(H):
            k, v = seen[row][:, head]
            for t in range(3):
                end = k.shape[0] - 2 + t
                expected = reference(q[row, head, t], k[:end], v[:end], slopes[head])
                np.testing.assert_allclose(out[row, head, t], expected, atol=TOLERANCE)


def test_int8_rounds_by_half_a_step():
    """The error of an entry is at most half of a 127th of the largest in its slot."""
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 8)).astype(np.float32)
    quantized = KVArray.from_floats(jnp.asarray(x), jnp.int8)
    assert quantized.data.dtype == jnp.int8
    back = np.asarray(quantized.data, np.float32) * np.asarray(quantized.scales)[..., None]
    assert (np.abs(back - x) <= np.abs(x).max(-1, keepdims=True) / 127 * 0.501).all()
    out, seen, q, slopes = attend([2, 0, 3, 1], 4, [6, 3], dtype=jnp.int8)
    for row in range(R):
        for head in range(H):
            k, v = seen[row][:, head]
            expected = reference(q[row, head, 0], k, v, slopes[head])
            # Scores are off by about |q| |k| / 254, 3 x 3 / 254, and so is log p.
            np.testing.assert_allclose(out[row, head, 0], expected, atol=0.06)


@pytest.fixture(scope="module")
def tiny():
    model = BTLM(dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=64))
    return model, model.init(jax.random.key(0))


def test_resizing_and_forking_change_no_logits(tiny):
    """Compares the whole text at once, a cache that grows, and a forked and reordered prompt."""
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

    parents = np.array([[1, 0], [1, 1]])  # the beam of the same prompt that each row continues
    cache = model.fork(params, prompt, 2, 4)
    text = np.repeat(ids, 2, 0)
    text[::2, 5] += 1  # the first beam takes another token
    _, cache = model.apply(params, text[:, 5:6] % 64, cache=cache)
    cache = kv_cache.reordered(cache, jnp.asarray(parents), None)
    text = text.reshape(2, 2, 9)[np.arange(2)[:, None], parents].reshape(4, 9) % 64
    logits, cache = model.apply(params, text[:, 6:7], cache=cache)
    expected = np.asarray(model.apply(params, text[:, :7]))[:, -1]
    np.testing.assert_allclose(logits[:, 0], expected, atol=2e-5)
    assert cache.end.tolist() == [7] * 4


def test_forks_on_a_mesh(tiny):
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
def test_a_wrapped_ring_can_be_resized(tiny, devices):
    """Rows restart, go around the ring, and continue in a larger one."""
    model, params = tiny
    if devices > 1:
        params = model.init(jax.random.key(0), mesh=make_mesh(data=2, fsdp=1, tensor=4))
    ids = np.random.default_rng(1).integers(0, 64, (2, 16))
    _, prompt = model.apply(params, ids[:, :5], cache=model.init_cache(params, 2, 8))
    cache = model.fork(params, prompt, 1, 4)

    def decode(cache, tokens):
        for t in range(tokens.shape[1]):
            logits, cache = model.apply(params, tokens[:, t : t + 1], cache=cache)
        return logits, cache

    _, cache = decode(cache, ids[:, 5:8])
    cache = dataclasses.replace(cache, length=jnp.zeros_like(cache.length))  # both rows restart
    _, cache = decode(cache, ids[:, 8:12])
    assert int(cache.cursor) == 7
    logits, cache = decode(kv_cache.resized(cache, 8), ids[:, 12:])
    expected = model.apply(tiny[1], np.concatenate([ids[:, :5], ids[:, 8:]], 1))
    np.testing.assert_allclose(logits[:, 0], np.asarray(expected)[:, -1], atol=2e-5)


def test_a_row_that_overflows_becomes_nan(tiny):
    model, params = tiny
    cache = model.init_cache(params, 1, 2)
    _, cache = model.apply(params, np.array([[1, 2]]), cache=cache)
    with pytest.raises(ValueError, match="the cache holds 2 tokens, of which 2 are used"):
        model.apply(params, np.array([[3]]), cache=cache)
    jitted = jax.jit(lambda p, ids, cache: model.apply(p, ids, cache=cache))
    assert np.isnan(jitted(params, np.array([[3]]), cache)[0]).all()


def test_cache_dtype_must_be_int8_or_a_float(tiny):
    model, params = tiny
    with pytest.raises(ValueError, match="dtype: found int4, expected int8, float32"):
        model.init_cache(params, 1, 2, dtype=jnp.int4)
