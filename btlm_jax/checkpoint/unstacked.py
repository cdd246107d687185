"""Unstacked weights, {"blocks": {"0": {...}}}, read straight onto the devices for decoding.

Arrays are read one at a time, and of each one only the parts that local devices hold: the peak
memory of a host is the weights and one array.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from btlm_jax.checkpoint import quantization as quantization_lib
from btlm_jax.checkpoint.metadata import CheckpointMetadata
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.checkpoint.quantize_arrays import unpack_host
from btlm_jax.checkpoint.schemes import INT4_BLOCK
from btlm_jax.config import BTLMConfig
from btlm_jax.model import packed as packed_lib
from btlm_jax.model import sharding, weights
from btlm_jax.model.packed import PackedWeight
from btlm_jax.model.params import Params, unflatten_tree
from btlm_jax.utils.dtypes import optional_dtype

logger = logging.getLogger(__name__)

# Groups smaller than this cause a warning: their scales would take more than 2 bits a weight.
_SMALL_GROUP = 8

Index = tuple[slice, ...]
# Reads a part of a stored array, given by slices with bounds.
ReadPart = Callable[[weights.DiskLeaf, Index], np.ndarray]
# Makes an array from its parts, as `sharding.assemble_array` does.
MakeArray = Callable[..., Any]

_inputs_last = jax.jit(packed_lib.transposed, static_argnums=1)


def unstacked_option(unstacked: bool, by_layer: bool | None) -> bool:
    """Returns the value of `unstacked=`, which was called `by_layer=` before."""
    if by_layer is None:
        return unstacked
    warnings.warn("by_layer= was renamed to unstacked=", DeprecationWarning, stacklevel=3)
    return by_layer


def load_unstacked(
    config: BTLMConfig,
    read: ReadPart,
    dtypes: Mapping[weights.Path, DTypeLike],
    *,
    quantization: Quantization | None = None,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.RULES,
    make: MakeArray = sharding.assemble_array,
) -> Params:
    """Loads weights without stacking their layers.

    A quantized weight becomes a `PackedWeight`. On a CPU without a mesh, int4 stays packed, and the
    inputs of float weights become the last axis, because CPUs read them fastest that way.
    Elsewhere, int4 becomes an array of jnp.int4, which takes 4 bits on TPUs and GPUs, and float
    weights keep the shape of the table.

    On a mesh, the outputs of a quantized weight are sharded by their logical axes, and its
    flattened inputs by the logical axis of the first one. Where the inputs of a device are not
    whole groups, groups are split into smaller ones with the same scale.

    Args:
      config: the model.
      read: reads the stored arrays, those of `quantization.stored_leaves(config, quantization)`.
      dtypes: dtypes of the stored arrays by path.
      quantization: how the weights are quantized.
      dtype: dtype of float weights (not of scales) in memory; None keeps the stored one.
      mesh, rules: as for `checkpoint.load`.
      make: makes the arrays.

    Raises:
      ValueError: another dtype than one of `weights.STORED_DTYPES`; a weight does not fit the mesh;
        and any error of `read`.
    """
    dtype = optional_dtype(dtype, "dtype", weights.STORED_DTYPES)
    padding, shardings = sharding.param_layout(config, mesh, rules)
    on_cpu = mesh is None and jax.default_backend() == "cpu"
    flat: dict[weights.Path, Any] = {}
    for leaf in weights.disk_leaves(config):
        w = leaf.weight
        out = shardings[w.path]
        out = out if leaf.layer is None else sharding.layer_sharding(out)
        parts = quantization_lib.stored_parts(leaf, quantization)
        if len(parts) == 1:
            memory_dtype = jnp.dtype(dtypes[leaf.path] if dtype is None else dtype)
            read_part = functools.partial(read, parts[0])
            x: Any = make(w.padded(padding), memory_dtype, out, w.shape, read_part)
            if on_cpu and w.inputs:
                # Without waiting, several arrays would be in memory twice.
                x = jax.block_until_ready(_inputs_last(x, w.inputs))
        elif on_cpu:
            values, scales = (
                make(p.shape, p.dtype, out, p.shape, functools.partial(read, p)) for p in parts
            )
            x = PackedWeight(values, scales, w.transposed_shape({})[-1])
        else:
            layout = _kernel_layout(w, w.transposed_shape(padding), mesh, rules, out)
            assert quantization is not None
            scheme = quantization.scheme(w)
            assert scheme is not None
            if scheme.group is None:
                x = _load_per_output(parts, read, layout, make)
            else:
                x = _load_grouped(parts, read, scheme.group, layout, make)
        flat[leaf.path] = x
    return unflatten_tree(flat)


def abstract_unstacked(
    config: BTLMConfig,
    dtype: DTypeLike,
    quantization: Quantization | None,
    mesh: Mesh,
    rules: sharding.Rules = sharding.RULES,
) -> Params:
    """Returns shapes, dtypes and shardings of what `load_unstacked` would return.

    Args:
      config: the model.
      dtype: dtype of float weights.
      quantization: how the weights are quantized.
      mesh, rules: as for `load_unstacked`; the devices need not be attached.
    """

    def make(shape, dtype, out, stored, read) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=out)

    def read(leaf, index) -> np.ndarray:
        raise AssertionError("an abstract array is never read")

    return load_unstacked(
        config,
        read,
        {},
        quantization=quantization,
        dtype=dtype,
        mesh=mesh,
        rules=rules,
        make=make,
    )


def decoding_dtype(
    meta: CheckpointMetadata, dtype: DTypeLike | None, mesh: Mesh | None
) -> np.dtype | None:
    """Returns the compute dtype of a model with unstacked weights; None for the platform's default.

    CPUs multiply weights in the dtype in which they are stored.

    Args:
      meta: of the checkpoint.
      dtype, mesh: as for `checkpoint.load`.

    Raises:
      ValueError: float16 on a CPU, which has no matrix product of float16.
    """
    if mesh is not None or jax.default_backend() != "cpu":
        return None
    if meta.quantization is not None:
        return jnp.dtype(jnp.bfloat16)
    hidden = next(x for x in weights.disk_leaves(meta.config) if x.weight.role == "hidden")
    compute_dtype = jnp.dtype(meta.leaves[hidden.path].dtype if dtype is None else dtype)
    if compute_dtype == jnp.float16:
        found = "weights in float16" if dtype is None else "dtype: found float16"
        raise ValueError(f"{found}: CPUs decode in bfloat16 or float32, pass dtype='bfloat16'")
    return compute_dtype


class _KernelLayout(NamedTuple):
    """Shape and sharding of a kernel in memory.

    Attributes:
      shape: padded, [*O, I].
      split: sharding of an array whose last axis is split like the inputs.
      unsplit: sharding of an array whose last axis is not split.
      num_shards: number of parts into which the inputs are split.
    """

    shape: tuple[int, ...]
    split: jax.sharding.Sharding
    unsplit: jax.sharding.Sharding
    num_shards: int


def _kernel_layout(
    w: weights.Weight,
    shape: tuple[int, ...],
    mesh: Mesh | None,
    rules: sharding.Rules,
    single: jax.sharding.Sharding,
) -> _KernelLayout:
    """Returns the layout of a quantized weight.

    Args:
      w: the weight.
      shape: padded, [*O, I].
      mesh, rules: as for `load_unstacked`.
      single: sharding without a mesh.

    Raises:
      ValueError: the rules split inputs that are not consecutive once flattened.
    """
    if mesh is None:
        return _KernelLayout(shape, single, single, 1)
    outputs = [axis for i, axis in enumerate(w.axes) if i not in w.inputs]
    first, *others = [w.axes[i] for i in w.inputs]
    for axis in others:
        if sharding.num_shards(mesh, rules, axis) > 1:
            raise ValueError(
                f"{w.name}: its inputs {(first, *others)} are split by the rules at {axis!r}; a "
                f"quantized weight can be split at {first!r} only: change rules or mesh"
            )
    split, unsplit = (
        NamedSharding(mesh, sharding.partition_spec(rules, *outputs, axis))
        for axis in (first, None)
    )
    return _KernelLayout(shape, split, unsplit, sharding.num_shards(mesh, rules, first))


def _load_per_output(
    parts: tuple[weights.DiskLeaf, ...],
    read: ReadPart,
    layout: _KernelLayout,
    make: MakeArray,
) -> PackedWeight:
    """Loads a kernel with one scale per output; scales are not split along the last axis."""
    values, scales = parts
    *outputs, inputs = layout.shape
    read_values, read_scales = (functools.partial(read, part) for part in parts)
    return PackedWeight(
        make(layout.shape, values.dtype, layout.split, values.shape, read_values),
        make((*outputs, 1), scales.dtype, layout.unsplit, scales.shape, read_scales),
        inputs,
    )


def _load_grouped(
    parts: tuple[weights.DiskLeaf, ...],
    read: ReadPart,
    group: int,
    layout: _KernelLayout,
    make: MakeArray,
) -> PackedWeight:
    """Loads a kernel with a scale per group, with smaller groups if needed.

    Packed int4 becomes an unpacked array of jnp.int4.
    """
    values, scales = parts
    packed = values.dtype == "uint8"
    *outputs, inputs = layout.shape
    # Inputs that are not split keep their padding, which `packed.dequantize` removes.
    padded = values.shape[-1] * (2 if packed else 1)
    length = inputs if layout.num_shards > 1 else padded
    local = length // layout.num_shards
    smaller = math.gcd(local, group)
    if smaller < min(group, _SMALL_GROUP) and values.layer == 0:
        logger.warning(
            "%s: the %d inputs of a device are no whole groups of %d; scales for every %d take %.1f"
            " bits a weight", values.weight.name, local, group, smaller, 16 / smaller,
        )  # fmt: skip
    repeats = group // smaller

    def read_values(index: Index) -> np.ndarray:
        if not packed:
            return read(values, index)
        *rows, last = index
        start, stop = last.start // INT4_BLOCK, -(-last.stop // INT4_BLOCK)
        pairs = read(values, (*rows, slice(start * INT4_BLOCK // 2, stop * INT4_BLOCK // 2)))
        offset = start * INT4_BLOCK
        return unpack_host(pairs)[..., last.start - offset : last.stop - offset]

    def read_scales(index: Index) -> np.ndarray:
        *rows, last = index
        start, stop = last.start // repeats, -(-last.stop // repeats)
        repeated = np.repeat(read(scales, (*rows, slice(start, stop))), repeats, -1)
        offset = start * repeats
        return repeated[..., last.start - offset : last.stop - offset]

    stored = values.shape[:-1]
    groups = length // smaller
    scale_sharding = layout.split if groups > 1 else layout.unsplit  # one group cannot be split
    stored_groups = scales.shape[-1] * repeats
    return PackedWeight(
        make(
            (*outputs, length),
            jnp.int4 if packed else values.dtype,
            layout.split,
            (*stored, padded),
            read_values,
        ),
        make(
            (*outputs, groups),
            scales.dtype,
            scale_sharding,
            (*stored, stored_groups),
            read_scales,
        ),
        inputs,
    )
