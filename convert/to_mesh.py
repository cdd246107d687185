"""Loading of Hugging Face checkpoints straight into (sharded) device arrays."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from btlm_jax.checkpoint import checkpoint, narrowing
from btlm_jax.checkpoint import unstacked as unstacked_lib
from btlm_jax.convert.hf.source import HFSource
from btlm_jax.convert.hf.source_config import open_model
from btlm_jax.hf_generation_config import read_generation_config
from btlm_jax.model import finite, sharding, weights
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params, unflatten_tree
from btlm_jax.utils.dtypes import optional_dtype
from btlm_jax.utils.progress import Progress

Index = tuple[slice, ...]


def load_hf(
    source: str | os.PathLike[str],
    mesh: Mesh | None = None,
    rules: sharding.Rules | None = None,
    dtype: DTypeLike | None = None,
    *,
    revision: str | None = None,
    unstacked: bool = False,
    by_layer: bool | None = None,
    allow_nonfinite: bool = False,
) -> tuple[BTLM, Params]:
    """Loads a Hugging Face checkpoint onto a device or a mesh.

    Every process reads only the bytes that its own devices need. The layers of a weight are copied
    to the devices one at a time, so that a host holds only its part of one layer's weight, or of
    the embedding.

    Args:
      source: a directory or Hub id, as for `convert`.
      mesh: mesh to shard the weights over; None puts them on the default device.
      rules: logical axis -> mesh axis; default `sharding.RULES`.
      dtype: dtype of the weights in memory, one of `weights.STORED_DTYPES`; None keeps the stored
        one.
      revision: branch, tag or commit on the Hub.
      unstacked: return the weights unstacked, for decoding.
      by_layer: the old name of `unstacked`; deprecated.
      allow_nonfinite: load weights with NaN or Inf too, to inspect them.

    Returns:
      The model and its weights as `btlm_jax.load` returns them: stacked and padded for the mesh,
      or unstacked.

    Raises:
      FileNotFoundError, ConnectionError, ValueError: as `convert`; or finite weights would be
        infinite in `dtype`.
    """
    unstacked = unstacked_lib.unstacked_option(unstacked, by_layer)
    dtype = optional_dtype(dtype, "dtype", weights.STORED_DTYPES)
    hf, config = open_model(source, revision=revision)
    model = BTLM(
        config,
        rules=rules or sharding.RULES,
        generation_config=read_generation_config(hf.directory),
    )
    total = sum(hf.tensors[leaf.hf_name].nbytes for leaf in weights.disk_leaves(model.config))
    with Progress(total, "B", "load") as progress:
        load = _load_unstacked if unstacked else _load_stacked
        params = load(hf, model, mesh, dtype, progress)
    leaves = list(weights.disk_leaves(config))
    stored = {leaf.path: hf.tensors[leaf.hf_name].dtype for leaf in leaves}

    def read_part(leaf: weights.DiskLeaf, index: Index) -> np.ndarray:
        return hf.read_tensor(leaf.hf_name, index, leaf.weight.shape)

    narrowing.check_narrowed(params, leaves, stored, dtype, read_part)
    if not allow_nonfinite and (counts := finite.nonfinite_by_array(params)):
        raise checkpoint.nonfinite_error(hf.directory, counts)
    return model, params


def _load_unstacked(
    hf: HFSource, model: BTLM, mesh: Mesh | None, dtype: DTypeLike | None, progress: Progress
) -> Params:
    def read_part(leaf: weights.DiskLeaf, index: Index) -> np.ndarray:
        part = hf.read_tensor(leaf.hf_name, index, leaf.weight.shape)
        progress.update(part.nbytes)
        return part

    leaves = weights.disk_leaves(model.config)
    dtypes = {leaf.path: hf.tensors[leaf.hf_name].dtype for leaf in leaves}
    return unstacked_lib.load_unstacked(
        model.config, read_part, dtypes, dtype=dtype, mesh=mesh, rules=model.rules
    )


def _load_stacked(
    hf: HFSource, model: BTLM, mesh: Mesh | None, dtype: DTypeLike | None, progress: Progress
) -> Params:
    """Copies every layer into its place in a stack that is on the devices already."""
    config = model.config
    pad, shardings = sharding.param_layout(config, mesh, model.rules)
    params = {}
    for weight in weights.weight_table(config):
        leaves = weights.disk_leaves_of(weight, config)
        memory_dtype = _common_dtype(hf, weight, leaves) if dtype is None else jnp.dtype(dtype)
        shape, out = weight.padded(pad), shardings[weight.path]
        if not weight.stacked:
            params[weight.path] = _read_sharded(hf, leaves[0], shape, memory_dtype, out)
            progress.update(hf.tensors[leaves[0].hf_name].nbytes)
            continue
        layer_out = sharding.layer_sharding(out)
        stack = _zeros((config.n_layer, *shape), memory_dtype, out)
        for i, leaf in enumerate(leaves):
            layer = _read_sharded(hf, leaf, shape, memory_dtype, layer_out)
            stack = _set_layer(stack, layer, np.int32(i), out)
            progress.update(hf.tensors[leaf.hf_name].nbytes)
        params[weight.path] = stack
    return unflatten_tree(params)


def _common_dtype(hf: HFSource, weight: weights.Weight, leaves: list[weights.DiskLeaf]) -> np.dtype:
    """Returns the dtype of all layers of a weight; raises an error with the directory otherwise."""
    try:
        return weights.common_dtype(weight, (hf.tensors[leaf.hf_name].dtype for leaf in leaves))
    except ValueError as e:
        raise ValueError(f"{hf.directory}: {e}") from None


def _read_sharded(
    hf: HFSource, leaf: weights.DiskLeaf, shape: tuple[int, ...], dtype: np.dtype, out: Any
) -> jax.Array:
    """Reads one stored tensor shard by shard, zero-padded to `shape`, with sharding `out`."""
    stored_shape = leaf.weight.shape

    def read_part(index: Index) -> np.ndarray:
        return hf.read_tensor(leaf.hf_name, index, stored_shape)

    return sharding.assemble_array(shape, dtype, out, stored_shape, read_part)


def _zeros(shape: tuple[int, ...], dtype: np.dtype, out: Any) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=out)()


@functools.partial(jax.jit, static_argnames="out", donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, i: jax.Array, out: Any) -> jax.Array:
    """Returns `stack` with layer `i` replaced; donated, so that the devices hold one copy."""
    with sharding.on_mesh(sharding.mesh_of(stack)):
        return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)
