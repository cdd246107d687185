"""Positions of tokens: how they enter the model, their defaults, and the lengths it can read.

ALiBi counts cache slots, including padding, like the original code: distances are computed where
attention is. Learned positions are an input, which counts slots by default and valid tokens where
`count_positions` is used, as transformers' `generate` does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from btlm_jax.config import BTLMConfig, Positions
from btlm_jax.model import alibi
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.runtime import Runtime

logger = logging.getLogger(__name__)


def add_default_positions(
    runtime: Runtime, inputs: Mapping[str, jax.Array], cache: KVCache | None, num_valid: Any
) -> Mapping[str, jax.Array]:
    """Adds the default of learned positions: the slots, counted from the end of the cache.

    Args:
      num_valid: the number of new tokens. Padding after them takes the position of the last one,
        because its slots may exceed the learned positions.
    """
    if runtime.config.positions is not Positions.LEARNED or "positions" in inputs:
        return inputs
    B, T = inputs["input_ids"].shape
    index = jnp.minimum(jnp.arange(T), num_valid - 1)
    slots = jnp.broadcast_to(jnp.atleast_1d(first_slot(cache))[:, None] + index, (B, T))
    return {**inputs, "positions": runtime.shard(slots, "batch", "sequence")}


def count_positions(
    config: BTLMConfig, mask_BT: jax.Array, num_earlier: Any = 0
) -> jax.Array | None:
    """Counts valid tokens: the positions of padded rows in transformers' `generate`.

    Args:
      mask_BT: nonzero for valid tokens.
      num_earlier: the number of valid tokens before these, an int or int32 [B, 1].

    Returns:
      int32 [B, T], within the learned positions at padding too; None if the model counts slots.
    """
    if config.positions is not Positions.LEARNED:
        return None
    positions = num_earlier + jnp.cumsum(mask_BT != 0, 1, dtype=jnp.int32) - 1
    return jnp.clip(positions, 0, config.n_positions - 1)


def segment_positions(config: BTLMConfig, segment_ids_BT: jax.Array) -> jax.Array | None:
    """Counts tokens within each document of packed rows: their learned positions.

    Args:
      segment_ids_BT: the document of every token; a document's tokens are neighbors.

    Returns:
      int32 [B, T]; None if the model counts slots.
    """
    if config.positions is not Positions.LEARNED:
        return None
    index = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    begins = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    begins = jnp.concatenate([jnp.ones_like(begins[:, :1]), begins], 1)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def scaled_slopes(runtime: Runtime, cache: KVCache | None, num_valid: Any) -> jax.Array | None:
    """Returns ALiBi slopes divided by the scale, fp32 [H] or [B, H]; None without ALiBi.

    Args:
      num_valid: the number of new tokens, without padding at the end.
    """
    c = runtime.config
    if c.positions is not Positions.ALIBI:
        return None
    scale: Any = alibi.scale(c.alibi_scaling, first_slot(cache) + num_valid)
    slopes = jnp.asarray(alibi.model_slopes(c), jnp.float32)
    slopes = slopes / (scale[:, None] if jnp.ndim(scale) else scale)
    return runtime.shard(slopes, *("batch", "heads")[-slopes.ndim :])


def first_slot(cache: KVCache | None) -> Any:
    """Returns the slot of the first new token: int32 [B] if it may differ between rows."""
    return 0 if cache is None or cache.fresh else cache.end


def check_length(config: BTLMConfig, length: int, field: str, fix: str) -> None:
    """Raises ValueError if the model cannot read `length` tokens; warns if it was not trained to.

    Args:
      field: what has this length, for the message.
      fix: what to do about it, for the error.
    """
    limit = config.position_limit
    if limit is not None and length > limit:
        raise ValueError(
            f"{field}: {length} tokens exceed the {limit} learned positions of the model: {fix}"
        )
    if length > config.n_positions and config.alibi_scaling is None:
        logger.warning(
            "%s: %d tokens exceed the trained context of %d and alibi_scaling is not set: quality "
            "degrades beyond it", field, length, config.n_positions,
        )  # fmt: skip
