"""The KV cache of decoding, and attention over it.

Shapes: R rows, S slots, H heads, K head_dim, T new tokens; a prefix has B rows of P slots. Every
layer has its own arrays, which a step of decoding updates in place: one slot in each. Reading them
is, beside the weights, all the work of the step.

The slots form a ring: all rows write to the same slot, so that the update is one in-place copy, and
each row knows how many slots before it hold its own tokens. ALiBi depends on distances only, and
these are the same in all rows. So one row can restart while the others continue.

A cache may continue another one, its `prefix`: the rows of a beam search share the keys and values
of their prompt and hold only their own continuations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from btlm_jax.model.attention_xla import map_query_chunks
from btlm_jax.model.einsum import einsum
from btlm_jax.utils.dtypes import FLOATS

CACHE_DTYPES = ("int8", *FLOATS)
_MASKED = np.finfo(np.float32).min  # finite, so that a row that sees no key is not NaN


class KVArray(NamedTuple):
    """The keys, or the values, of one layer.

    Attributes:
      data: [R, H, S, K], floats or int8.
      scales: fp32 [R, H, S], one per slot and head, if the data are int8; else None.
    """

    data: jax.Array
    scales: jax.Array | None

    @classmethod
    def from_floats(cls, x_RHTK: jax.Array, dtype: Any) -> KVArray:
        """Converts keys or values to the dtype of a cache, quantizing them if it is int8."""
        if dtype != jnp.int8:
            return cls(x_RHTK.astype(dtype), None)
        x_RHTK = x_RHTK.astype(jnp.float32)
        scales_RHT = jnp.maximum(jnp.abs(x_RHTK).max(-1), 1e-30) / 127
        return cls(jnp.round(x_RHTK / scales_RHT[..., None]).astype(jnp.int8), scales_RHT)


class LayerKV(NamedTuple):
    """The keys and values of one layer."""

    keys: KVArray
    values: KVArray

    @property
    def num_slots(self) -> int:
        """S."""
        return self.keys.data.shape[2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far; an argument and a result of `BTLM.apply`.

    Attributes:
      layers: one entry per layer, of S slots.
      segment_ids: int32 [R, S]; 0 is padding.
      segment: int32 [R], the segment of the last token.
      length: int32 [R], how many slots before `cursor` belong to each row.
      cursor: int32, the slot that is written next; it keeps counting past the end of the ring.
      prefix: the cache this one continues, without a prefix of its own. Each of its B rows is
        continued by R / B neighboring rows.
      fresh: whether it is known to be empty at trace time, so that fused kernels can read a prompt.
    """

    layers: tuple[LayerKV, ...]
    segment_ids: jax.Array
    segment: jax.Array
    length: jax.Array
    cursor: jax.Array
    prefix: KVCache | None = None
    fresh: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @property
    def capacity(self) -> int:
        """S, the number of slots, without those of the prefix."""
        return self.segment_ids.shape[1]

    @property
    def rows(self) -> int:
        """R."""
        return self.segment_ids.shape[0]

    @property
    def dtype(self) -> Any:
        """The dtype of keys and values."""
        return self.layers[0].keys.data.dtype

    @property
    def end(self) -> jax.Array:
        """The position of each row's next token, int32 [R], with the tokens of the prefix."""
        if self.prefix is None:
            return self.length
        return self.length + jnp.repeat(self.prefix.length, self.rows // self.prefix.rows)

    @property
    def nbytes(self) -> int:
        """The size of keys and values in bytes, with those of the prefix."""
        nbytes = sum(x.nbytes for x in jax.tree.leaves(self.layers))
        return nbytes + (0 if self.prefix is None else self.prefix.nbytes)


class CacheContext(NamedTuple):
    """Inputs shared by all layers in one step of decoding.

    Attributes:
      slopes: fp32 [H], or [R, H] if they differ between rows, divided by the ALiBi scale; None
        without ALiBi.
      length: int32 [R], how many slots before the new tokens belong to each row.
      cursor: int32, the slot of the first new token, within the ring.
      new_ids: int32 [R, T], segments of the new tokens.
      ids: int32 [R, S], segments of all slots, including the new tokens.
      prefix_length: int32 [B], the filled slots of the prefix; None without one.
      prefix_ids: int32 [B, P], the segments of the prefix; None without one.
    """

    slopes: jax.Array | None
    length: jax.Array
    cursor: jax.Array
    new_ids: jax.Array
    ids: jax.Array
    prefix_length: jax.Array | None
    prefix_ids: jax.Array | None


# Whole caches -----------------------------------------------------------------------------------


def fork(cache: KVCache, copies: int, layers: tuple[LayerKV, ...], ids_RS: jax.Array) -> KVCache:
    """Returns an empty cache in which `copies` neighboring rows continue each row of `cache`.

    Args:
      cache: the prefix; it must not have a prefix itself.
      layers, ids_RS: empty, of R = copies * B rows, sharded like those of `cache`.
    """
    if cache.prefix is not None:
        raise ValueError("cache: found one with a prefix, expected one that a prompt filled")
    row_axes = jax.typeof(ids_RS).sharding.spec[0]
    spec = None if row_axes is None else PartitionSpec(row_axes)
    segment = jnp.broadcast_to(cache.segment[:, None], (cache.rows, copies))
    segment = jnp.reshape(segment, -1, out_sharding=spec)
    zero = jnp.zeros((), jnp.int32)
    return KVCache(layers, ids_RS, segment, jnp.zeros(len(ids_RS), jnp.int32), zero, cache)


@functools.partial(jax.jit, static_argnames="capacity")
def resized(cache: KVCache, capacity: int) -> KVCache:
    """Returns the cache with `capacity` slots, without counting those of a prefix.

    If the ring has wrapped around, it is unrolled so that the oldest slot comes first.
    """
    wrapped = cache.cursor > cache.capacity
    shift = jnp.where(wrapped, -cache.cursor % cache.capacity, 0)

    def grow(x, axis):
        return _pad_slots(jnp.roll(x, shift, axis), axis, capacity)

    layers = jax.tree.map(lambda x: grow(x, 2), cache.layers)
    ids, cursor = grow(cache.segment_ids, 1), jnp.where(wrapped, cache.capacity, cache.cursor)
    return dataclasses.replace(cache, layers=layers, segment_ids=ids, cursor=cursor)


def _pad_slots(x: jax.Array, axis: int, slots: int) -> jax.Array:
    """Pads `axis` with zeros to `slots`."""
    return jnp.pad(x, [(0, slots - n if i == axis else 0) for i, n in enumerate(x.shape)])


def reordered(cache: KVCache, parents_BN: jax.Array, shard: PartitionSpec | None) -> KVCache:
    """Returns the cache after a step of beam search; the prefix does not change.

    Args:
      parents_BN: int32 [B, R / B], which row of the same prompt each row continues.
      shard: on a mesh, the mesh axes of rows and heads (further entries are ignored).
    """
    state = cache.layers, cache.segment_ids, cache.segment

    def take_parents(state, parents):
        def take(x):
            by_prompt = x.reshape(*parents.shape, *x.shape[1:])
            return jax.vmap(lambda rows, index: rows[index])(by_prompt, parents).reshape(x.shape)

        return jax.tree.map(take, state)

    if shard is not None:

        def spec_of(x):  # [R, H, ...], or [R, S] and [R]
            return PartitionSpec(*shard[: 2 if x.ndim > 2 else 1])

        specs = jax.tree.map(spec_of, state)
        take_parents = jax.shard_map(
            take_parents, in_specs=(specs, PartitionSpec(shard[0])), out_specs=specs
        )
    layers, ids, segment = take_parents(state, parents_BN)
    return dataclasses.replace(cache, layers=layers, segment_ids=ids, segment=segment)


# One layer --------------------------------------------------------------------------------------


def filled_layer(empty: LayerKV, k_RHTK: jax.Array, v_RHTK: jax.Array) -> LayerKV:
    """Returns an empty layer with keys and values written from the first slot on."""

    def fill(array: KVArray, x_RHTK: jax.Array) -> KVArray:
        new = KVArray.from_floats(x_RHTK, array.data.dtype)
        return jax.tree.map(lambda x: _pad_slots(x, 2, empty.num_slots), new)

    return LayerKV(fill(empty.keys, k_RHTK), fill(empty.values, v_RHTK))


def cached_attention(
    q_RHTK: jax.Array,
    k_RHTK: jax.Array,
    v_RHTK: jax.Array,
    layer: LayerKV,
    prefix: LayerKV | None,
    context: CacheContext,
    *,
    precision: jax.lax.Precision | None,
    on_cpu: bool,
    shard: PartitionSpec | None,
) -> tuple[jax.Array, LayerKV]:
    """Writes new keys and values to the cache, and attends from the new queries to all of it.

    softmax(q·k - slope * distance, causal and within segments) @ v, over prefix and own slots.

    Args:
      q_RHTK: the new queries, scaled.
      k_RHTK, v_RHTK: the new keys and values, for the slots from `context.cursor` on.
      layer, prefix: one layer of the cache and of its prefix.
      context: inputs shared by all layers.
      precision: of the matrix products.
      on_cpu: whether to avoid what XLA's CPU backend is slow at.
      shard: on a mesh, the mesh axes of rows and heads (further entries are ignored).

    Returns:
      [R, H, T, K] in the dtype of q, and the layer with the new tokens.
    """

    def write_and_attend(q, k, v, layer, prefix, context):
        keys, values = layer
        layer = LayerKV(_write(keys, k, context.cursor), _write(values, v, context.cursor))
        return _attend_in_chunks(q, layer, prefix, context, precision, on_cpu), layer

    arrays = q_RHTK, k_RHTK, v_RHTK, layer, prefix, context
    if shard is None:
        return write_and_attend(*arrays)
    row_axes, head_axes = shard[:2]
    context_specs = jax.tree.map(lambda x: PartitionSpec(*(row_axes,)[: x.ndim]), context)
    if context.slopes is not None:
        slopes_spec = PartitionSpec(*(row_axes, head_axes)[-context.slopes.ndim :])
        context_specs = context_specs._replace(slopes=slopes_spec)
    split = PartitionSpec(row_axes, head_axes)
    specs = (*jax.tree.map(lambda _: split, arrays[:-1]), context_specs)
    return jax.shard_map(write_and_attend, in_specs=specs, out_specs=(specs[0], specs[3]))(*arrays)


def _write(array: KVArray, x_RHTK: jax.Array, slot: jax.Array) -> KVArray:
    """Writes new keys or values from `slot` on."""
    new = KVArray.from_floats(x_RHTK, array.data.dtype)
    update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=2)
    return jax.tree.map(lambda x, y: update(x, y, slot), array, new)


def _attend_in_chunks(
    q_RHTK, layer: LayerKV, prefix: LayerKV | None, context: CacheContext, precision, on_cpu
) -> jax.Array:
    """Attends from all new queries, in chunks of them."""
    product = functools.partial(_cache_einsum, precision=precision, on_cpu=on_cpu)

    def attend_chunk(q, index_T, ids_RT):
        spans = _key_spans(len(q), index_T, layer, prefix, context)
        scores = [_span_scores(q, ids_RT, span, context.slopes, product) for span in spans]
        p_RHTS = jax.nn.softmax(jnp.concatenate(scores, -1), -1)
        return _weighted_values(p_RHTS, q.dtype, spans, product)

    index_T = jnp.arange(q_RHTK.shape[2], dtype=jnp.int32)
    return map_query_chunks(attend_chunk, q_RHTK, index_T, context.new_ids)


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
    R: int, index_T: jax.Array, layer: LayerKV, prefix: LayerKV | None, context: CacheContext
) -> list[_KeySpan]:
    """Returns the prefix, if any, and the own slots of R rows, as new tokens `index_T` see them."""
    slots = _slot_indices(layer)
    distance = jnp.mod(context.cursor + index_T[:, None] - slots, layer.num_slots)[None]
    num_older = context.length[:, None, None] + index_T[:, None]  # own tokens before a new one
    spans = [_KeySpan(layer, distance, distance <= num_older, context.ids)]
    if prefix is not None:
        assert context.prefix_length is not None and context.prefix_ids is not None
        slots, end = _slot_indices(prefix), _repeat_rows(context.prefix_length, R)[:, None, None]
        distance = end + num_older - slots
        spans.insert(0, _KeySpan(prefix, distance, slots < end, context.prefix_ids))
    return spans


def _span_scores(
    q_RHTK, ids_RT, span: _KeySpan, slopes: jax.Array | None, product: Callable[..., jax.Array]
) -> jax.Array:
    """Computes masked scores of queries and the keys of one span, fp32 [R, H, T, S]."""
    R, H = q_RHTK.shape[:2]
    keys, n = span.kv.keys, len(span.ids)
    scores = product("bhtk,bhsk->bhts", _merge_rows(q_RHTK, n), keys.data)
    if keys.scales is not None:
        scores = scores * keys.scales[:, :, None]
    scores = _split_rows(scores, R)
    allowed = span.valid & (ids_RT[:, :, None] == _repeat_rows(span.ids, R)[:, None])
    if slopes is not None:
        slopes_RH = jnp.broadcast_to(slopes, (R, H))[:, :, None, None]
        scores = scores - slopes_RH * span.distance[:, None].astype(jnp.float32)
    return jnp.where(allowed[:, None], scores, _MASKED)


def _weighted_values(
    p_RHTS, dtype, spans: list[_KeySpan], product: Callable[..., jax.Array]
) -> jax.Array:
    """Sums the values of all spans, weighted by the probabilities of their concatenated keys."""
    R = p_RHTS.shape[0]
    out: Any = 0.0
    for span in spans:
        values, S = span.kv.values, span.kv.num_slots
        p, p_RHTS = _merge_rows(p_RHTS[..., :S], len(span.ids)), p_RHTS[..., S:]
        if values.scales is not None:
            p = p * values.scales[:, :, None]
        out = out + _split_rows(product("bhts,bhsk->bhtk", p.astype(dtype), values.data), R)
    return out.astype(dtype)


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
    out = einsum(equation, x, stored.astype(x.dtype), precision)
    return out[:, :, :1] if duplicate else out
