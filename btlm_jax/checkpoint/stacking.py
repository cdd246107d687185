"""Conversion between stacked weights in memory and the arrays on disk, one per layer.

In memory, the layers of a weight are stacked, and a mesh may pad some axes; on disk every layer has
an array of its own, without padding.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.config import BTLMConfig
from btlm_jax.model import sharding, weights


def stack_layers(
    config: BTLMConfig,
    arrays: dict[weights.Path, jax.Array],
    shardings: Mapping[weights.Path, Any],
) -> dict[weights.Path, jax.Array]:
    """Stacks the layers of stored arrays.

    Args:
      config: the model.
      arrays: stored arrays by path on disk; removed from the dict as they are stacked.
      shardings: shardings of the stacked weights, by path in memory.

    Returns:
      Weights by path in memory.

    Raises:
      ValueError: the layers of a weight differ in dtype.
    """
    stacked = {}
    for w in weights.weight_table(config):
        if w.path not in shardings:
            continue
        # One weight at a time, so that only one weight is ever in memory twice.
        layers = [arrays.pop(leaf.path) for leaf in weights.disk_leaves_of(w, config)]
        weights.common_dtype(w, (x.dtype for x in layers))
        stacked[w.path] = _stack(layers, shardings[w.path]) if w.stacked else layers[0]
    return stacked


def _stack(layers: list[jax.Array], out: Any) -> jax.Array:
    return jax.jit(lambda xs: jnp.stack(xs), out_shardings=out)(layers)


@functools.partial(jax.jit, static_argnames="config")
def unstack_layers(config: BTLMConfig, stacked: Mapping[weights.Path, jax.Array]):
    """Returns the stored arrays, by path on disk, of stacked weights or of arrays of their shapes.

    Padding is stripped. The function is jitted, so that a training step need not wait;
    `unstack_layer` checks in addition that the padding is zero.

    Args:
      config: the model.
      stacked: arrays by path in memory.
    """
    arrays = {}
    for leaf in weights.disk_leaves(config):
        if leaf.weight.path in stacked:
            x = stacked[leaf.weight.path]
            arrays[leaf.path] = _strip_layer(x, leaf.layer, leaf.weight.shape)[0]
    return arrays


def unstack_layer(stacked: Any, leaf: weights.DiskLeaf) -> Any:
    """Returns one stored array of a stacked weight, which may be padded and sharded.

    Raises:
      ValueError: the padding is not zero.
    """
    w = leaf.weight
    if isinstance(stacked, jax.Array):
        array, nonzero = _strip_layer(stacked, leaf.layer, w.shape)
    else:
        layer = stacked if leaf.layer is None else stacked[leaf.layer]
        array, nonzero = _strip_padding(np.asarray(layer), w.shape)
    # Weights of another configuration look padded too: only zeros may be stripped.
    if any(bool(x) for x in nonzero):
        raise ValueError(
            f"{w.name}: found values beyond its shape {w.shape}, expected zero padding there; does "
            "the configuration belong to these weights?"
        )
    return array


@functools.partial(jax.jit, static_argnames="shape")
def _strip_layer(x: jax.Array, layer: int | None, shape: tuple[int, ...]):
    """`_strip_padding` of one layer, or with `layer` None of a weight outside the layers."""
    mesh = sharding.mesh_of(x)
    with sharding.on_mesh(mesh):
        if layer is not None:
            x = jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
        if mesh is not None:
            # A padded axis is gathered first: without its padding it does not split evenly.
            spec = jax.typeof(x).sharding.spec
            axes = [s if m == n else None for s, m, n in zip(spec, x.shape, shape, strict=True)]
            x = jax.sharding.reshard(x, jax.sharding.PartitionSpec(*axes))
        return _strip_padding(x, shape)


def _strip_padding(x: Any, shape: tuple[int, ...]) -> tuple[Any, list[Any]]:
    """Returns `x` stripped to `shape`, and for every padded axis whether its padding is nonzero."""
    nonzero = [
        (x[(slice(None),) * dim + (slice(n, None),)] != 0).any()
        for dim, n in enumerate(shape)
        if n != x.shape[dim]
    ]
    return (x[tuple(slice(n) for n in shape)] if nonzero else x), nonzero
