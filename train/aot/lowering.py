"""The train step and the decoding step of a recipe, lowered for devices that are not attached."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from btlm_jax.checkpoint import unstacked
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.model import sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import CACHE_DTYPES
from btlm_jax.perf import accounting
from btlm_jax.train.recipe import Phase, Recipe
from btlm_jax.train.recipe_build import build_model, build_optimizer, build_step
from btlm_jax.train.step import abstract_state, abstract_weights
from btlm_jax.utils.dtypes import optional_dtype

_HOST = "pinned_host"


class ArgumentBytes(NamedTuple):
    """Bytes per device of a program's arguments."""

    parameters: int
    optimizer: int  # optimizer state, unless it is on the host, and counters; 0 when decoding
    inputs: int  # the batch; when decoding, the cache and the tokens


class LoweredProgram(NamedTuple):
    """A lowered program for a mesh."""

    program: jax.stages.Lowered
    arguments: ArgumentBytes
    model: BTLM
    dtype: np.dtype  # compute dtype


def lower_train_step(recipe: Recipe, phase: Phase, mesh: Mesh) -> LoweredProgram:
    """Lowers the step that `btlm train` runs in this phase.

    Raises:
      ValueError: the model, batch or length does not fit the mesh.
    """
    model = build_model(recipe)
    tx = build_optimizer(recipe, model.config)
    state = abstract_state(model, tx, mesh)
    if recipe.run.offload_optimizer:
        state = state._replace(opt_state=jax.tree.map(_on_host, state.opt_state))
    microbatch = phase.microbatch_size
    sharding.check_batch(microbatch, mesh.abstract_mesh, model.rules, phase.length)
    spec = PartitionSpec(None, *sharding.partition_spec(model.rules, "batch"), None)
    shape = (phase.batch_size // microbatch, microbatch, phase.length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec))
    batch = (tokens, tokens) if recipe.data.mask_documents else (tokens,)
    step: Any = build_step(recipe, model, tx)
    counters = (state.step, state.skipped, state.bad_in_a_row)
    arguments = ArgumentBytes(
        bytes_per_device(state.params),
        bytes_per_device((state.opt_state, counters)),
        bytes_per_device(batch),
    )
    dtype = model.runtime(state.params).dtype
    return LoweredProgram(step.lower(state, *batch), arguments, model, dtype)


def lower_decode_step(
    recipe: Recipe,
    mesh: Mesh,
    batch_size: int,
    capacity: int,
    quantize: Quantization | None = None,
    cache_dtype: DTypeLike | None = None,
) -> LoweredProgram:
    """Lowers one step of `btlm generate`: one token per sequence, with a cache updated in place.

    Weights are unstacked and in the compute dtype, as they are when a checkpoint is loaded for
    generation. The compiler chooses the layout of the cache, as it does inside the loop of
    `generate`; in the default layout the cache would be copied at the start and end of every step.

    Args:
      recipe: the recipe, for its model.
      mesh: the devices.
      batch_size: sequences over all devices.
      capacity: slots of the KV cache.
      quantize: the scheme of the weights; None is the compute dtype.
      cache_dtype: as in `BTLM.init_cache`.

    Raises:
      ValueError: the model or batch does not fit the mesh.
    """
    cache_dtype = optional_dtype(cache_dtype, "cache_dtype", CACHE_DTYPES)
    model = build_model(recipe)
    dtype = model.runtime(abstract_weights(model, mesh)).dtype
    params = unstacked.abstract_unstacked(model.config, dtype, quantize, mesh, model.rules)
    sharding.check_batch(batch_size, mesh.abstract_mesh, model.rules)

    def on_mesh(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    empty = jax.eval_shape(
        lambda p: model.init_cache(p, batch_size, capacity, dtype=cache_dtype), params
    )
    cache = jax.tree.map(on_mesh, dataclasses.replace(empty, fresh=False))
    spec = sharding.partition_spec(model.rules, "batch", None)
    tokens = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32, sharding=NamedSharding(mesh, spec))

    def step(params, tokens, cache):
        return model.apply(params, tokens, cache=cache)

    formats = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding), cache)
    program = jax.jit(
        step, donate_argnums=2, in_shardings=(None, None, formats), out_shardings=(None, formats)
    ).lower(params, tokens, cache)
    arguments = ArgumentBytes(bytes_per_device(params), 0, bytes_per_device((tokens, cache)))
    return LoweredProgram(program, arguments, model, dtype)


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree of sharded arrays or their descriptions.

    Arrays in the host's memory do not count.
    """
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
