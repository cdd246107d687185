"""Trees of parameters: init, flatten, check, unstack, fold.

A tree is a nested dict of arrays, keyed by the paths of `weights.weight_table`. Its layers are
stacked ([L, ...] under "blocks"), or unstacked ("blocks", "0", ...), as decoding wants them.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from btlm_jax.config import BTLMConfig
from btlm_jax.model.packed import PackedWeight
from btlm_jax.model.weights import (
    DiskLeaf,
    Path,
    Weight,
    disk_leaves,
    paddable_sizes,
    stacked_shape,
    weight_table,
    weights_by_path,
)
from btlm_jax.utils.dtypes import checked_dtype
from btlm_jax.utils.format import list_first

Params = dict[str, Any]


def init_params(
    key: jax.Array,
    config: BTLMConfig,
    dtype: DTypeLike = jnp.float32,
    padding: Mapping[str, int] | None = None,
    shardings: Mapping[str, Any] | None = None,
    truncation: float | None = None,
) -> Params:
    """Draws fresh weights; their values depend neither on padding, which is zero, nor on sharding.

    Every weight has its own key, derived from its path, so that adding a weight changes no other.
    Weights are drawn one at a time: peak memory is the result and one more weight.

    Args:
      key: PRNG key.
      config: configuration of the model.
      dtype: dtype of the weights, a float; they are drawn in fp32.
      padding: padded sizes by logical axis, from `sharding.param_padding`.
      shardings: a tree of shardings like the result; None is the default device.
      truncation: the number of standard deviations at which the normal distribution is truncated,
        which reduces its standard deviation (to 0.88 of it at 2), as in the original training.
    """
    dtype = checked_dtype(dtype, "dtype")
    flat_shardings = flatten_tree(shardings) if shardings is not None else {}
    leaves = {}
    for w in weight_table(config):
        init = weight_initializer(w, truncation, flat_shardings.get(w.path))
        weight_key = jax.random.fold_in(key, zlib.crc32(w.name.encode()))
        leaves[w.path] = init(weight_key, stacked_shape(w, config, padding), dtype)
    return unflatten_tree(leaves)


def weight_initializer(
    w: Weight, truncation: float | None = None, sharding: Any = None
) -> Callable[..., jax.Array]:
    """Returns the initializer of a weight, f(key, shape, dtype), as `jax.nn.initializers` has them.

    Args:
      w: the weight. The shape may be padded, with zeros in the padding, and may have leading
        dimensions, such as that of the layers.
      truncation: as in `init_params`.
      sharding: the sharding of the result; None is JAX's choice.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        unpadded = (*shape[: len(shape) - len(w.shape)], *w.shape)
        dtype = jnp.dtype(dtype)
        return _make_sampler(unpadded, shape, w.mean, w.std, truncation, dtype, sharding)(key)

    return init


@functools.cache
def _make_sampler(shape, target, mean, std, truncation, dtype, sharding):
    """Returns a compiled function from a key to N(mean, std²) of `shape`, padded to `target`."""

    def normal(key):
        if truncation is None:
            return jax.random.normal(key, shape)
        return jax.random.truncated_normal(key, -truncation, truncation, shape)

    def draw(key):
        value = mean + std * normal(key) if std else jnp.full(shape, mean)
        pads = [(0, n - m) for m, n in zip(shape, target, strict=True)]
        return jnp.pad(value.astype(dtype), pads)

    return jax.jit(draw, out_shardings=sharding)


def fold_completep(config: BTLMConfig, params: Mapping[str, Any]) -> tuple[BTLMConfig, Params]:
    """Returns the same model without CompleteP, which Hugging Face's code can run.

    The factor on residual branches is multiplied into the kernels and biases of their
    out-projections, in their dtype: exact if it is a power of two (and nothing underflows), else
    rounded. The result is for inference and export; continue training from the original. `save` it
    with `assets=asset_files(path)` to carry the tokenizer of a checkpoint along.

    Args:
      config: the configuration; without CompleteP, nothing changes.
      params: the weights, sharded or not, padded or not.

    Returns:
      The configuration without CompleteP, and the weights for it.
    """
    scale, flat = config.residual_scale, flatten_tree(params)
    if scale != 1.0:
        residual = {p for p in weights_by_path(config) if p[-2:-1] == ("c_proj",)}

        def scaled(x):
            return (x.astype(jnp.float32) * scale).astype(x.dtype)

        flat = {path: scaled(x) if path in residual else x for path, x in flat.items()}
    plain = dataclasses.replace(config, completep_base_layers=None, completep_alpha=1.0)
    return plain, unflatten_tree(flat)


def flatten_tree(tree: Mapping[str, Any]) -> dict[Path, Any]:
    """Returns a nested dict as a flat one, keyed by path."""
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            for path, leaf in flatten_tree(value).items():
                flat[(key, *path)] = leaf
        else:
            flat[(key,)] = value
    return flat


def unflatten_tree(flat: Mapping[Path, Any]) -> Params:
    """Returns a flat dict as a nested one: the inverse of `flatten_tree`."""
    tree: Params = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def unstack_params(config: BTLMConfig, params: Mapping[str, Any]) -> Params:
    """Unstacks the layers: {"blocks": {"0": {...}}}, which decodes fastest."""
    return unflatten_tree({leaf.path: x for leaf, x in iter_unstacked(config, params)})


def iter_unstacked(config: BTLMConfig, params: Mapping[str, Any]) -> Iterator[tuple[DiskLeaf, Any]]:
    """Yields (leaf, array) for the weights of every layer, slicing stacked arrays."""
    flat, unstacked = flatten_tree(params), is_unstacked(params)
    for leaf in disk_leaves(config):
        if unstacked or leaf.layer is None:
            yield leaf, flat[leaf.path]
        else:
            stacked = flat[leaf.weight.path]
            yield leaf, jax.lax.index_in_dim(stacked, leaf.layer, 0, keepdims=False)


def is_unstacked(params: Mapping[str, Any]) -> bool:
    """Returns whether every layer has its own arrays, instead of stacked ones."""
    return "0" in params.get("blocks", {})


def check_params(params: Mapping[str, Any], config: BTLMConfig) -> dict[str, int]:
    """Checks a tree of weights, stacked or unstacked, against the table.

    Returns:
      The padded sizes of the tree by logical axis; empty if nothing is padded.

    Raises:
      ValueError: weights are missing, unexpected or of the wrong shape or dtype.
    """
    flat, unstacked = flatten_tree(params), is_unstacked(params)
    known = (
        {x.path: x.weight for x in disk_leaves(config)} if unstacked else weights_by_path(config)
    )
    problems = [f"missing: {'/'.join(p)}" for p in known if p not in flat]
    problems += [f"unexpected: {'/'.join(p)}" for p in flat if p not in known]
    sizes, padding = paddable_sizes(config), {}
    for path, w in known.items():
        for axis in sizes.keys() - padding.keys():
            if path in flat and axis in w.axes:
                size = _axis_size(flat[path], w, axis, w.stacked and not unstacked)
                padding |= {} if size is None else {axis: size}
    padding = {a: n for a, n in padding.items() if n > sizes[a]}
    for path, leaf in flat.items():
        if path not in known:
            continue
        w, kinds = known[path], jnp.floating
        expected = (config.n_layer,) * (w.stacked and not unstacked) + w.padded(padding)
        if isinstance(leaf, PackedWeight):
            expected, kinds = w.transposed_shape(padding), jnp.number
        if tuple(leaf.shape) != expected:
            problems.append(f"{'/'.join(path)}: found shape {leaf.shape}, expected {expected}")
        if not jnp.issubdtype(leaf.dtype, kinds):
            problems.append(f"{'/'.join(path)}: found dtype {leaf.dtype}, expected a float")
    if problems:
        raise ValueError(f"the weights do not match the configuration:{list_first(problems)}")
    return padding


def _axis_size(leaf: Any, w: Weight, axis: str, stacked: bool) -> int | None:
    """Returns the size of a logical axis of a weight; None if the array has too few dimensions."""
    dim = w.axes.index(axis)
    if isinstance(leaf, PackedWeight):
        if dim in w.inputs:  # inputs are flattened, but padded ones are always alone
            return leaf.inputs
        dim = [i for i in range(len(w.axes)) if i not in w.inputs].index(dim)
    dim += stacked
    return leaf.shape[dim] if len(leaf.shape) > dim else None
