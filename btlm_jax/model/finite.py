"""NaN and Inf in weights and optimizer states, counted on the devices that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from btlm_jax.model import sharding

_NAMED = 3  # arrays that a message names


def count_nonfinite(tree: Any) -> dict[str, int]:
    """Returns the number of NaN and Inf of the arrays of a tree that hold any, by their names.

    Arrays are read where they are; all processes that share them get the same result.
    """
    arrays = {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    # Three times as fast as counting, which is left for the arrays that need it.
    finite = jax.device_get({name: _all_finite(x) for name, x in arrays.items()})
    return {name: int(_count(x)) for name, x in arrays.items() if not finite[name]}


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    with sharding.on_mesh(sharding.mesh_of(x)):
        return jnp.isfinite(x).all()


@jax.jit
def _count(x: jax.Array) -> jax.Array:
    with sharding.on_mesh(sharding.mesh_of(x)):
        return jnp.sum(~jnp.isfinite(x), dtype=jnp.uint32)


def describe_nonfinite(counts: Mapping[str, int]) -> str:
    """Returns a clause such as "NaN or Inf in 2 arrays (wte: 3, blocks/ln_1/bias: 64)"."""
    shown: Iterable[str] = [f"{name}: {n}" for name, n in list(counts.items())[:_NAMED]]
    more = ", …" if len(counts) > _NAMED else ""
    arrays = "array" if len(counts) == 1 else "arrays"
    return f"NaN or Inf in {len(counts)} {arrays} ({', '.join(shown)}{more})"


def require_finite(tree: Any, name: Any, advice: str) -> None:
    """Raises ValueError if an array holds NaN or Inf.

    Args:
      tree: the arrays.
      name: what they are, for the message.
      advice: what to do about it.
    """
    if counts := count_nonfinite(tree):
        raise ValueError(f"{name} holds {describe_nonfinite(counts)}: {advice}")
