"""Prefill: prompts become a KV cache and the logits of their next token."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from btlm_jax.model import kv_cache, sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.params import Params


class PromptState(NamedTuple):
    """Prompts that have been read."""

    cache: KVCache  # of B rows
    logits: jax.Array  # fp32 [B, V], of the token after each


@functools.partial(jax.jit, static_argnames=("model", "capacity", "dtype"))
def prefill(
    model: BTLM, params: Any, ids, mask, length, capacity: int, dtype: Any = None
) -> PromptState:
    """Reads prompts.

    Args:
      ids: int32 [B, P], from slot `length` on filling.
      length: int32, of all, or [B], of each (where dynamic ALiBi scaling does not forbid it).
      mask: int32 [B, P], 0 for padding on the left; None if there is none.
      capacity: slots of the cache, >= P.
      dtype: of the cache (`BTLM.init_cache`).
    """
    with sharding.on_mesh(model.runtime(params).mesh):
        # Made here: an argument would be held beside the result.
        cache = model.init_cache(params, ids.shape[0], capacity, dtype=dtype)
        return _prefill(model, params, ids, mask, length, cache, 0)


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def extend_prefill(
    model: BTLM, params: Any, ids, length, cache: KVCache, capacity: int
) -> PromptState:
    """Reads more of prompts whose beginnings are in a cache, which stays as it is.

    Args:
      ids: int32 [B, T], of which `length` are meant.
      capacity: slots of the new cache; the filling needs them too.
    """
    with sharding.on_mesh(model.runtime(params).mesh):
        cache = kv_cache.resized(cache, capacity)
        real = jnp.where(cache.segment_ids > 0, 1, 0)
        real = real * (jnp.arange(cache.capacity) < cache.length[:, None])
        return _prefill(model, params, ids, None, length, cache, real.sum(1, keepdims=True))


def _prefill(model: BTLM, params: Any, ids, mask, length, cache: KVCache, before) -> PromptState:
    slot, lengths = jnp.arange(ids.shape[1]), jnp.broadcast_to(length, len(ids))
    ids = jnp.where(slot < lengths[:, None], ids, 0)
    at = None
    if not model.config.alibi:
        # Learned positions count the real tokens of a row, as transformers does; ALiBi slots.
        counted = jnp.ones_like(ids) if mask is None else mask
        at = jnp.maximum(before + jnp.cumsum(counted, 1) - 1, 0)
        at = jnp.minimum(at, model.config.n_positions - 1)  # of the filling
    longest = lengths.max()
    read: Any = model.hidden(
        params, ids, attention_mask=mask, positions=at, cache=cache, length=longest
    )
    h, cache = read
    cache = dataclasses.replace(cache, length=cache.length - longest + lengths)
    # A sum rather than a gather, whose rows are split over a mesh.
    is_last = model.runtime(params).shard(slot == lengths[:, None] - 1, "batch", None)
    last = jnp.where(is_last[:, :, None], h, 0).sum(1, keepdims=True)
    return PromptState(cache, next_logits(model, params, last))


def next_logits(model: BTLM, params: Any, h_R1D: jax.Array) -> jax.Array:
    """fp32 [R, V], replicated: choosing is cheap, and done everywhere at once."""
    logits = model.logits(params, h_R1D)
    return model.runtime(params).shard(logits, None, None, None)[:, 0]


def prefill_padded(
    model: BTLM, params: Params, ids, mask, width: int, dtype: DTypeLike | None = None
) -> PromptState:
    """Reads prompts [B, T], padded on the left, in a cache of `width` slots."""
    T = ids.shape[1]
    room = ((0, 0), (0, width - T))
    # Without padding there is nothing to mask: the filling comes after everything.
    masked = None if mask.all() else np.pad(mask, room)
    return prefill(model, params, np.pad(ids, room), masked, np.int32(T), width, dtype)
