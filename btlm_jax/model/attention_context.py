"""The inputs of attention that all layers share, and the cache after a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from btlm_jax.model.kv_cache import CacheContext, KVCache, LayerKV
from btlm_jax.model.positions import scaled_slopes
from btlm_jax.model.runtime import Runtime


class AttentionContext(NamedTuple):
    """Inputs of attention shared by all layers when whole sequences are read.

    Attributes:
      slopes: fp32 [H], divided by the ALiBi scale; None without ALiBi.
      segments: of queries [B, T] and keys [B, S]; None if each row is one segment.
    """

    slopes: jax.Array | None
    segments: tuple[jax.Array, jax.Array] | None


AnyContext = AttentionContext | CacheContext


def attention_context(
    runtime: Runtime, inputs: Mapping[str, jax.Array], cache: KVCache | None, num_valid: Any
) -> AnyContext:
    """Returns a `CacheContext` if a cache is continued, else an `AttentionContext`.

    Args:
      num_valid: the number of new tokens, without padding at the end.
    """
    slopes = scaled_slopes(runtime, cache, num_valid)
    segments = _segments(runtime, inputs, cache)
    if cache is not None and not cache.fresh:
        return _cache_context(runtime, cache, slopes, segments)
    return AttentionContext(slopes, None if segments is None else (segments, segments))


def overflow_to_nan(runtime: Runtime, cache: KVCache, h_BTD: jax.Array) -> jax.Array:
    """Replaces the states of rows that do not fit into the cache by NaN.

    Such a row has overwritten its own slots. Single tokens may go around the ring.
    """
    T = h_BTD.shape[1]
    fits = cache.length + T <= cache.capacity
    fits = fits & ((T == 1) | (cache.cursor + T <= cache.capacity))
    return jnp.where(runtime.shard(fits, "batch")[:, None, None], h_BTD, jnp.nan)


def advanced_cache(
    runtime: Runtime,
    cache: KVCache,
    layers: tuple[LayerKV, ...],
    context: AnyContext,
    num_tokens: int,
    num_valid: Any,
) -> KVCache:
    """Returns the cache after a forward pass.

    Args:
      cache: before it.
      layers: with the new tokens.
      num_tokens: T, the number of new tokens.
      num_valid: how many of them are valid; the others are padding at the end.
    """
    if isinstance(context, CacheContext):
        segments_BT, ids_BS = context.new_ids, context.ids
    else:
        if context.segments is None:
            ones = jnp.ones((cache.rows, num_tokens), jnp.int32)
            segments_BT = runtime.shard(ones, "batch", None)
        else:
            segments_BT, _ = context.segments
        ids_BS = jnp.pad(segments_BT, ((0, 0), (0, cache.capacity - num_tokens)))
    last = jax.lax.dynamic_index_in_dim(segments_BT, num_valid - 1, 1, keepdims=False)
    last = runtime.shard(last, "batch")  # JAX drops the sharding of a size-1 batch here
    length, cursor = cache.length + num_valid, cache.cursor + num_valid
    return KVCache(layers, ids_BS, last, length, cursor, cache.prefix)


def _segments(
    runtime: Runtime, inputs: Mapping[str, jax.Array], cache: KVCache | None
) -> jax.Array | None:
    """Returns the segment of every new token, 0 for padding; None if each row is one segment."""
    segments, mask = inputs.get("segment_ids"), inputs.get("attention_mask")
    if segments is None and cache is not None and not cache.fresh:
        last = jnp.where(cache.segment > 0, cache.segment, 1)
        segments = jnp.broadcast_to(last[:, None], inputs["input_ids"].shape)
        # Broadcasting drops the sharding of a size-1 batch.
        segments = runtime.shard(segments, "batch", "sequence")
    if mask is None:
        return segments
    return mask if segments is None else jnp.where(mask != 0, segments, 0)


def _cache_context(runtime: Runtime, cache: KVCache, slopes, segments_BT) -> CacheContext:
    """Returns the context of a step that continues a cache."""
    length, cursor = runtime.shard(cache.length, "batch"), cache.cursor % cache.capacity
    ids = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segments_BT, cursor, 1)
    prefix: Any = (None, None)
    if cache.prefix is not None:
        prefix = runtime.shard(cache.prefix.length, "batch"), cache.prefix.segment_ids
    return CacheContext(slopes, length, cursor, segments_BT, ids, *prefix)
