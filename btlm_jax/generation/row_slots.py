"""The slots of a running batch: rows that end make room for others, without compiling anything."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.generation.sample_loop import SampleState
from btlm_jax.model import sharding


def free_slots(slots: Sequence[Any], num_shards: int, count: int) -> np.ndarray:
    """Returns free slots for `count` rows in each shard, shard by shard; R where there is none.

    Args:
      slots: what runs in each of the R slots, or None.
      num_shards: shards of the mesh that hold neighboring slots.
      count: rows in each shard.
    """
    size, targets = len(slots) // num_shards, []
    for shard in range(num_shards):
        own = range(shard * size, (shard + 1) * size)
        free = [slot for slot in own if slots[slot] is None][:count]
        targets += free + [len(slots)] * (count - len(free))
    return np.array(targets, np.int32)


# `like` is kept although unused, because it tells JAX the devices.
@functools.partial(jax.jit, static_argnames="rows", keep_unused=True)
def blank_state(like: Any, rows: int) -> Any:
    """Returns a state of `rows` rows, all done, with the dtypes and shardings of another."""

    def ones(x: jax.Array) -> jax.Array:  # a length of 1 and done = True: never looked at
        out = None if mesh is None else jax.typeof(x).sharding
        return jnp.ones((rows, *x.shape[1:]) if x.ndim else (), x.dtype, out_sharding=out)

    mesh = sharding.mesh_of(like[0].layers)
    with sharding.on_mesh(mesh):
        return jax.tree.map(ones, like)


@functools.partial(jax.jit, donate_argnames="running")
def insert_rows(running: Any, rows: Any, targets: jax.Array) -> Any:
    """Inserts `rows` [n, ...] into the slots `targets` of `running`.

    Args:
      running: the running state of R rows, which is donated.
      rows: the state of n rows. On a mesh, each shard of it goes into the same shard of `running`.
      targets: int32 [n]; rows whose target is R are dropped.
    """
    num_rows = len(running[1].done)

    def insert_local(old, new, targets):
        # Slot numbers within the shard; one past its end is dropped.
        local = jnp.where(targets < num_rows, targets % len(old), len(old))
        return old.at[local].set(new, mode="drop")

    def insert(old: jax.Array, new: jax.Array) -> jax.Array:
        if not old.ndim:  # counters shared by all rows
            return old
        spec = jax.typeof(old).sharding.spec
        if spec[0] is None:
            return insert_local(old, new, targets)
        batch_spec = jax.sharding.PartitionSpec(spec[0])
        specs = dict(in_specs=(spec, spec, batch_spec), out_specs=spec)
        sharded_targets = jax.reshard(targets, batch_spec)
        return jax.shard_map(insert_local, **specs)(old, new, sharded_targets)

    with sharding.on_mesh(sharding.mesh_of(running[0].layers)):
        return jax.tree.map(insert, running, rows)


@functools.partial(jax.jit, static_argnames="size")
def recent_tokens(s: SampleState, seen_R, restarted_R, size: int) -> dict[str, jax.Array]:
    """Returns copies of the tokens that rows have had since the last call.

    They are copies, because the next step donates the state.

    Args:
      s: the state.
      seen_R: int32, lengths of the rows at the last call.
      restarted_R: int32, lengths of the prompts of rows that started since then, -1 for others.
      size: at least as many as there are new tokens.

    Returns:
      "tokens" and "logprobs" [R, size], of which those between "seen" and "length" [R] are valid.
    """
    seen = jnp.where(restarted_R >= 0, restarted_R, seen_R)
    slots = jnp.minimum(seen[:, None] + jnp.arange(size), s.ids.shape[1] - 1)
    tokens, logprobs = (jnp.take_along_axis(x, slots, 1) for x in (s.ids, s.logprobs))
    return {"tokens": tokens, "logprobs": logprobs, "seen": seen, "length": s.length + 0}
