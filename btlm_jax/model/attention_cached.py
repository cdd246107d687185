"""Attention of new tokens over a KV cache: the ring of each row, and the prefix that rows share.

Shapes: R rows, S slots, H heads, K head_dim, T new tokens; a prefix has B rows of P slots. Where n
appears, it is R for own slots and B for those of a prefix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from btlm_jax.model import attention_xla, sharding
from btlm_jax.model.attention_context import AttentionContext
from btlm_jax.model.einsum import einsum
from btlm_jax.model.kv_cache import CacheSlots, LayerCache, LayerKV

_MASKED = np.finfo(np.float32).min  # finite, so that a row that sees no key is not NaN


def cached_attention(
    q_RHTK: jax.Array,
    k_RHTK: jax.Array,
    v_RHTK: jax.Array,
    kv: LayerCache,
    context: AttentionContext,
    *,
    precision: jax.lax.Precision | None = None,
    shard: PartitionSpec | None = None,
) -> tuple[jax.Array, LayerKV]:
    """Writes new keys and values to the cache, and attends from the new queries to all of it.

    softmax(q·k - slope * distance, causal and within segments) @ v, over prefix and own slots.

    Args:
      q_RHTK: the new queries, scaled.
      k_RHTK, v_RHTK: the new keys and values, for the slots from the cursor on.
      kv: one layer of the cache and of its prefix.
      context: inputs shared by all layers, with `slots`.
      precision: of the matrix products.
      shard: on a mesh, the mesh axes of rows and heads (further entries are ignored).

    Returns:
      [R, H, T, K] in the dtype of q, and the layer with the new tokens.
    """
    on_cpu = sharding.mesh_platform(jax.sharding.get_abstract_mesh()) == "cpu"
    product = functools.partial(_cache_einsum, precision=precision, on_cpu=on_cpu)
    local = functools.partial(_write_and_attend, product)
    arrays = q_RHTK, k_RHTK, v_RHTK, kv, context
    if shard is None:
        return local(*arrays)
    row_axes, head_axes = shard[:2]
    context_specs = jax.tree.map(lambda x: PartitionSpec(*(row_axes,)[: x.ndim]), context)
    if context.slopes is not None:
        slopes_spec = PartitionSpec(*(row_axes, head_axes)[-context.slopes.ndim :])
        context_specs = context_specs._replace(slopes=slopes_spec)
    split = PartitionSpec(row_axes, head_axes)
    specs = (*jax.tree.map(lambda _: split, arrays[:-1]), context_specs)
    return jax.shard_map(local, in_specs=specs, out_specs=(split, specs[3][0]))(*arrays)


def _write_and_attend(
    product: Callable[..., jax.Array], q_RHTK, k_RHTK, v_RHTK, kv: LayerCache, context
) -> tuple[jax.Array, LayerKV]:
    """Computes `cached_attention` for the rows and heads of one device."""
    slots, (layer, prefix) = context.slots, kv
    layer = layer.written(k_RHTK, v_RHTK, slots.cursor)

    def attend_chunk(chunk):
        q_RHTK, index_T, ids_RT = chunk
        spans = _key_spans(len(q_RHTK), index_T, layer, prefix, slots)
        scores = [_span_scores(q_RHTK, ids_RT, span, context.slopes, product) for span in spans]
        p_RHTS = jax.nn.softmax(jnp.concatenate(scores, -1), -1)
        return _weighted_values(p_RHTS, q_RHTK.dtype, spans, product)

    T = q_RHTK.shape[2]
    queries = q_RHTK, jnp.arange(T, dtype=jnp.int32), context.segments
    if T <= attention_xla.QUERY_CHUNK:
        return attend_chunk(queries), layer
    out = jax.lax.map(attend_chunk, attention_xla.split_queries(*queries))
    return attention_xla.join_queries(out, T), layer


class _KeySpan(NamedTuple):
    """Consecutive keys that new tokens attend to: those of the prefix, or of the rows themselves.

    Attributes:
      kv: n rows of S slots, where n divides R.
      distance: int32 [R or 1, T, S], from every new token back to every slot.
      valid: bool, [R or 1, T or 1, S], whether a slot holds an earlier token of the row.
      ids: int32 [n, S], segments.
    """

    kv: LayerKV
    distance: jax.Array
    valid: jax.Array
    ids: jax.Array


def _key_spans(
    R: int, index_T: jax.Array, layer: LayerKV, prefix: LayerKV | None, slots: CacheSlots
) -> list[_KeySpan]:
    """Returns the prefix, if any, and the own slots of R rows, as new tokens `index_T` see them."""
    slot_1S = _slot_indices(layer)
    distance_1TS = jnp.mod(slots.cursor + index_T[:, None] - slot_1S, layer.num_slots)[None]
    # The number of a row's own tokens before each new one.
    older_RT1 = slots.length[:, None, None] + index_T[:, None]
    spans = [_KeySpan(layer, distance_1TS, distance_1TS <= older_RT1, slots.ids)]
    if prefix is not None:
        assert slots.prefix_length is not None and slots.prefix_ids is not None
        slot_1S, end_R11 = (
            _slot_indices(prefix),
            _repeat_rows(slots.prefix_length, R)[:, None, None],
        )
        distance_RTS = end_R11 + older_RT1 - slot_1S
        spans.insert(0, _KeySpan(prefix, distance_RTS, slot_1S < end_R11, slots.prefix_ids))
    return spans


def _span_scores(
    q_RHTK, ids_RT, span: _KeySpan, slopes: jax.Array | None, product: Callable[..., jax.Array]
) -> jax.Array:
    """Computes masked scores of queries and the keys of one span, fp32 [R, H, T, S]."""
    R, H = q_RHTK.shape[:2]
    keys, n = span.kv.keys, len(span.ids)
    scores_nHTS = product("bhtk,bhsk->bhts", _merge_rows(q_RHTK, n), keys.data)
    if keys.scales is not None:
        scores_nHTS = scores_nHTS * keys.scales[:, :, None]
    scores_RHTS = _split_rows(scores_nHTS, R)
    allowed_RTS = span.valid & (ids_RT[:, :, None] == _repeat_rows(span.ids, R)[:, None])
    if slopes is not None:
        slopes_RH11 = jnp.broadcast_to(slopes, (R, H))[:, :, None, None]
        scores_RHTS = scores_RHTS - slopes_RH11 * span.distance[:, None].astype(jnp.float32)
    return jnp.where(allowed_RTS[:, None], scores_RHTS, _MASKED)


def _weighted_values(
    p_RHTS, dtype, spans: list[_KeySpan], product: Callable[..., jax.Array]
) -> jax.Array:
    """Sums the values of all spans, weighted by the probabilities of their concatenated keys."""
    R = p_RHTS.shape[0]
    out_RHTK: Any = 0.0
    for span in spans:
        values, S = span.kv.values, span.kv.num_slots
        p_nHTS, p_RHTS = _merge_rows(p_RHTS[..., :S], len(span.ids)), p_RHTS[..., S:]
        if values.scales is not None:
            p_nHTS = p_nHTS * values.scales[:, :, None]
        out_nHTK = product("bhts,bhsk->bhtk", p_nHTS.astype(dtype), values.data)
        out_RHTK = out_RHTK + _split_rows(out_nHTK, R)
    return out_RHTK.astype(dtype)


def _slot_indices(layer: LayerKV) -> jax.Array:
    """Returns 0 to S - 1, int32 [1, S]."""
    return jnp.arange(layer.num_slots, dtype=jnp.int32)[None]


def _repeat_rows(x: jax.Array, rows: int) -> jax.Array:
    """Repeats each row of a prefix for the neighboring rows that continue it."""
    return jnp.repeat(x, rows // len(x), 0)


def _merge_rows(x: jax.Array, rows: int) -> jax.Array:
    """Reshapes [R, H, T, ...] to [rows, H, R / rows * T, ...]: neighbors share a read of keys."""
    if len(x) == rows:
        return x
    x = x.reshape(rows, -1, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _split_rows(x: jax.Array, rows: int) -> jax.Array:
    """Inverts `_merge_rows`."""
    if len(x) == rows:
        return x
    x = x.reshape(*x.shape[:2], rows // len(x), -1, x.shape[-1]).swapaxes(1, 2)
    return x.reshape(rows, *x.shape[2:])


def _cache_einsum(equation, x, stored, *, precision, on_cpu) -> jax.Array:
    """Computes the einsum of x and stored keys or values, fp32; int8 becomes the dtype of x."""
    # For one row XLA's CPU backend would copy the cache in fp32.
    duplicate = on_cpu and x.shape[2] == 1 and x.dtype != jnp.float32
    if duplicate:
        x = jnp.concatenate([x, x], 2)
    out = einsum(equation, x, stored, precision)
    return out[:, :, :1] if duplicate else out
