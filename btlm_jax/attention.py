"""Causal ALiBi attention.

`"xla"` is the reference: every platform, every mask, fp32 bias and softmax. Queries are processed
in chunks, so that the largest intermediate is [B, H, chunk, S] and never [B, H, T, S]. A forward
pass without a cache cuts the queries into stripes that visit the keys up to their own end only;
with a cache, all S keys are visited and those to come are masked.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from btlm_jax import alibi
from btlm_jax.products import einsum

Implementation = Literal["xla"]
QUERY_CHUNK = 512
# Of n equal stripes, (n + 1) / 2n of the keys are visited: 9/16 with 8. Each is compiled of its
# own, and below 128 rows the matrix products lose more than the skipped keys save.
_STRIPES, _STRIPE_ROWS = 8, 128
_MASKED = jnp.finfo(jnp.float32).min  # finite, so that a row with no key at all is not NaN


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    slopes: jax.Array | None,
    scale: float,
    segments: tuple[jax.Array, jax.Array] | None = None,
    offset: int | jax.Array = 0,
    implementation: Implementation | None = None,
    precision: jax.lax.Precision | None = None,
    shard: PartitionSpec | None = None,
) -> jax.Array:
    """softmax(scale * q·k - slope * distance, causal and within segments) @ v.

    Args:
      q: [B, H, T, K].
      k, v: [B, H, S, K].
      slopes: fp32 [H], divided by the ALiBi scale; None without ALiBi.
      scale: the factor on q·k.
      segments: int32 ids of queries [B, T] and keys [B, S]; attention stays within equal ids.
      offset: the slot of the first query; keys occupy slots 0 to S - 1.
      implementation: "xla"; None takes the best for the platform (today always "xla").
      precision: of both matrix products.
      shard: on a mesh, the mesh axes of batch, heads and sequence. Attention runs per shard:
        without communication along batch and heads, with the keys and values of the whole sequence
        gathered where it is split. `offset` is that of the first shard.

    Returns:
      [B, H, T, K] in q's dtype.

    Raises:
      ValueError: unknown implementation.
    """
    if implementation not in (None, "xla"):
        raise ValueError(f"implementation: found {implementation!r}, expected 'xla' or None")
    fn = functools.partial(_xla, scale=scale, precision=precision)
    # None is 0, known while tracing: then the keys to come need not be visited.
    first = None if isinstance(offset, int) and offset == 0 else jnp.asarray(offset, jnp.int32)
    if shard is None:
        return fn(q, k, v, slopes, segments, first)
    batch, heads, sequence = shard
    bhtk, bt = PartitionSpec(batch, heads, sequence, None), PartitionSpec(batch, sequence)

    def local(q, k, v, slopes, segments, first):
        if sequence is not None and jax.lax.axis_size(sequence) > 1:
            # Causal, so that half of the work is masked; the gradients of k and v are scattered
            # back by the transpose of the gather.
            k, v = (jax.lax.all_gather(x, sequence, axis=2, tiled=True) for x in (k, v))
            first = (0 if first is None else first) + jax.lax.axis_index(sequence) * q.shape[2]
            if segments is not None:
                of_key = jax.lax.all_gather(segments[1], sequence, axis=1, tiled=True)
                segments = segments[0], of_key
        return fn(q, k, v, slopes, segments, first)

    return jax.shard_map(
        local,
        in_specs=(
            bhtk,
            bhtk,
            bhtk,
            PartitionSpec(heads) if slopes is not None else None,
            (bt, bt) if segments is not None else None,
            PartitionSpec() if first is not None else None,
        ),
        out_specs=bhtk,
    )(q, k, v, slopes, segments, first)


def _xla(q, k, v, slopes, segments, offset, *, scale, precision):
    """Attention with the first query at slot `offset`; None is 0, known while tracing."""
    chunked = functools.partial(_chunked, slopes=slopes, scale=scale, precision=precision)
    T = q.shape[2]
    if offset is not None:
        return chunked(q, k, v, segments, offset)
    size = -(-T // (_STRIPES * _STRIPE_ROWS)) * _STRIPE_ROWS
    stripes = []
    for start in range(0, T, size):
        end = min(start + size, T)
        within = segments and (segments[0][:, start:end], segments[1][:, :end])
        rows, seen = slice(start, end), slice(end)
        stripes.append(chunked(q[:, :, rows], k[:, :, seen], v[:, :, seen], within, start))
    return jnp.concatenate(stripes, axis=2)


def _chunked(q, k, v, segments, offset, *, slopes, scale, precision):
    T, chunk = q.shape[2], QUERY_CHUNK
    rows = functools.partial(
        _rows, k=k, v=v, slopes=slopes, scale=scale, precision=precision, segments=segments
    )
    # Rematerialised, or the backward pass would keep the scores of every chunk and layer.
    rows = jax.checkpoint(rows)
    n = -(-T // chunk)
    if n == 1:
        return rows(q, offset, 0)
    # A remainder chunk is padded with query rows that are dropped again.
    q = jnp.pad(q, ((0, 0), (0, 0), (0, n * chunk - T), (0, 0)))
    q_chunks = jnp.moveaxis(q.reshape(*q.shape[:2], n, chunk, q.shape[3]), 2, 0)
    starts = jnp.arange(n, dtype=jnp.int32) * chunk
    out = jax.lax.map(lambda x: rows(x[0], offset, x[1]), (q_chunks, starts))
    return jnp.moveaxis(out, 0, 2).reshape(q.shape)[:, :, :T]


def _rows(q, offset, start, *, k, v, slopes, scale, precision, segments):
    """Attention of the queries [B, H, C, K] at rows start to start + C - 1."""
    p = probabilities(
        q,
        k,
        slopes=slopes,
        scale=scale,
        segments=segments,
        offset=offset,
        start=start,
        precision=precision,
    )
    return einsum("bhts,bhsk->bhtk", p.astype(v.dtype), v, precision).astype(q.dtype)


def probabilities(q, k, *, slopes, scale, segments, offset, start=0, precision=None) -> jax.Array:
    """The attention probabilities of rows start to start + C - 1, fp32 [B, H, C, S].

    Arguments as in `attention`, with q holding those C rows only.
    """
    query = offset + start + jnp.arange(q.shape[2], dtype=jnp.int32)
    key = jnp.arange(k.shape[2], dtype=jnp.int32)
    scores = scale * einsum("bhtk,bhsk->bhts", q, k, precision)
    if slopes is not None:
        scores = scores + alibi.bias(slopes, query, key)
    allowed = key[None, :] <= query[:, None]
    if segments is not None:
        of_query, of_key = segments
        if q.shape[2] != of_query.shape[1]:
            # Padded query rows read past the end: any segment will do, they are dropped.
            index = jnp.minimum(start + jnp.arange(q.shape[2]), of_query.shape[1] - 1)
            of_query = jnp.take(of_query, index, axis=1)
        allowed = allowed & (of_query[:, None, :, None] == of_key[:, None, None, :])
    return jax.nn.softmax(jnp.where(allowed, scores, _MASKED), axis=-1)
