"""Sampling: transformers' logits warpers on fp32 scores [R, V], and drawing from the result."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from btlm_jax.generation.options import GenerationOptions


def warp_scores(scores_RV: jax.Array, options: GenerationOptions, min_keep: int = 1) -> jax.Array:
    """Applies the options that need `do_sample`, in transformers' order.

    Args:
      scores_RV: fp32 scores.
      options: the generation options.
      min_keep: no rule leaves fewer tokens than this; beams need one that is not an EOS.

    Returns:
      The scores; those of removed tokens are -inf.
    """
    o, scores = options, scores_RV
    min_keep = min(min_keep, scores.shape[-1])
    if o.temperature != 1:
        scores = scores / o.temperature
    if o.top_k:
        scores = _remove(scores, scores < _kth_largest(scores, max(o.top_k, min_keep)))
    if o.top_p < 1:
        ascending = jnp.argsort(scores, -1)
        p = jax.nn.softmax(jnp.take_along_axis(scores, ascending, -1), -1)
        unlikely = jnp.cumsum(p, -1) <= 1 - o.top_p
        scores = _remove(scores, _unsort(unlikely.at[:, -min_keep:].set(False), ascending))
    if o.min_p is not None:
        p = jax.nn.softmax(scores, -1)
        unlikely = p < o.min_p * p.max(-1, keepdims=True)
        best = jax.lax.top_k(p, min_keep)[1]
        scores = _remove(scores, unlikely.at[_row_index(scores), best].set(False))
    if o.typical_p < 1:
        scores = _remove(scores, _is_atypical(scores, o.typical_p, min_keep))
    if o.epsilon_cutoff > 0:
        p = jax.nn.softmax(scores, -1)
        unlikely = p < o.epsilon_cutoff
        scores = _remove(scores, unlikely & (scores < _kth_largest(scores, min_keep)))
    if o.eta_cutoff > 0:
        p = jax.nn.softmax(scores, -1)
        eta = jnp.float32(o.eta_cutoff)
        eta = jnp.minimum(eta, jnp.sqrt(eta) * jnp.exp(-_entropy(jax.nn.log_softmax(scores, -1))))
        scores = _remove(scores, (p < eta) & (scores < _kth_largest(scores, min_keep)))
    return scores


def draw_tokens(scores_RV: jax.Array, keys_R: jax.Array, count: int) -> jax.Array:
    """Draws `count` indices per row from softmax(scores), without replacement.

    Uses the Gumbel-top-k trick (arXiv 1903.06059).

    Args:
      scores_RV: fp32 scores.
      keys_R: one random key per row, so that a row's draws do not depend on the batch.
      count: number of draws.

    Returns:
      int32 [R, count], in the order of the draws.
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scores_RV.shape[1:]))(keys_R)
    return jax.lax.top_k(scores_RV + noise, count)[1]


def _remove(scores, is_removed):
    return jnp.where(is_removed, -jnp.inf, scores)


def _row_index(scores):
    return jnp.arange(scores.shape[0])[:, None]


def _unsort(sorted_RV, order_RV):
    return jnp.zeros_like(sorted_RV).at[_row_index(sorted_RV), order_RV].set(sorted_RV)


def _kth_largest(scores, k: int):
    return jax.lax.top_k(scores, min(k, scores.shape[-1]))[0][:, -1:]


def _entropy(log_p):
    return -jnp.where(jnp.isfinite(log_p), jnp.exp(log_p) * log_p, 0).sum(-1, keepdims=True)


def _is_atypical(scores, mass: float, min_keep: int):
    log_p = jax.nn.log_softmax(scores, -1)
    distance = jnp.abs(-log_p - _entropy(log_p))
    order = jnp.argsort(distance, -1)
    ascending = jnp.take_along_axis(distance, order, -1)
    p = jax.nn.softmax(jnp.take_along_axis(scores, order, -1), -1)
    last = (jnp.cumsum(p, -1) < mass).sum(-1, keepdims=True).clip(max=scores.shape[-1] - 1)
    is_far = ascending > jnp.take_along_axis(ascending, last, -1)
    return _unsort(is_far.at[:, :min_keep].set(False), order)
