"""Prefill: prompts to a KV cache and the logits of the next token.

B prompts of at most P slots, padded on the right to a static shape; the valid length is an
argument. Padding on the right changes no result.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from btlm_jax.model import forward, kv_cache, sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.positions import count_positions
from btlm_jax.model.runtime import Runtime


class PromptState(NamedTuple):
    """Prompts after prefill, ready to be continued."""

    cache: KVCache  # of B rows
    logits: jax.Array  # fp32 [B, V], of the token after each prompt


@functools.partial(jax.jit, static_argnames=("model", "capacity", "dtype"))
def prefill(
    model: BTLM, params: Any, ids, mask, length, capacity: int, dtype: Any = None
) -> PromptState:
    """Runs the model over prompts.

    Args:
      model, params: the model and its weights.
      ids: int32 [B, P]; slots from `length` on are ignored.
      mask: int32 [B, P], 0 for padding on the left; None if there is none.
      length: int32, the length of all prompts, or [B], of each (which dynamic ALiBi scaling does
        not support).
      capacity: slots of the cache, >= P.
      dtype: dtype of the cache (`BTLM.init_cache`).
    """
    runtime = model.runtime(params)
    with sharding.on_mesh(runtime.mesh):
        # Created inside jit: an argument would stay in memory beside the result.
        cache = forward.init_cache(runtime, params, ids.shape[0], capacity, dtype=dtype)
        return _prefill(runtime, params, ids, mask, length, cache, 0)


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def extend_prefill(
    model: BTLM, params: Any, ids, length, cache: KVCache, capacity: int
) -> PromptState:
    """Runs the model over the rest of prompts whose beginnings are in a cache.

    Args:
      model, params: the model and its weights.
      ids: int32 [B, T], of which the first `length` are valid.
      length: int32.
      cache: the cache of the beginnings; it is not modified.
      capacity: slots of the new cache, including those for the padding of `ids`.
    """
    runtime = model.runtime(params)
    with sharding.on_mesh(runtime.mesh):
        cache = kv_cache.resized(cache, capacity)
        is_valid = jnp.where(cache.segment_ids > 0, 1, 0)
        is_valid = is_valid * (jnp.arange(cache.capacity) < cache.length[:, None])
        num_valid = is_valid.sum(1, keepdims=True)
        return _prefill(runtime, params, ids, None, length, cache, num_valid)


def _prefill(
    runtime: Runtime, params: Any, ids, mask, length, cache: KVCache, num_earlier
) -> PromptState:
    slot, lengths = jnp.arange(ids.shape[1]), jnp.broadcast_to(length, len(ids))
    ids = jnp.where(slot < lengths[:, None], ids, 0)
    counted = jnp.ones_like(ids) if mask is None else mask
    positions = count_positions(runtime.config, counted, num_earlier)
    longest = lengths.max()
    outputs: Any = forward.hidden(
        runtime,
        params,
        ids,
        attention_mask=mask,
        positions=positions,
        cache=cache,
        length=longest,
    )
    h, cache = outputs
    cache = dataclasses.replace(cache, length=cache.length - longest + lengths)
    # A sum instead of a gather, because the rows may be sharded.
    is_last = runtime.shard(slot == lengths[:, None] - 1, "batch", None)
    last_h = jnp.where(is_last[:, :, None], h, 0).sum(1, keepdims=True)
    return PromptState(cache, next_logits(runtime, params, last_h))


def next_logits(runtime: Runtime, params: Any, h_R1D: jax.Array) -> jax.Array:
    """Returns logits, fp32 [R, V], replicated: every device then selects the same tokens."""
    logits = forward.logits(runtime, params, h_R1D)
    return runtime.shard(logits, None, None, None)[:, 0]
