"""The inputs of attention that all layers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from btlm_jax.model.kv_cache import CacheSlots, KVCache
from btlm_jax.model.positions import scaled_slopes
from btlm_jax.model.runtime import Runtime


class AttentionContext(NamedTuple):
    """Inputs of attention shared by all layers.

    Attributes:
      slopes: fp32 [H], or [B, H] if they differ between rows of a cache, divided by the ALiBi
        scale; None without ALiBi.
      segments: int32 [B, T], the segments of the new tokens, 0 for padding; None if each row is one
        segment.
      slots: of the cache that the new tokens continue; None where they are whole sequences.
    """

    slopes: jax.Array | None
    segments: jax.Array | None
    slots: CacheSlots | None = None

    @property
    def segment_pair(self) -> tuple[jax.Array, jax.Array] | None:
        """The segments of queries and of keys, for attention within whole sequences."""
        return None if self.segments is None else (self.segments, self.segments)


def attention_context(
    runtime: Runtime, inputs: Mapping[str, jax.Array], cache: KVCache | None, num_valid: Any
) -> AttentionContext:
    """Returns the inputs of attention for new tokens.

    Args:
      inputs: as in `Transformer`.
      cache: to continue, if any.
      num_valid: the number of new tokens, without padding at the end.
    """
    slopes = scaled_slopes(runtime, cache, num_valid)
    segments_BT = _segments(runtime, inputs, cache)
    if cache is None or cache.fresh:
        return AttentionContext(slopes, segments_BT)
    assert segments_BT is not None
    return AttentionContext(slopes, segments_BT, cache.slots(runtime, segments_BT))


def _segments(
    runtime: Runtime, inputs: Mapping[str, jax.Array], cache: KVCache | None
) -> jax.Array | None:
    """Returns the segment of every new token, 0 for padding; None if each row is one segment."""
    segments_BT, mask_BT = inputs.get("segment_ids"), inputs.get("attention_mask")
    if segments_BT is None and cache is not None and not cache.fresh:
        last_B = jnp.where(cache.segment > 0, cache.segment, 1)
        segments_BT = jnp.broadcast_to(last_B[:, None], inputs["input_ids"].shape)
        # Broadcasting drops the sharding of a size-1 batch.
        segments_BT = runtime.shard(segments_BT, "batch", "sequence")
    if mask_BT is None:
        return segments_BT
    return mask_BT if segments_BT is None else jnp.where(mask_BT != 0, segments_BT, 0)
