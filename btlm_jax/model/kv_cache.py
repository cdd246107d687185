"""The KV cache of decoding, and attention over it.

Shapes: R rows, S slots, H heads, K head_dim, T new tokens. Every layer has arrays of its own, which
a step of decoding writes in place: one slot in each. Reading the rest is, beside the weights, all
the step has to do.

The slots are a ring: all rows write to the same one, so that this is one copy in place, and each
row knows how many before it are its own. For ALiBi only distances count, and these are the same in
all rows. So a row can begin anew while others go on.

A cache may continue another, its `prefix`: the rows of a beam search share their prompt's keys and
values and hold only their own continuation.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from btlm_jax.model.attention_xla import over_queries
from btlm_jax.model.einsum import einsum

_MASKED = np.finfo(np.float32).min  # finite, so that a row with no key at all is not NaN


class KVArray(NamedTuple):
    """The keys, or the values, of one layer.

    Attributes:
      data: [R, H, S, K], floats or int8.
      scales: with int8, fp32 [R, H, S], one for every slot.
    """

    data: jax.Array
    scales: jax.Array | None

    @classmethod
    def from_floats(cls, x: jax.Array, dtype: Any) -> KVArray:
        """Keys or values [R, H, T, K] as they are stored."""
        if dtype != jnp.int8:
            return cls(x.astype(dtype), None)
        x = x.astype(jnp.float32)
        scales = jnp.maximum(jnp.abs(x).max(-1), 1e-30) / 127
        return cls(jnp.round(x / scales[..., None]).astype(jnp.int8), scales)


class LayerKV(NamedTuple):
    """Keys and values of one layer."""

    keys: KVArray
    values: KVArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far; an argument and a result of `BTLM.apply`.

    Attributes:
      layers: of every layer, S slots.
      segment_ids: int32 [R, S]; 0 is padding.
      segment: int32 [R], of the last token.
      length: int32 [R], how many slots before `cursor` are a row's own.
      cursor: int32, the slot that is written next, counted on past the end of the ring.
      prefix: what comes before: a cache of R / n rows, each of which n neighbours continue. It has
        no prefix of its own.
      fresh: known to be empty while tracing, so that a prompt can be read by fused kernels.
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
        """S, the number of slots, those of the prefix not counted."""
        return self.segment_ids.shape[1]

    @property
    def rows(self) -> int:
        """R."""
        return self.segment_ids.shape[0]

    @property
    def dtype(self) -> Any:
        """Of keys and values."""
        return self.layers[0].keys.data.dtype

    @property
    def end(self) -> jax.Array:
        """int32 [R], the slot of each row's next token, those of the prefix counted."""
        return self.length if self.prefix is None else self.length + self._start

    @property
    def _start(self) -> jax.Array:
        assert self.prefix is not None
        return jnp.repeat(self.prefix.length, self.rows // self.prefix.rows)

    @property
    def nbytes(self) -> int:
        """Of keys and values, those of the prefix counted."""
        own = sum(x.nbytes for x in jax.tree.leaves(self.layers))
        return own + (0 if self.prefix is None else self.prefix.nbytes)


class CacheContext(NamedTuple):
    """What the layers' attention shares. B rows of a prefix are R / B rows each.

    Attributes:
      slopes: fp32 [H], or [R, H] where rows differ, divided by the ALiBi scale; None without ALiBi.
      length: int32 [R], a row's own slots before the new tokens.
      at: int32, the slot of the first of these, within the ring.
      new_ids, ids: int32 segments of the new tokens [R, T], and of all slots [R, S], theirs too.
      prefix_length, prefix_ids: int32 [B], [B, P]: filled slots of a prefix and their segments.
    """

    slopes: jax.Array | None
    length: jax.Array
    at: jax.Array
    new_ids: jax.Array
    ids: jax.Array
    prefix_length: jax.Array | None
    prefix_ids: jax.Array | None


def fork(cache: KVCache, copies: int, layers: tuple[LayerKV, ...], ids: jax.Array) -> KVCache:
    """An empty cache whose rows continue those of another, `copies` neighbours each.

    Args:
      cache: without a prefix.
      layers, ids: empty, of R = copies * B rows; on a mesh, rows split as those of `cache`.
    """
    if cache.prefix is not None:
        raise ValueError("cache: found one with a prefix, expected one that a prompt filled")
    rows = jax.typeof(ids).sharding.spec[0]
    split = None if rows is None else PartitionSpec(rows)
    each = jnp.broadcast_to(cache.segment[:, None], (cache.rows, copies))
    segment = jnp.reshape(each, -1, out_sharding=split)
    zero = jnp.zeros((), jnp.int32)
    return KVCache(layers, ids, segment, jnp.zeros(len(ids), jnp.int32), zero, cache)


@functools.partial(jax.jit, static_argnames="capacity")
def resized(cache: KVCache, capacity: int) -> KVCache:
    """The cache with more slots, those of a prefix not counted.

    A ring that has closed is opened at its oldest slot.
    """
    closed = cache.cursor > cache.capacity
    shift = jnp.where(closed, -cache.cursor % cache.capacity, 0)

    def larger(x, axis):
        return _filled_up(jnp.roll(x, shift, axis), axis, capacity)

    layers = jax.tree.map(lambda x: larger(x, 2), cache.layers)
    ids, cursor = larger(cache.segment_ids, 1), jnp.where(closed, cache.capacity, cache.cursor)
    return dataclasses.replace(cache, layers=layers, segment_ids=ids, cursor=cursor)


def _filled_up(x: jax.Array, axis: int, slots: int) -> jax.Array:
    """x with empty slots at the end, so many in all."""
    return jnp.pad(x, [(0, slots - n if i == axis else 0) for i, n in enumerate(x.shape)])


def reordered(cache: KVCache, parents_BN: jax.Array, shard: PartitionSpec | None) -> KVCache:
    """The cache after a step of beam search; the prefix stays as it is.

    Args:
      parents_BN: int32 [B, R / B], for every row, which of the rows of its prompt it continues.
      shard: on a mesh, the mesh axes of rows and heads (and more, which is not read).
    """
    own = cache.layers, cache.segment_ids, cache.segment

    def local(own, parents):
        def of(x):
            by_prompt = x.reshape(*parents.shape, *x.shape[1:])
            return jax.vmap(lambda rows, at: rows[at])(by_prompt, parents).reshape(x.shape)

        return jax.tree.map(of, own)

    if shard is not None:

        def spec(x):  # [R, H, ...], or [R, S] and [R]
            return PartitionSpec(*shard[: 2 if x.ndim > 2 else 1])

        specs = jax.tree.map(spec, own)
        local = jax.shard_map(local, in_specs=(specs, PartitionSpec(shard[0])), out_specs=specs)
    layers, ids, segment = local(own, parents_BN)
    return dataclasses.replace(cache, layers=layers, segment_ids=ids, segment=segment)


def filled(part: LayerKV, keys: jax.Array, values: jax.Array) -> LayerKV:
    """An empty layer with keys and values [R, H, T, K] from the first slot on."""

    def fill(slots: KVArray, new: jax.Array) -> KVArray:
        stored = KVArray.from_floats(new, slots.data.dtype)
        return jax.tree.map(lambda x: _filled_up(x, 2, slots.data.shape[2]), stored)

    return LayerKV(fill(part.keys, keys), fill(part.values, values))


def extend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    own: LayerKV,
    prefix: LayerKV | None,
    shared: CacheContext,
    *,
    precision: jax.lax.Precision | None,
    on_cpu: bool,
    shard: PartitionSpec | None,
) -> tuple[jax.Array, LayerKV]:
    """Writes new keys and values; attention of the new queries over all that is there.

    softmax(q·k - slope * distance, causal and within segments) @ v, over prefix and own slots.

    Args:
      q, k, v: [R, H, T, K], of the slots from `shared.length` on; q scaled.
      own, prefix: one layer.
      on_cpu: avoid what XLA's CPU backend is slow at.
      shard: on a mesh, the mesh axes of rows and heads (and more, which is not read).

    Returns:
      [R, H, T, K] in q's dtype, and the layer with the new tokens.
    """

    def local(q, k, v, own, prefix, shared):
        def put(slots: KVArray, new: jax.Array) -> KVArray:
            stored = KVArray.from_floats(new, slots.data.dtype)
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=2)
            return jax.tree.map(lambda x, y: put(x, y, shared.at), slots, stored)

        own = LayerKV(put(own.keys, k), put(own.values, v))
        return _attend(q, own, prefix, shared, precision, on_cpu), own

    if shard is None:
        return local(q, k, v, own, prefix, shared)
    rows, heads = shard[:2]
    slopes = shared.slopes
    specs = jax.tree.map(lambda x: PartitionSpec(*(rows,)[: x.ndim]), shared)
    if slopes is not None:
        specs = specs._replace(slopes=PartitionSpec(*(rows, heads)[-slopes.ndim :]))
    split = PartitionSpec(rows, heads)
    specs = (*jax.tree.map(lambda _: split, (q, k, v, own, prefix)), specs)
    return jax.shard_map(local, in_specs=specs, out_specs=(specs[0], specs[3]))(
        q, k, v, own, prefix, shared
    )


def _attend(
    q, own: LayerKV, prefix: LayerKV | None, shared: CacheContext, precision, on_cpu
) -> jax.Array:
    def some(q, new, ids):
        return _attend_chunk(q, new, ids, own, prefix, shared, precision, on_cpu)

    new = jnp.arange(q.shape[2], dtype=jnp.int32)
    return over_queries(some, q, new, shared.new_ids)


def _attend_chunk(q, new_T, new_ids, own, prefix, shared, precision, on_cpu) -> jax.Array:
    """Attention of some of the new tokens, the `new_T`th of them."""
    R, H = q.shape[:2]
    slots, slopes = _slots(own), shared.slopes
    distance = jnp.mod(shared.at + new_T[:, None] - slots, slots.shape[1])[None]
    older = shared.length[:, None, None] + new_T[:, None]  # than a new token, the own ones
    # Keys and values, how far back they are [R or 1, T, S], whether they count, their segments.
    parts = [(own, distance, distance <= older, shared.ids)]
    if prefix is not None:
        slots, end = _slots(prefix), _each(shared.prefix_length, R)[:, None, None]
        distance = end + older - slots
        parts.insert(0, (prefix, distance, (slots < end), shared.prefix_ids))
    scores = []
    for part, distance, valid, ids in parts:
        dots = _product("bhtk,bhsk->bhts", _merged(q, len(ids)), part.keys.data, precision, on_cpu)
        if part.keys.scales is not None:
            dots = dots * part.keys.scales[:, :, None]
        dots = _split(dots, R)
        allowed = valid & (new_ids[:, :, None] == _each(ids, R)[:, None])
        if slopes is not None:
            of_row = jnp.broadcast_to(slopes, (R, H))[:, :, None, None]
            dots = dots - of_row * distance[:, None].astype(jnp.float32)
        scores.append(jnp.where(allowed[:, None], dots, _MASKED))
    p = jax.nn.softmax(jnp.concatenate(scores, -1), -1)
    out: Any = 0.0
    for part, _, _, ids in parts:
        size = part.values.data.shape[2]
        mine, p = _merged(p[..., :size], len(ids)), p[..., size:]
        if part.values.scales is not None:
            mine = mine * part.values.scales[:, :, None]
        mine = mine.astype(q.dtype)
        mixed = _product("bhts,bhsk->bhtk", mine, part.values.data, precision, on_cpu)
        out = out + _split(mixed, R)
    return out.astype(q.dtype)


def _slots(part: LayerKV) -> jax.Array:
    return jnp.arange(part.keys.data.shape[2], dtype=jnp.int32)[None]


def _each(x: jax.Array, rows: int) -> jax.Array:
    """What is per row of a prefix, or the same for all, for each row that continues it."""
    return jnp.repeat(x, rows // len(x), 0)


def _merged(x: jax.Array, rows: int) -> jax.Array:
    """[R, H, T, ...] as [rows, H, R / rows * T, ...]: neighbours read the same keys at once."""
    if len(x) == rows:
        return x
    x = x.reshape(rows, -1, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _split(x: jax.Array, rows: int) -> jax.Array:
    """The inverse of `_merged`."""
    if len(x) == rows:
        return x
    x = x.reshape(*x.shape[:2], rows // len(x), -1, x.shape[-1]).swapaxes(1, 2)
    return x.reshape(rows, *x.shape[2:])


def _product(equation, x, stored, precision, on_cpu) -> jax.Array:
    """The einsum of x and keys or values, fp32; int8 becomes what x is."""
    one = on_cpu and x.shape[2] == 1 and x.dtype != jnp.float32
    if one:  # two rows, or XLA's CPU backend would take a copy of the cache in fp32
        x = jnp.concatenate([x, x], 2)
    out = einsum(equation, x, stored.astype(x.dtype), precision)
    return out[:, :, :1] if one else out
