"""NaN and Inf in weights and optimizer states, counted on the devices that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from btlm_jax.model import sharding
from btlm_jax.utils.format import join_first

_NAMED = 3  # arrays that a message names


def nonfinite_by_array(tree: Any) -> dict[str, int]:
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
    arrays = "array" if len(counts) == 1 else "arrays"
    named = join_first((f"{name}: {n}" for name, n in counts.items()), _NAMED)
    return f"NaN or Inf in {len(counts)} {arrays} ({named})"
