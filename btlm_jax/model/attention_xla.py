"""Attention as plain array operations: every platform, every mask, fp32 bias and softmax.

The reference of the fused kernels. Queries are processed in chunks, so that the largest
intermediate is [B, H, chunk, S] and never [B, H, T, S].
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from btlm_jax.model import alibi
from btlm_jax.model.einsum import einsum

QUERY_CHUNK = 512
# Of n equal stripes, (n + 1) / 2n of the keys are visited: 9/16 with 8. Each is compiled of its
# own, and below 128 rows the matrix products lose more than the skipped keys save.
_STRIPES, _STRIPE_ROWS = 8, 128
_MASKED = jnp.finfo(jnp.float32).min  # finite, so that a row with no key at all is not NaN


def xla_attention(q, k, v, *, slopes, segments, positions, precision) -> jax.Array:
    """Causal attention; arguments as in `attention.attention`.

    Args:
      positions: int32 [T], the slots of the queries. None is 0 to T - 1, known while tracing: then
        stripes of queries visit the keys up to their own end only. Otherwise all S keys are
        visited, and those to come are masked.
    """
    chunked = functools.partial(_chunked, slopes=slopes, precision=precision)
    T = q.shape[2]
    if positions is not None:
        return chunked(q, k, v, segments, positions)
    size = -(-T // (_STRIPES * _STRIPE_ROWS)) * _STRIPE_ROWS
    stripes = []
    for start in range(0, T, size):
        end = min(start + size, T)
        within = segments and (segments[0][:, start:end], segments[1][:, :end])
        at = jnp.arange(start, end, dtype=jnp.int32)
        stripes.append(chunked(q[:, :, start:end], k[:, :, :end], v[:, :, :end], within, at))
    return jnp.concatenate(stripes, axis=2)


def _chunked(q, k, v, segments, positions, *, slopes, precision):
    of_query, of_key = segments or (None, None)

    # Rematerialized, or the backward pass would keep the scores of every chunk and layer.
    @jax.checkpoint
    def attended(q, positions, of_query):
        within = None if of_query is None else (of_query, of_key)
        p = attention_probabilities(
            q, k, slopes=slopes, segments=within, positions=positions, precision=precision
        )
        return einsum("bhts,bhsk->bhtk", p.astype(v.dtype), v, precision).astype(q.dtype)

    return over_queries(attended, q, positions, of_query)


def over_queries(
    attend: Callable[..., jax.Array], q: jax.Array, of_T: jax.Array, of_BT: jax.Array | None
) -> jax.Array:
    """attend(q, of_T, of_BT), `QUERY_CHUNK` queries at a time.

    Args:
      attend: from arguments with t queries to [B, H, t, K].
      q: [B, H, T, K].
      of_T, of_BT: what else is of queries, [T] and [B, T].
    """
    T, chunk = q.shape[2], QUERY_CHUNK
    n = -(-T // chunk)
    if n == 1:
        return attend(q, of_T, of_BT)

    def chunks(x, axis):  # a remainder is filled up with rows that are dropped again
        pad = [(0, n * chunk - T if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, pad).reshape(*x.shape[:axis], n, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    xs = chunks(q, 2), chunks(of_T, 0), None if of_BT is None else chunks(of_BT, 1)
    out = jax.lax.map(lambda x: attend(*x), xs)
    return jnp.moveaxis(out, 0, 2).reshape(*q.shape[:2], n * chunk, out.shape[-1])[:, :, :T]


def attention_probabilities(q, k, *, slopes, segments, positions, precision=None) -> jax.Array:
    """The attention probabilities of the queries at `positions` [T], fp32 [B, H, T, S].

    Other arguments as in `attention.attention`.
    """
    key = jnp.arange(k.shape[2], dtype=jnp.int32)
    scores = einsum("bhtk,bhsk->bhts", q, k, precision)
    if slopes is not None:
        scores = scores + alibi.bias(slopes, positions, key)
    allowed = key[None, :] <= positions[:, None]
    if segments is not None:
        of_query, of_key = segments
        allowed = allowed & (of_query[:, None, :, None] == of_key[:, None, None, :])
    return jax.nn.softmax(jnp.where(allowed, scores, _MASKED), axis=-1)
