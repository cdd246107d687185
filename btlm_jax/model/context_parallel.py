"""Sequences that are split over the devices of a mesh axis, with causal attention balanced.

Over c devices a sequence is cut into 2c chunks, and device i holds chunks i and 2c - 1 - i: an
early one, whose queries see few keys, and a late one. In natural order the last device would have
nearly twice the average work, and all others would wait for it.

These functions run inside `jax.shard_map`, on the local part of an array.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def device_positions(length: int, shards: int) -> np.ndarray:
    """Returns the positions that each device holds, int32 [shards, length / shards]."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
    return np.concatenate([chunks[:shards], chunks[: shards - 1 : -1]], axis=1)


def local_positions(count: int, axis: str) -> jax.Array:
    """Returns the positions of the `count` tokens on this device, int32 [count]."""
    shards = jax.lax.axis_size(axis)
    return jnp.asarray(device_positions(shards * count, shards))[jax.lax.axis_index(axis)]


def to_balanced_order(x: jax.Array, axis: str) -> jax.Array:
    """Reorders dimension 1 from natural order, where device i holds chunks 2i and 2i + 1."""
    even, odd = jnp.split(x, 2, axis=1)
    holders = _chunk_holders(jax.lax.axis_size(axis))
    even, odd = (
        jax.lax.ppermute(chunk, axis, list(enumerate(targets)))
        for chunk, targets in zip((even, odd), holders, strict=True)
    )
    early, late = _swap_on_odd_devices(even, odd, axis)
    return jnp.concatenate([early, late], axis=1)


def to_natural_order(x: jax.Array, axis: str) -> jax.Array:
    """Reorders dimension 1 from balanced to natural order: the inverse of `to_balanced_order`."""
    early, late = jnp.split(x, 2, axis=1)
    even, odd = _swap_on_odd_devices(early, late, axis)
    holders = _chunk_holders(jax.lax.axis_size(axis))
    chunks = [
        jax.lax.ppermute(chunk, axis, [(j, i) for i, j in enumerate(sources)])
        for chunk, sources in zip((even, odd), holders, strict=True)
    ]
    return jnp.concatenate(chunks, axis=1)


def gather_in_natural_order(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Gathers a balanced sequence, in natural order, along dimension `dim`."""
    x = jax.lax.all_gather(x, axis, axis=dim)  # [..., c, 2 chunks, ...]
    early, late = jnp.split(x, 2, axis=dim + 1)
    x = jnp.concatenate([early, jnp.flip(late, dim)], axis=dim)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


def _chunk_holders(shards: int) -> list[list[int]]:
    """Returns the devices that hold the even chunks, and those that hold the odd chunks."""
    holder = [*range(shards), *reversed(range(shards))]
    return [holder[0::2], holder[1::2]]


def _swap_on_odd_devices(x, y, axis: str) -> tuple[jax.Array, jax.Array]:
    """Swaps x and y on odd devices.

    One of the chunks i and 2c - 1 - i is even: the first on even devices i, the second on odd ones.
    """
    is_even = jax.lax.axis_index(axis) % 2 == 0
    return jnp.where(is_even, x, y), jnp.where(is_even, y, x)
