"""Trees of weights: init, flatten, check, unstack, fold."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Mapping
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

Params = dict[str, Any]


def init_params(
    key: jax.Array,
    config: BTLMConfig,
    dtype: DTypeLike = jnp.float32,
    padding: Mapping[str, int] | None = None,
    shardings: Mapping[str, Any] | None = None,
    truncation: float | None = None,
) -> Params:
    """Draws fresh weights; the values depend on neither padding, which is zero, nor sharding.

    Every weight has its own key, derived from its path, so adding a weight changes no other. They
    are drawn one by one: the peak of memory is the result and one weight.

    Args:
      shardings: a tree like the result; default the default device.
      truncation: draw within this many standard deviations of the plain normal, whose standard
        deviation shrinks with it (0.88 of it at 2), as in the original training.
    """
    placed = flatten_tree(shardings) if shardings is not None else {}
    leaves = {}
    for w in weight_table(config):
        shape, target = stacked_shape(w, config), stacked_shape(w, config, padding)
        out = placed.get(w.path)
        draw = _drawer(shape, target, w.mean, w.std, truncation, jnp.dtype(dtype), out)
        leaves[w.path] = draw(jax.random.fold_in(key, zlib.crc32(w.name.encode())))
    return unflatten_tree(leaves)


@functools.cache
def _drawer(shape, target, mean, std, truncation, dtype, sharding):
    """A compiled function from a key to N(mean, std²) of `shape`, zero-padded to `target`."""

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
    """The same model without CompleteP, as Hugging Face's code can run it.

    The factor on residual branches is multiplied into the kernels and biases of their
    out-projections, in their dtype: exact if it is a power of two (and nothing underflows), else
    rounded. The result is for inference and export; what is trained on is the original. `save` it
    with `assets=asset_files(path)` to carry the tokenizer of a checkpoint along.

    Args:
      config: with CompleteP or without; then nothing changes.
      params: its weights, sharded or not, padded or not.
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
    """A nested dict as a flat one keyed by path."""
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            for path, leaf in flatten_tree(value).items():
                flat[(key, *path)] = leaf
        else:
            flat[(key,)] = value
    return flat


def unflatten_tree(flat: Mapping[Path, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def unstack_params(config: BTLMConfig, params: Mapping[str, Any]) -> Params:
    """The weights with every layer's apart, as decoding wants them: {"blocks": {"0": {...}}}."""
    return unflatten_tree({leaf.path: x for leaf, x in iter_unstacked(config, params)})


def iter_unstacked(config: BTLMConfig, params: Mapping[str, Any]) -> Iterator[tuple[DiskLeaf, Any]]:
    """Every weight of every layer, one after the other: cut out of stacked ones, or as it is."""
    flat, apart = flatten_tree(params), is_unstacked(params)
    for leaf in disk_leaves(config):
        if apart or leaf.layer is None:
            yield leaf, flat[leaf.path]
        else:
            stacked = flat[leaf.weight.path]
            yield leaf, jax.lax.index_in_dim(stacked, leaf.layer, 0, keepdims=False)


def is_unstacked(params: Mapping[str, Any]) -> bool:
    """Whether every layer's weights are apart, not stacked."""
    return "0" in params.get("blocks", {})


def check_params(params: Mapping[str, Any], config: BTLMConfig) -> dict[str, int]:
    """Checks a tree of weights, stacked or by layer, against the table.

    Returns:
      Its padding by logical axis.

    Raises:
      ValueError: weights are missing, unexpected or of the wrong shape; all are listed.
    """
    flat, apart = flatten_tree(params), is_unstacked(params)
    known = {x.path: x.weight for x in disk_leaves(config)} if apart else weights_by_path(config)
    problems = [f"missing: {'/'.join(p)}" for p in known if p not in flat]
    problems += [f"unexpected: {'/'.join(p)}" for p in flat if p not in known]
    sizes, padding = paddable_sizes(config), {}
    for path, w in known.items():
        for axis in sizes.keys() - padding.keys():
            if path in flat and axis in w.axes:
                size = _size_of(flat[path], w, axis, w.stacked and not apart)
                padding |= {} if size is None else {axis: size}
    padding = {a: n for a, n in padding.items() if n > sizes[a]}
    for path, leaf in flat.items():
        if path not in known:
            continue
        w, kinds = known[path], jnp.floating
        expected = (config.n_layer,) * (w.stacked and not apart) + w.padded(padding)
        if isinstance(leaf, PackedWeight):
            expected, kinds = w.transposed_shape(padding), jnp.number
        if tuple(leaf.shape) != expected:
            problems.append(f"{'/'.join(path)}: found shape {leaf.shape}, expected {expected}")
        if not jnp.issubdtype(leaf.dtype, kinds):
            problems.append(f"{'/'.join(path)}: found dtype {leaf.dtype}, expected a float")
    if problems:
        raise ValueError("the weights do not match the configuration:\n  " + "\n  ".join(problems))
    return padding


def _size_of(leaf: Any, w: Weight, axis: str, stacked: bool) -> int | None:
    """The size of a logical axis of a weight; None if it has not even as many dimensions."""
    dim = w.axes.index(axis)
    if isinstance(leaf, PackedWeight):
        if dim in w.inputs:  # flattened; the table pads none that has others beside it
            return leaf.inputs
        dim = [i for i in range(len(w.axes)) if i not in w.inputs].index(dim)
    dim += stacked
    return leaf.shape[dim] if len(leaf.shape) > dim else None
