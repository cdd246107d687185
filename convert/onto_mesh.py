"""A Hugging Face checkpoint straight into (sharded) device arrays, without Orbax in between."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import DTypeLike

from btlm_jax import sharding, weights
from btlm_jax.model import BTLM
from btlm_jax.progress import Progress

from .hf_source import HFSource, open_hf
from .to_orbax import read_config

Index = tuple[slice, ...]


def load_hf(
    source: str | os.PathLike[str],
    mesh: Mesh | None = None,
    rules: sharding.Rules | None = None,
    dtype: DTypeLike | None = None,
    *,
    revision: str | None = None,
) -> tuple[BTLM, weights.Params]:
    """Loads a Hugging Face checkpoint onto a device or a mesh.

    Every process reads the bytes its own devices need and no others. The layers of a weight are
    read one at a time into their place on the devices, so a host holds the local part of one
    layer's weight, or of the embedding, at any time.

    Args:
      source: a directory or Hub id, as for `convert`.
      mesh: shard the weights over it; None puts them on the default device.
      rules: logical axis -> mesh axis; default `sharding.RULES`.
      dtype: of the weights in memory; None keeps the stored one.
      revision: branch, tag or commit on the Hub.

    Returns:
      The model and its stacked weights, padded for the mesh, as `btlm_jax.load` returns them.

    Raises:
      FileNotFoundError, ConnectionError, ValueError: as `convert`.
    """
    hf = open_hf(source, revision=revision)
    model = BTLM(read_config(hf), rules=rules or sharding.RULES)
    config = model.config
    pad = sharding.padding(config, mesh, model.rules) if mesh is not None else {}
    if mesh is not None:
        placed = weights.flatten(sharding.param_shardings(config, mesh, model.rules, pad))
    else:
        single = SingleDeviceSharding(jax.devices()[0])
        placed = {w.path: single for w in weights.table(config)}
    params = {}
    leaves = list(weights.disk_leaves(config))
    with Progress(sum(hf.tensors[x.hf_name].nbytes for x in leaves), "B", "load") as progress:
        for w in weights.table(config):
            mine = [leaf for leaf in leaves if leaf.weight is w or leaf.weight == w]
            to = jnp.dtype(dtype) if dtype is not None else _one_dtype(hf, w, mine)
            shape, out = w.padded(pad), placed[w.path]
            if not w.stacked:
                params[w.path] = _read(hf, mine[0], shape, to, out)
                progress.update(hf.tensors[mine[0].hf_name].nbytes)
                continue
            one = out
            if isinstance(out, NamedSharding):
                one = NamedSharding(out.mesh, PartitionSpec(*out.spec[1:]))
            stack = _zeros((config.n_layer, *shape), to, out)
            for i, leaf in enumerate(mine):
                stack = _put(stack, _read(hf, leaf, shape, to, one), np.int32(i), out)
                progress.update(hf.tensors[leaf.hf_name].nbytes)
            params[w.path] = stack
    return model, weights.unflatten(params)


def _one_dtype(hf: HFSource, w: weights.Weight, leaves: list[weights.DiskLeaf]) -> np.dtype:
    dtypes = {hf.tensors[leaf.hf_name].dtype for leaf in leaves}
    if len(dtypes) > 1:
        raise ValueError(
            f"{hf.directory}: the layers of {w.name} are stored as "
            f"{', '.join(sorted(map(str, dtypes)))} and cannot be stacked as they are; pass dtype="
        )
    return dtypes.pop()


def _read(
    hf: HFSource, leaf: weights.DiskLeaf, shape: tuple[int, ...], dtype: np.dtype, out: Any
) -> jax.Array:
    """One stored tensor, zero-padded to `shape`, read shard by shard."""

    @functools.cache  # devices that hold the same part share one read
    def part(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        inner = [(a, min(b, n)) for (a, b), n in zip(bounds, leaf.weight.shape, strict=True)]
        sizes = [b - a for a, b in bounds]
        if any(b <= a for a, b in inner):
            return np.zeros(sizes, dtype)
        index = tuple(slice(a, b) for a, b in inner)
        found = hf.read(leaf.hf_name, index, leaf.weight.shape).astype(dtype, copy=False)
        if list(found.shape) == sizes:
            return found
        return np.pad(found, [(0, n - m) for n, m in zip(sizes, found.shape, strict=True)])

    def callback(index: Index | None) -> np.ndarray:
        slices = index or (slice(None),) * len(shape)
        return part(tuple(s.indices(n)[:2] for s, n in zip(slices, shape, strict=True)))

    return jax.make_array_from_callback(shape, out, callback)


def _zeros(shape: tuple[int, ...], dtype: np.dtype, out: Any) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=out)()


@functools.partial(jax.jit, static_argnames="out", donate_argnums=0)
def _put(stack: jax.Array, layer: jax.Array, i: jax.Array, out: Any) -> jax.Array:
    """`stack` with one layer put in place; donated, so the devices hold one copy."""
    placed: Callable = jax.lax.dynamic_update_index_in_dim
    with sharding.on_mesh(sharding.mesh_of(stack)):
        return placed(stack, layer, i, 0)
