"""Choosing the next token: the rules of transformers' logits warpers, on fp32 scores [R, V]."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from btlm_jax.generation.options import GenerationOptions


def warp_scores(scores_RV: jax.Array, options: GenerationOptions, keep: int = 1) -> jax.Array:
    """Applies the options that need `do_sample`, in transformers' order; removed tokens are -inf.

    Args:
      keep: no rule may leave fewer tokens (beams need one that is no EOS).
    """
    o, scores = options, scores_RV
    keep = min(keep, scores.shape[-1])
    if o.temperature != 1:
        scores = scores / o.temperature
    if o.top_k:
        scores = _removed(scores, scores < _kth(scores, max(o.top_k, keep)))
    if o.top_p < 1:
        ascending = jnp.argsort(scores, -1)
        p = jax.nn.softmax(jnp.take_along_axis(scores, ascending, -1), -1)
        unlikely = jnp.cumsum(p, -1) <= 1 - o.top_p
        scores = _removed(scores, _unsorted(unlikely.at[:, -keep:].set(False), ascending))
    if o.min_p is not None:
        p = jax.nn.softmax(scores, -1)
        unlikely = p < o.min_p * p.max(-1, keepdims=True)
        best = jax.lax.top_k(p, keep)[1]
        scores = _removed(scores, unlikely.at[_rows(scores), best].set(False))
    if o.typical_p < 1:
        scores = _removed(scores, _atypical(scores, o.typical_p, keep))
    if o.epsilon_cutoff > 0:
        p = jax.nn.softmax(scores, -1)
        scores = _removed(scores, (p < o.epsilon_cutoff) & (scores < _kth(scores, keep)))
    if o.eta_cutoff > 0:
        p = jax.nn.softmax(scores, -1)
        eta = jnp.float32(o.eta_cutoff)
        eta = jnp.minimum(eta, jnp.sqrt(eta) * jnp.exp(-_entropy(jax.nn.log_softmax(scores, -1))))
        scores = _removed(scores, (p < eta) & (scores < _kth(scores, keep)))
    return scores


def draw_tokens(scores_RV: jax.Array, keys_R: jax.Array, count: int) -> jax.Array:
    """Draws `count` indices of each row without replacement from softmax(scores). int32 [R, count].

    In the order of the draws. The Gumbel-top-k trick (arXiv 1903.06059); `keys_R` holds one random
    key per row, so that a row draws the same in any batch.
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scores_RV.shape[1:]))(keys_R)
    return jax.lax.top_k(scores_RV + noise, count)[1]


def _removed(scores, where):
    return jnp.where(where, -jnp.inf, scores)


def _rows(scores):
    return jnp.arange(scores.shape[0])[:, None]


def _unsorted(sorted_RV, order_RV):
    return jnp.zeros_like(sorted_RV).at[_rows(sorted_RV), order_RV].set(sorted_RV)


def _kth(scores, k: int):
    return jax.lax.top_k(scores, min(k, scores.shape[-1]))[0][:, -1:]


def _entropy(log_p):
    return -jnp.where(jnp.isfinite(log_p), jnp.exp(log_p) * log_p, 0).sum(-1, keepdims=True)


def _atypical(scores, mass: float, keep: int):
    log_p = jax.nn.log_softmax(scores, -1)
    distance = jnp.abs(-log_p - _entropy(log_p))
    order = jnp.argsort(distance, -1)
    nearest = jnp.take_along_axis(distance, order, -1)
    p = jax.nn.softmax(jnp.take_along_axis(scores, order, -1), -1)
    last = (jnp.cumsum(p, -1) < mass).sum(-1, keepdims=True).clip(max=scores.shape[-1] - 1)
    far = nearest > jnp.take_along_axis(nearest, last, -1)
    return _unsorted(far.at[:, :keep].set(False), order)
