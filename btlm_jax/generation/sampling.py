"""Sampling: transformers' logits warpers on fp32 scores [R, V], and drawing from the result."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from btlm_jax.generation.row_options import RowOptions, Sampling


def warp_scores(
    scores_RV: jax.Array, options: RowOptions, candidates: int, min_keep: int = 1
) -> jax.Array:
    """Applies the options that need `do_sample`, in transformers' order.

    Args:
      scores_RV: fp32 scores.
      options: the options of the rows. Rows that do not sample keep their scores.
      candidates: number of most likely tokens among which top_k and top_p select
        (`row_options.RuleSizes`); 0 if no row has them.
      min_keep: no rule leaves fewer tokens than this; beams need one that is not an EOS.

    Returns:
      The scores; those of removed tokens are -inf.
    """
    o, scores = options, scores_RV
    if o.sampling is None:
        return scores
    min_keep = min(min_keep, scores.shape[-1])
    scores = scores / o.sampling.temperature[:, None]
    if candidates:
        scores = _remove(scores, _is_below_top(scores, o.sampling, candidates, min_keep))
    if o.cutoffs is not None:
        p = jax.nn.softmax(scores, -1)
        unlikely = p < o.cutoffs.min_p[:, None] * p.max(-1, keepdims=True)
        best = jax.lax.top_k(p, min_keep)[1]
        scores = _remove(scores, unlikely.at[_row_index(scores), best].set(False))
    if o.typical_p is not None:
        scores = _remove(scores, _is_atypical(scores, o.typical_p[:, None], min_keep))
    if o.cutoffs is not None:
        p = jax.nn.softmax(scores, -1)
        unlikely = p < o.cutoffs.epsilon[:, None]
        scores = _remove(scores, unlikely & (scores < _kth_largest(scores, min_keep)))
        p, eta = jax.nn.softmax(scores, -1), o.cutoffs.eta[:, None]
        eta = jnp.minimum(eta, jnp.sqrt(eta) * jnp.exp(-_entropy(jax.nn.log_softmax(scores, -1))))
        scores = _remove(scores, (p < eta) & (scores < _kth_largest(scores, min_keep)))
    return scores


def draw_tokens(
    scores_RV: jax.Array, keys_R: jax.Array, count: int, do_sample_R: ArrayLike = True
) -> jax.Array:
    """Draws `count` indices per row from softmax(scores), without replacement.

    Uses the Gumbel-top-k trick (arXiv 1903.06059).

    Args:
      scores_RV: fp32 scores.
      keys_R: one random key per row, so that a row's draws do not depend on the batch.
      count: number of draws.
      do_sample_R: bool; the other rows take the highest scores, of equal ones the lowest indices.

    Returns:
      int32 [R, count], in the order of the draws.
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scores_RV.shape[1:]))(keys_R)
    noise = jnp.where(jnp.asarray(do_sample_R)[..., None], noise, 0.0)
    return jax.lax.top_k(scores_RV + noise, count)[1]


def _is_below_top(scores, sampling: Sampling, candidates: int, min_keep: int):
    """Returns which tokens top_k and then top_p remove, bool [R, V]."""
    V = scores.shape[-1]
    n = min(candidates, V)
    # Reversed, so that of equal scores top_p removes those of lower indices first, as torch does.
    descending, reversed_index = jax.lax.top_k(scores[:, ::-1], n)
    ascending, index = descending[:, ::-1], V - 1 - reversed_index[:, ::-1]
    kth = n - jnp.clip(sampling.top_k, min_keep, n)[:, None]
    kth_score = jnp.take_along_axis(ascending, kth, -1)
    has_top_k = (sampling.top_k < V)[:, None]
    p = jax.nn.softmax(_remove(ascending, has_top_k & (ascending < kth_score)), -1)
    is_tail = (jnp.cumsum(p, -1) <= sampling.tail[:, None]).at[:, -min_keep:].set(False)
    is_below_p = jnp.zeros(scores.shape, bool).at[_row_index(scores), index].set(is_tail)
    return has_top_k & (scores < kth_score) | is_below_p


def _remove(scores, is_removed):
    return jnp.where(is_removed, -jnp.inf, scores)


def _row_index(scores):
    return jnp.arange(scores.shape[0])[:, None]


def _unsort(sorted_RV, order_RV):
    return jnp.zeros_like(sorted_RV).at[_row_index(sorted_RV), order_RV].set(sorted_RV)


def _kth_largest(scores, k: int):
    return jax.lax.top_k(scores, k)[0][:, -1:]


def _entropy(log_p):
    return -jnp.where(jnp.isfinite(log_p), jnp.exp(log_p) * log_p, 0).sum(-1, keepdims=True)


def _is_atypical(scores, mass_R1, min_keep: int):
    log_p = jax.nn.log_softmax(scores, -1)
    distance = jnp.abs(-log_p - _entropy(log_p))
    order = jnp.argsort(distance, -1)
    ascending = jnp.take_along_axis(distance, order, -1)
    p = jax.nn.softmax(jnp.take_along_axis(scores, order, -1), -1)
    last = (jnp.cumsum(p, -1) < mass_R1).sum(-1, keepdims=True).clip(max=scores.shape[-1] - 1)
    is_far = ascending > jnp.take_along_axis(ascending, last, -1)
    return _unsort(is_far.at[:, :min_keep].set(False), order)
