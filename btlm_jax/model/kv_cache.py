"""The KV cache of decoding: what it holds, and how it starts, advances, grows and forks.

Shapes: R rows, S slots, H heads, K head_dim, T new tokens; a prefix has B rows of P slots. Every
layer has its own arrays, which a step of decoding updates in place: one slot in each. Reading them
(`attention_cached`) is, beside the weights, all the work of the step.

The slots form a ring: all rows write to the same slot, so that the update is one in-place copy, and
each row knows how many slots before it hold its own tokens. ALiBi depends on distances only, and
these are the same in all rows. So one row can restart while the others continue.

A cache may continue another one, its `prefix`: the rows of a beam search share the keys and values
of their prompt and hold only their own continuations.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from btlm_jax.model import sharding
from btlm_jax.model.runtime import Runtime
from btlm_jax.utils.dtypes import FLOATS, optional_dtype

CACHE_DTYPES = ("int8", *FLOATS)


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

    def filled(self, x_RHTK: jax.Array) -> KVArray:
        """Returns the array, which is empty, with x written from the first slot on."""
        new = KVArray.from_floats(x_RHTK, self.data.dtype)
        return jax.tree.map(lambda x: _pad_slots(x, 2, self.data.shape[2]), new)

    def written(self, x_RHTK: jax.Array, slot: jax.Array) -> KVArray:
        """Returns the array with x written from `slot` on."""
        new = KVArray.from_floats(x_RHTK, self.data.dtype)
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=2)
        return jax.tree.map(lambda x, y: update(x, y, slot), self, new)


class LayerKV(NamedTuple):
    """The keys and values of one layer."""

    keys: KVArray
    values: KVArray

    @property
    def num_slots(self) -> int:
        """S."""
        return self.keys.data.shape[2]

    def filled(self, k_RHTK: jax.Array, v_RHTK: jax.Array) -> LayerKV:
        """Returns an empty layer with keys and values written from the first slot on."""
        return LayerKV(self.keys.filled(k_RHTK), self.values.filled(v_RHTK))

    def written(self, k_RHTK: jax.Array, v_RHTK: jax.Array, slot: jax.Array) -> LayerKV:
        """Returns the layer with new keys and values written from `slot` on."""
        return LayerKV(self.keys.written(k_RHTK, slot), self.values.written(v_RHTK, slot))


# One layer's own slots, and those of its prefix.
LayerCache = tuple[LayerKV, LayerKV | None]


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

    def layer(self, i: int) -> LayerCache:
        """Returns one layer's own slots, and those of the prefix if there is one."""
        return self.layers[i], None if self.prefix is None else self.prefix.layers[i]

    def slots(self, runtime: Runtime, segments_RT: jax.Array) -> CacheSlots:
        """Returns what attention needs to know about the slots in one step.

        Args:
          segments_RT: int32, the segments of the new tokens.
        """
        length_R, cursor = runtime.shard(self.length, "batch"), self.cursor % self.capacity
        ids_RS = self._written_ids(segments_RT)
        if self.prefix is None:
            return CacheSlots(length_R, cursor, ids_RS, None, None)
        prefix_length_B = runtime.shard(self.prefix.length, "batch")
        return CacheSlots(length_R, cursor, ids_RS, prefix_length_B, self.prefix.segment_ids)

    def advanced(
        self,
        runtime: Runtime,
        layers: tuple[LayerKV, ...],
        segments_RT: jax.Array | None,
        num_new: int,
        num_valid: Any,
    ) -> KVCache:
        """Returns the cache after a forward pass.

        Args:
          layers: with the new tokens.
          segments_RT: int32, the segments of the new tokens; None if each row is one segment.
          num_new: T, the number of new tokens.
          num_valid: how many of them are valid; the others are padding at the end, which later
            tokens overwrite.
        """
        if segments_RT is None:
            ones_RT = jnp.ones((self.rows, num_new), jnp.int32)
            segments_RT = runtime.shard(ones_RT, "batch", None)
        last_R = jax.lax.dynamic_index_in_dim(segments_RT, num_valid - 1, 1, keepdims=False)
        return KVCache(
            layers,
            self._written_ids(segments_RT),
            runtime.shard(last_R, "batch"),  # JAX drops the sharding of a size-1 batch here
            self.length + num_valid,
            self.cursor + num_valid,
            self.prefix,
        )

    def _written_ids(self, segments_RT: jax.Array) -> jax.Array:
        """Returns the segments of all slots, including those of new tokens."""
        if self.fresh:
            return _pad_slots(segments_RT, 1, self.capacity)
        cursor = self.cursor % self.capacity
        return jax.lax.dynamic_update_slice_in_dim(self.segment_ids, segments_RT, cursor, 1)

    def overflow_to_nan(self, runtime: Runtime, h_RTD: jax.Array) -> jax.Array:
        """Replaces the states of new tokens by NaN in rows where they do not fit.

        Such a row has overwritten its own slots. Single tokens may go around the ring. A fresh
        cache was checked before the forward pass.
        """
        if self.fresh:
            return h_RTD
        T = h_RTD.shape[1]
        fits_R = self.length + T <= self.capacity
        fits_R = fits_R & ((T == 1) | (self.cursor + T <= self.capacity))
        return jnp.where(runtime.shard(fits_R, "batch")[:, None, None], h_RTD, jnp.nan)

    def check(self, runtime: Runtime, batch_size: int) -> None:
        """Raises ValueError if the cache belongs to another model, batch size or mesh."""
        c, keys = runtime.config, [layer.keys.data for layer in self.layers]
        expected = (batch_size, c.n_head, self.capacity, c.head_dim)
        if len(keys) != c.n_layer or keys[0].shape != expected:
            raise ValueError(
                f"cache: found {len(keys)} layers of {list(keys[0].shape)}, expected {c.n_layer} "
                f"of {list(expected)} for this model and batch: make it with init_cache"
            )
        if sharding.mesh_of(keys[0]) != runtime.mesh:
            raise ValueError(
                "cache: found one that is not on the mesh of the weights: make it with init_cache"
            )


class CacheSlots(NamedTuple):
    """What attention needs to know about the slots of a cache in one step; shared by all layers.

    Attributes:
      length: int32 [R], how many slots before the new tokens belong to each row.
      cursor: int32, the slot of the first new token, within the ring.
      ids: int32 [R, S], segments of all slots, including the new tokens.
      prefix_length: int32 [B], the filled slots of the prefix; None without one.
      prefix_ids: int32 [B, P], the segments of the prefix; None without one.
    """

    length: jax.Array
    cursor: jax.Array
    ids: jax.Array
    prefix_length: jax.Array | None
    prefix_ids: jax.Array | None


# Whole caches -----------------------------------------------------------------------------------


def empty_cache(
    runtime: Runtime, rows: int, capacity: int, dtype: DTypeLike | None = None
) -> KVCache:
    """Returns an empty cache, sharded by the rules of the runtime.

    Args:
      dtype: of keys and values, a float or int8; None is the compute dtype.
    """
    dtype = optional_dtype(dtype, "dtype", CACHE_DTYPES) or runtime.dtype
    with sharding.on_mesh(runtime.mesh):
        layers, ids_RS = _empty_slots(runtime, rows, capacity, dtype)
        segment_R = runtime.zeros((rows,), jnp.int32, "batch")
        length_R = jnp.zeros(rows, jnp.int32)
        return KVCache(layers, ids_RS, segment_R, length_R, jnp.int32(0), fresh=True)


def fork(runtime: Runtime, cache: KVCache, copies: int, capacity: int) -> KVCache:
    """Returns an empty cache in which `copies` neighboring rows continue each row of `cache`.

    Args:
      cache: the prefix; it must not have a prefix itself.
      capacity: the number of slots of the new cache.
    """
    if cache.prefix is not None:
        raise ValueError("cache: found one with a prefix, expected one that a prompt filled")
    rows = cache.rows * copies
    with sharding.on_mesh(runtime.mesh):
        layers, ids_RS = _empty_slots(runtime, rows, capacity, cache.dtype)
        segment_BN = jnp.broadcast_to(cache.segment[:, None], (cache.rows, copies))
        segment_R = jnp.reshape(segment_BN, -1, out_sharding=_row_spec(ids_RS))
        zero = jnp.zeros((), jnp.int32)
        return KVCache(layers, ids_RS, segment_R, jnp.zeros(rows, jnp.int32), zero, cache)


def _empty_slots(
    runtime: Runtime, rows: int, capacity: int, dtype
) -> tuple[tuple[LayerKV, ...], jax.Array]:
    """Returns empty slots of every layer, and their segments int32 [rows, capacity]."""
    c = runtime.config
    shape = (rows, c.n_head, capacity, c.head_dim)

    def empty_array():
        data_RHSK = runtime.zeros(shape, dtype, "batch", "heads", None, None)
        if dtype != jnp.int8:
            return KVArray(data_RHSK, None)
        scales_RHS = runtime.zeros(shape[:3], jnp.float32, "batch", "heads", None)
        return KVArray(data_RHSK, scales_RHS)

    layers = tuple(LayerKV(empty_array(), empty_array()) for _ in range(c.n_layer))
    return layers, runtime.zeros((rows, capacity), jnp.int32, "batch", None)


def _row_spec(x_RS: jax.Array) -> PartitionSpec | None:
    """Returns how the rows of x are sharded; None if they are not."""
    row_axes = jax.typeof(x_RS).sharding.spec[0]
    return None if row_axes is None else PartitionSpec(row_axes)


@functools.partial(jax.jit, static_argnames="capacity")
def resized(cache: KVCache, capacity: int) -> KVCache:
    """Returns the cache with `capacity` slots, without counting those of a prefix.

    A smaller capacity must hold all tokens of every row.

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
    """Pads `axis` with zeros to `slots`, or cuts it there."""
    if slots < x.shape[axis]:
        return jax.lax.slice_in_dim(x, 0, slots, axis=axis)
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
