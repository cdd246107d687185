"""A recipe's training step, and decoding, lowered for devices that need not be here."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btlm_jax.checkpoint import unstacked
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.model import sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.perf import accounting
from btlm_jax.train.recipe import Phase, Recipe
from btlm_jax.train.recipe_build import build_mesh, build_model, build_optimizer, build_step
from btlm_jax.train.step import abstract_state, abstract_weights

_HOST = "pinned_host"


class Parts(NamedTuple):
    """Bytes per device of a program's arguments."""

    parameters: int
    optimizer: int  # its state, where it is not on the host, and counters; of decoding, nothing
    inputs: int  # the batch; of decoding, the cache and the tokens


class Lowered(NamedTuple):
    """A program for a mesh, not compiled yet."""

    program: jax.stages.Lowered
    parts: Parts
    model: BTLM
    dtype: np.dtype  # of the computation


def mesh_of(recipe: Recipe, devices: list[jax.Device]) -> Mesh:
    """The recipe's mesh over these devices.

    Raises:
      ValueError: it does not fit them.
    """
    return build_mesh(recipe, devices)


def train_step(recipe: Recipe, phase: Phase, mesh: Mesh) -> Lowered:
    """The step that `btlm train` would run in this phase.

    Raises:
      ValueError: model, batch or length do not fit the mesh.
    """
    model = build_model(recipe)
    tx = build_optimizer(recipe, model.config)
    state = abstract_state(model, tx, mesh)
    if recipe.run.offload_optimizer:
        state = state._replace(opt_state=jax.tree.map(_on_host, state.opt_state))
    micro = phase.microbatch or phase.batch_size
    sharding.check_batch(micro, mesh.abstract_mesh, model.rules, phase.length)
    place = NamedSharding(
        mesh, PartitionSpec(None, *sharding.partition_spec(model.rules, "batch"), None)
    )
    shape = (phase.batch_size // micro, micro, phase.length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    batch = (tokens, tokens) if recipe.data.mask_documents else (tokens,)
    step: Any = build_step(recipe, model, tx)
    counters = (state.step, state.skipped, state.bad_in_a_row)
    parts = Parts(
        held_bytes(state.params), held_bytes((state.opt_state, counters)), held_bytes(batch)
    )
    dtype = model.runtime(state.params).dtype
    return Lowered(step.lower(state, *batch), parts, model, dtype)


def decode_step(
    recipe: Recipe,
    mesh: Mesh,
    batch_size: int,
    capacity: int,
    to: Quantization | None = None,
    cache_dtype: str | None = None,
) -> Lowered:
    """One step of `btlm generate`: a token per sequence, through a cache that is updated in place.

    Weights are by layer and in the compute dtype, as a checkpoint to generate from would be loaded.
    The cache is laid out as the compiler likes it, as where it stays within one program: in the
    default layout it would be copied at the beginning and at the end of every step.

    Args:
      to: what the weights are quantized to.
      cache_dtype: as in `BTLM.init_cache`.

    Raises:
      ValueError: model or batch do not fit the mesh.
    """
    model = build_model(recipe)
    dtype = model.runtime(abstract_weights(model, mesh)).dtype
    params = unstacked.abstract_unstacked(model.config, dtype, to, mesh, model.rules)
    sharding.check_batch(batch_size, mesh.abstract_mesh, model.rules)

    def on_devices(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec() if x.sharding is None else x.sharding.spec
        place = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    empty = jax.eval_shape(
        lambda p: model.init_cache(p, batch_size, capacity, dtype=cache_dtype), params
    )
    cache = jax.tree.map(on_devices, dataclasses.replace(empty, fresh=False))
    place = NamedSharding(mesh, sharding.partition_spec(model.rules, "batch", None))
    tokens = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32, sharding=place)

    def step(params, tokens, cache):
        return model.apply(params, tokens, cache=cache)

    laid_out = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding), cache)
    program = jax.jit(
        step, donate_argnums=2, in_shardings=(None, None, laid_out), out_shardings=(None, laid_out)
    ).lower(params, tokens, cache)
    parts = Parts(held_bytes(params), 0, held_bytes((tokens, cache)))
    return Lowered(program, parts, model, dtype)


def held_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of sharded arrays or their descriptions, its host's
    memory not counted."""
    return sum(
        accounting.array_bytes(x.sharding.shard_shape(x.shape), x.dtype)
        for x in jax.tree.leaves(tree)
        if x.sharding.memory_kind != _HOST
    )


def _on_host(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the description of an array that `step.move_optimizer_state` moved to the host."""
    if not x.ndim:
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind(_HOST))
