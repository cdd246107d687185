"""Checks and normalizes the arguments of a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from btlm_jax.config import BTLMConfig, Positions
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.runtime import Runtime


def checked_inputs(
    runtime: Runtime,
    input_ids: ArrayLike,
    cache: KVCache | None = None,
    length: ArrayLike | None = None,
    *,
    attention_mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    token_type_ids: ArrayLike | None = None,
) -> dict[str, jax.Array]:
    """Returns the given arguments as int32 arrays [B, T]; the attention mask becomes 0 and 1.

    Arguments as in `BTLM.apply`.

    Raises:
      ValueError: shapes or dtypes that do not agree, or more tokens than the cache or the learned
        positions hold.
    """
    arguments = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "segment_ids": segment_ids,
        "positions": positions,
        "token_type_ids": token_type_ids,
    }
    arrays = {name: _as_array(x) for name, x in arguments.items() if x is not None}
    _check_arrays(arrays)
    B, T = arrays["input_ids"].shape
    runtime.check_batch(B, T)
    c = runtime.config
    learned = c.positions is Positions.LEARNED
    if learned and "segment_ids" in arrays and "positions" not in arrays:
        raise ValueError(
            "segment_ids with learned positions: pass positions, counted within each segment"
        )
    if cache is not None:
        cache.check(runtime, B)
        _check_capacity(T, cache)
    if "positions" not in arrays:
        _check_positions(c, T if length is None else length, cache)
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


def _check_capacity(T: int, cache: KVCache) -> None:
    """Raises ValueError if T more tokens exceed the cache."""
    used = _known(cache.length.max()) or 0
    if used + T > cache.capacity:
        raise ValueError(
            f"the cache holds {cache.capacity} tokens, of which {used} are used, and {T} more "
            "do not fit: make it larger (init_cache) or shorten the input"
        )


def _check_positions(c: BTLMConfig, num_valid: ArrayLike, cache: KVCache | None) -> None:
    """Raises ValueError if the valid tokens are known to exceed the learned positions."""
    limit = c.position_limit
    used = 0 if cache is None else _known(cache.length.max()) or 0
    end = used + (_known(num_valid) or 0)
    if limit is not None and end > limit:
        raise ValueError(
            f"{end} tokens exceed n_positions = {limit}, the number of learned positions: shorten "
            "the input"
        )


def _known(x: Any) -> int | None:
    """Returns the value of an integer, or None while tracing."""
    return None if isinstance(x, jax.core.Tracer) else int(x)
