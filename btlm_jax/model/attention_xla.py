"""Attention as plain array operations: every platform, every mask, fp32 bias and softmax.

This is the reference of the fused kernels. Queries are processed in chunks, so that the largest
intermediate is [B, H, chunk, S] and never [B, H, T, S].
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from btlm_jax.model import alibi
from btlm_jax.model.einsum import einsum

QUERY_CHUNK = 512
# With n blocks of queries, (n + 1) / 2n of the keys are visited: 9/16 with 8. Every block is
# compiled separately, and below 128 rows the matrix products lose more than the skipped keys save.
_MAX_BLOCKS, _MIN_BLOCK_ROWS = 8, 128
_MASKED = jnp.finfo(jnp.float32).min  # finite, so that a row that sees no key is not NaN


def xla_attention(
    q_BHTK, k_BHSK, v_BHSK, *, slopes_H, segments, positions_T, precision
) -> jax.Array:
    """Computes causal attention; arguments as in `attention.attention`.

    Args:
      positions_T: int32, the slots of the queries. None means 0 to T - 1: because that is known at
        trace time, blocks of queries visit only the keys up to their own end. Otherwise all S keys
        are visited, and later ones are masked.
    """
    T, S = q_BHTK.shape[2], k_BHSK.shape[2]
    size, num_keys = T, S
    if positions_T is None:
        size = -(-T // (_MAX_BLOCKS * _MIN_BLOCK_ROWS)) * _MIN_BLOCK_ROWS
    segments_pair: Any = segments or (None, None)
    q_segments_BT, k_segments_BS = segments_pair
    blocks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        block_T = positions_T
        if positions_T is None:
            num_keys, block_T = end, jnp.arange(start, end, dtype=jnp.int32)
        attend_chunk = functools.partial(
            _attend_chunk,
            k_BHSK[:, :, :num_keys],
            v_BHSK[:, :, :num_keys],
            slopes_H,
            None if segments is None else k_segments_BS[:, :num_keys],
            precision,
        )
        # Rematerialized: the backward pass would otherwise keep the scores of every chunk.
        attend_chunk = jax.checkpoint(attend_chunk)
        ids_BT = None if segments is None else q_segments_BT[:, start:end]
        queries = q_BHTK[:, :, start:end], block_T, ids_BT
        if end - start <= QUERY_CHUNK:
            blocks.append(attend_chunk(queries))
        else:
            out = jax.lax.map(attend_chunk, split_queries(*queries))
            blocks.append(join_queries(out, end - start))
    return jnp.concatenate(blocks, axis=2)


def _attend_chunk(k_BHSK, v_BHSK, slopes_H, k_segments_BS, precision, queries) -> jax.Array:
    """Computes attention of one chunk of (queries, positions, segments)."""
    q_BHTK, positions_T, q_segments_BT = queries
    segments = None if q_segments_BT is None else (q_segments_BT, k_segments_BS)
    scores_BHTS = masked_scores(
        q_BHTK,
        k_BHSK,
        slopes_H=slopes_H,
        segments=segments,
        positions_T=positions_T,
        precision=precision,
    )
    p_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(v_BHSK.dtype)
    return einsum("bhts,bhsk->bhtk", p_BHTS, v_BHSK, precision).astype(q_BHTK.dtype)


def masked_scores(q_BHTK, k_BHSK, *, slopes_H, segments, positions_T, precision=None) -> jax.Array:
    """Computes attention logits, fp32 [B, H, T, S]; masked ones are the lowest fp32 number.

    Args:
      positions_T: int32, the slots of the queries; further arguments as in `attention.attention`.
    """
    key_S = jnp.arange(k_BHSK.shape[2], dtype=jnp.int32)
    scores_BHTS = einsum("bhtk,bhsk->bhts", q_BHTK, k_BHSK, precision)
    if slopes_H is not None:
        scores_BHTS = scores_BHTS + alibi.bias(slopes_H, positions_T, key_S)
    allowed = key_S[None, :] <= positions_T[:, None]  # [T, S], or [B, 1, T, S] with segments
    if segments is not None:
        q_segments_BT, k_segments_BS = segments
        allowed = allowed & (q_segments_BT[:, None, :, None] == k_segments_BS[:, None, None, :])
    return jnp.where(allowed, scores_BHTS, _MASKED)


def split_queries(q_BHTK: jax.Array, x_T: jax.Array, x_BT: jax.Array | None):
    """Splits queries, and arrays with one entry per query, into chunks for `jax.lax.map`.

    Returns:
      The arrays with a new first dimension: the number of chunks of at most `QUERY_CHUNK` queries.
      The last chunk is padded.
    """
    T, chunk = q_BHTK.shape[2], QUERY_CHUNK
    n = -(-T // chunk)

    def split(x, axis):
        pad_width = [(0, n * chunk - T if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, pad_width).reshape(*x.shape[:axis], n, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    return split(q_BHTK, 2), split(x_T, 0), None if x_BT is None else split(x_BT, 1)


def join_queries(x_NBHCK: jax.Array, T: int) -> jax.Array:
    """Joins N chunks of C results into [B, H, T, K], without those of the padding."""
    x_BHNCK = jnp.moveaxis(x_NBHCK, 0, 2)
    B, H, N, C, K = x_BHNCK.shape
    return x_BHNCK.reshape(B, H, N * C, K)[:, :, :T]
