"""Attention as plain array operations: every platform, every mask, fp32 bias and softmax.

This is the reference of the fused kernels. Queries are processed in chunks, so that the largest
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
# With n blocks of queries, (n + 1) / 2n of the keys are visited: 9/16 with 8. Every block is
# compiled separately, and below 128 rows the matrix products lose more than the skipped keys save.
_MAX_BLOCKS, _MIN_BLOCK_ROWS = 8, 128
_MASKED = jnp.finfo(jnp.float32).min  # finite, so that a row that sees no key is not NaN


def xla_attention(q, k, v, *, slopes, segments, positions, precision) -> jax.Array:
    """Computes causal attention; arguments as in `attention.attention`.

    Args:
      positions: int32 [T], the slots of the queries. None means 0 to T - 1: because that is known
        at trace time, blocks of queries visit only the keys up to their own end. Otherwise all S
        keys are visited, and later ones are masked.
    """
    attend = functools.partial(_attend_in_chunks, slopes=slopes, precision=precision)
    T = q.shape[2]
    if positions is not None:
        return attend(q, k, v, segments, positions)
    size = -(-T // (_MAX_BLOCKS * _MIN_BLOCK_ROWS)) * _MIN_BLOCK_ROWS
    blocks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        block_segments = segments and (segments[0][:, start:end], segments[1][:, :end])
        block_positions = jnp.arange(start, end, dtype=jnp.int32)
        blocks.append(
            attend(
                q[:, :, start:end], k[:, :, :end], v[:, :, :end], block_segments, block_positions
            )
        )
    return jnp.concatenate(blocks, axis=2)


def _attend_in_chunks(q, k, v, segments, positions, *, slopes, precision):
    """Computes attention for one chunk of queries after another."""
    q_segments, k_segments = segments or (None, None)

    # Rematerialized: the backward pass would otherwise keep the scores of every chunk and layer.
    @jax.checkpoint
    def attend_chunk(q, positions, q_segments):
        chunk_segments = None if q_segments is None else (q_segments, k_segments)
        p_BHTS = attention_probabilities(
            q, k, slopes=slopes, segments=chunk_segments, positions=positions, precision=precision
        )
        return einsum("bhts,bhsk->bhtk", p_BHTS.astype(v.dtype), v, precision).astype(q.dtype)

    return map_query_chunks(attend_chunk, q, positions, q_segments)


def map_query_chunks(
    fn: Callable[..., jax.Array], q_BHTK: jax.Array, x_T: jax.Array, x_BT: jax.Array | None
) -> jax.Array:
    """Computes fn(q, x_T, x_BT) for `QUERY_CHUNK` queries at a time.

    Args:
      fn: maps arguments with a chunk of queries to [B, H, chunk, K].
      q_BHTK: the queries.
      x_T, x_BT: further arrays with one entry per query.
    """
    T, chunk = q_BHTK.shape[2], QUERY_CHUNK
    n = -(-T // chunk)
    if n == 1:
        return fn(q_BHTK, x_T, x_BT)

    def split(x, axis):  # the last chunk is padded, and the results of the padding are dropped
        pad_width = [(0, n * chunk - T if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, pad_width).reshape(*x.shape[:axis], n, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    xs = split(q_BHTK, 2), split(x_T, 0), None if x_BT is None else split(x_BT, 1)
    out = jax.lax.map(lambda x: fn(*x), xs)
    B, H = q_BHTK.shape[:2]
    return jnp.moveaxis(out, 0, 2).reshape(B, H, n * chunk, out.shape[-1])[:, :, :T]


def attention_probabilities(q, k, *, slopes, segments, positions, precision=None) -> jax.Array:
    """Computes attention probabilities, fp32 [B, H, T, S].

    Args:
      positions: int32 [T], the slots of the queries; further arguments as in `attention.attention`.
    """
    key_S = jnp.arange(k.shape[2], dtype=jnp.int32)
    scores = einsum("bhtk,bhsk->bhts", q, k, precision)
    if slopes is not None:
        scores = scores + alibi.bias(slopes, positions, key_S)
    allowed = key_S[None, :] <= positions[:, None]
    if segments is not None:
        q_segments, k_segments = segments
        allowed = allowed & (q_segments[:, None, :, None] == k_segments[:, None, None, :])
    return jax.nn.softmax(jnp.where(allowed, scores, _MASKED), axis=-1)
