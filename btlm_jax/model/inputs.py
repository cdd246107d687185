"""Checks and normalizes the arguments of a forward pass."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from btlm_jax.config import BTLMConfig
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.runtime import Runtime


def checked_inputs(
    runtime: Runtime, arguments: Mapping[str, ArrayLike | None], cache: KVCache | None
) -> dict[str, jax.Array]:
    """Returns the given arguments as int32 arrays [B, T]; the attention mask becomes 0 and 1.

    Args:
      arguments: input_ids, attention_mask, segment_ids, positions and token_type_ids of
        `BTLM.apply`.
      cache: to continue, if any.

    Raises:
      ValueError: shapes or dtypes that do not agree, or more tokens than the cache or the learned
        positions hold.
    """
    arrays = {name: _as_array(x) for name, x in arguments.items() if x is not None}
    _check_arrays(arrays)
    B, T = arrays["input_ids"].shape
    runtime.check_batch(B, T)
    c = runtime.config
    if not c.alibi and "segment_ids" in arrays and "positions" not in arrays:
        raise ValueError(
            "segment_ids with learned positions: pass positions, counted within each segment"
        )
    if cache is not None:
        runtime.check_cache(cache, B)
    _check_length(c, T, cache, "positions" in arrays)
    if "attention_mask" in arrays:
        arrays["attention_mask"] = arrays["attention_mask"] != 0
    return {name: x.astype(jnp.int32) for name, x in arrays.items()}


def _as_array(x: ArrayLike) -> jax.Array:
    """Converts to a JAX array.

    64-bit ids outside int32 saturate, because they must not wrap around into the vocabulary.
    """
    if isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.integer) and x.itemsize >= 4:
        x = np.clip(x, max(-1, np.iinfo(x.dtype).min), np.iinfo(np.int32).max)
    return jnp.asarray(x)


def _check_arrays(arrays: Mapping[str, jax.Array]) -> None:
    """Raises ValueError if shapes differ, or an array other than the mask is not of integers."""
    shape = arrays["input_ids"].shape
    if len(shape) != 2 or not shape[1]:
        raise ValueError(f"input_ids: found shape {shape}, expected [B, T] with T >= 1")
    for name, x in arrays.items():
        if x.shape != shape:
            raise ValueError(f"{name}: found shape {x.shape}, expected that of input_ids {shape}")
        if name != "attention_mask" and not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name}: found dtype {x.dtype}, expected integers")


def _check_length(c: BTLMConfig, T: int, cache: KVCache | None, has_positions: bool) -> None:
    """Raises ValueError if T more tokens exceed the cache or the learned positions."""
    used = 0 if cache is None else _used_slots(cache)
    end = T if used is None else used + T
    if cache is not None and end > cache.capacity:
        raise ValueError(
            f"the cache holds {cache.capacity} tokens, of which {used or 0} are used, and {T} more "
            "do not fit: make it larger (init_cache) or shorten the input"
        )
    if not c.alibi and not has_positions and end > c.n_positions:
        raise ValueError(
            f"{end} tokens exceed n_positions = {c.n_positions}, the number of learned positions: "
            "shorten the input"
        )


def _used_slots(cache: KVCache) -> int | None:
    """Returns the largest number of used slots of any row, or None while tracing."""
    return None if isinstance(cache.length, jax.core.Tracer) else int(cache.length.max())
