"""Sequences split over the devices of a mesh axis, so that causal attention costs each the same.

Over c devices a sequence is cut into 2c stripes, and device i holds stripes i and 2c - 1 - i: an
early one, whose queries see few keys, and a late one. In natural order the last device would have
nearly twice the average work, and all others would wait for it.

These functions run inside `jax.shard_map`, on the local part of an array.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def device_positions(length: int, parts: int) -> np.ndarray:
    """The positions each device holds, int32 [parts, length / parts]."""
    stripes = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    return np.concatenate([stripes[:parts], stripes[: parts - 1 : -1]], axis=1)


def local_positions(count: int, axis: str) -> jax.Array:
    """The positions of this device's `count` rows, int32 [count]."""
    parts = jax.lax.axis_size(axis)
    return jnp.asarray(device_positions(parts * count, parts))[jax.lax.axis_index(axis)]


def to_balanced_order(x: jax.Array, axis: str) -> jax.Array:
    """From natural order, where device i holds stripes 2i and 2i + 1; along dimension 1."""
    even, odd = jnp.split(x, 2, axis=1)
    send = _holders(jax.lax.axis_size(axis))
    even, odd = (
        jax.lax.ppermute(part, axis, list(enumerate(to)))
        for part, to in zip((even, odd), send, strict=True)
    )
    first, second = _swapped_where_odd(even, odd, axis)
    return jnp.concatenate([first, second], axis=1)


def to_natural_order(x: jax.Array, axis: str) -> jax.Array:
    """The inverse of `balanced`."""
    first, second = jnp.split(x, 2, axis=1)
    even, odd = _swapped_where_odd(first, second, axis)
    send = _holders(jax.lax.axis_size(axis))
    parts = [
        jax.lax.ppermute(part, axis, [(j, i) for i, j in enumerate(to)])
        for part, to in zip((even, odd), send, strict=True)
    ]
    return jnp.concatenate(parts, axis=1)


def gather_in_natural_order(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """The whole of a balanced sequence, in natural order, along dimension `dim`."""
    x = jax.lax.all_gather(x, axis, axis=dim)  # [..., c, 2 stripes, ...]
    early, late = jnp.split(x, 2, axis=dim + 1)
    x = jnp.concatenate([early, jnp.flip(late, dim)], axis=dim)
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])


def _holders(parts: int) -> list[list[int]]:
    """Of the even stripes and of the odd ones: the device that holds each."""
    holder = [*range(parts), *reversed(range(parts))]
    return [holder[0::2], holder[1::2]]


def _swapped_where_odd(x, y, axis: str) -> tuple[jax.Array, jax.Array]:
    """Of stripes i and 2c - 1 - i one is even, and which one alternates with i."""
    is_even = jax.lax.axis_index(axis) % 2 == 0
    return jnp.where(is_even, x, y), jnp.where(is_even, y, x)
