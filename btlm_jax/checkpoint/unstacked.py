"""Weights by layer, as decoding takes them, each read straight into its place.

Arrays are read one at a time, and of each only what the devices here hold: a host holds the weights
once, and one array besides.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from btlm_jax.checkpoint import metadata
from btlm_jax.checkpoint import quantization as quantization_lib
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.config import BTLMConfig
from btlm_jax.model import packed as packed_lib
from btlm_jax.model import sharding, weights
from btlm_jax.model.packed import BLOCK, PackedWeight
from btlm_jax.model.params import Params, unflatten_tree

logger = logging.getLogger(__name__)

# Finer groups than this are told of: scales would take more than 2 bits a weight.
_FINE = 8

Index = tuple[slice, ...]
# Gives a part, of slices with bounds, of a stored array.
Read = Callable[[weights.DiskLeaf, Index], np.ndarray]
# As `sharding.assemble_array`.
Make = Callable[..., Any]


def unstacked_option(unstacked: bool, by_layer: bool | None) -> bool:
    """Returns the value of `unstacked=`, which was called `by_layer=` before."""
    if by_layer is None:
        return unstacked
    warnings.warn("by_layer= was renamed to unstacked=", DeprecationWarning, stacklevel=3)
    return by_layer


def load_unstacked(
    config: BTLMConfig,
    read: Read,
    dtypes: Mapping[weights.Path, DTypeLike],
    *,
    quantization: Quantization | None = None,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.RULES,
    make: Make = sharding.assemble_array,
) -> Params:
    """The weights by layer, {"blocks": {"0": {...}, ...}}.

    Quantized weights become a `packed.PackedWeight`. On a CPU without a mesh int4 stays packed, and
    float kernels get their inputs last, as CPUs read them fastest. Elsewhere int4 is an array of
    jnp.int4, 4 bits each on TPUs and GPUs, and float kernels are as the table has them.

    On a mesh the outputs of a quantized kernel are split by the table's logical axes, its inputs,
    flattened, by the axis of the first. Where a device's inputs are not whole groups, groups are
    cut into finer ones of the same scale.

    Args:
      config: the model.
      read, dtypes: the stored arrays, those of `quantization.stored_leaves(config, to)`.
      quantization: what they are quantized to.
      dtype: of what is stored in floats and is no scale; None keeps it.
      mesh, rules: as for `checkpoint.load`.
      make: makes the arrays.

    Raises:
      ValueError: a weight does not fit the mesh; or what `read` raises.
    """
    pad, placed = sharding.param_layout(config, mesh, rules)
    on_cpu = mesh is None and jax.default_backend() == "cpu"
    found: dict[weights.Path, Any] = {}
    for leaf in weights.disk_leaves(config):
        w, parts = leaf.weight, quantization_lib.stored_parts(leaf, quantization)
        out = placed[w.path] if leaf.layer is None else sharding.layer_sharding(placed[w.path])
        if len(parts) == 1:
            to_dtype = jnp.dtype(dtypes[leaf.path] if dtype is None else dtype)
            part = functools.partial(read, parts[0])
            x: Any = make(w.padded(pad), to_dtype, out, w.shape, part)
            if on_cpu and w.inputs:
                x = jax.block_until_ready(_inputs_last(x, w.inputs))  # or many would be in flight
        elif on_cpu:
            values, scales = (
                make(p.shape, p.dtype, out, p.shape, functools.partial(read, p)) for p in parts
            )
            x = PackedWeight(values, scales, w.transposed_shape({})[-1])
        else:
            assert quantization is not None
            place, ways = _places(w, mesh, rules, out)
            x = _kernel(parts, read, quantization.group, w.transposed_shape(pad), place, ways, make)
        found[leaf.path] = x
    return unflatten_tree(found)


def abstract_unstacked(
    config: BTLMConfig,
    dtype: DTypeLike,
    to: Quantization | None,
    mesh: Mesh,
    rules: sharding.Rules = sharding.RULES,
) -> Params:
    """Shapes, dtypes and shardings of what `load` would give; devices need not be here.

    Args:
      dtype: of floats.
      to, mesh, rules: as for `load`.
    """

    def make(shape, dtype, out, stored, read) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=out)

    def read(leaf, index) -> np.ndarray:
        raise AssertionError("nothing is read")

    return load_unstacked(
        config, read, {}, quantization=to, dtype=dtype, mesh=mesh, rules=rules, make=make
    )


def decoding_dtype(
    meta: metadata.Metadata, dtype: DTypeLike | None, mesh: Mesh | None
) -> np.dtype | None:
    """What `load` has a model compute in whose weights are by layer; None is the platform's.

    Args:
      meta: of the checkpoint.
      dtype, mesh: as for `load`.

    Raises:
      ValueError: float16 on a CPU, in which no product runs as the weights rest.
    """
    if mesh is not None or jax.default_backend() != "cpu":
        return None
    if meta.quantization is not None:
        return jnp.dtype(jnp.bfloat16)
    first = next(x for x in weights.disk_leaves(meta.config) if x.weight.role == "hidden")
    own = jnp.dtype(meta.leaves[first.path].dtype if dtype is None else dtype)
    if own == jnp.float16:
        raise ValueError("weights in float16: CPUs decode in bfloat16 or float32, pass dtype=")
    return own


_inputs_last = jax.jit(packed_lib.transposed, static_argnums=1)


def _places(
    w: weights.Weight, mesh: Mesh | None, rules: sharding.Rules, single: jax.sharding.Sharding
) -> tuple[Callable[[bool], jax.sharding.Sharding], int]:
    """Where a kernel [*O, I] belongs, its last axis split or whole; and in how many parts I is.

    Raises:
      ValueError: the rules split inputs that are not consecutive once flattened.
    """
    if mesh is None:
        return lambda split: single, 1
    outputs = [axis for i, axis in enumerate(w.axes) if i not in w.inputs]
    first, *others = [w.axes[i] for i in w.inputs]
    for axis in others:
        if sharding.num_shards(mesh, rules, axis) > 1:
            raise ValueError(
                f"{w.name}: its inputs {(first, *others)} are split by the rules at {axis!r}; a "
                f"quantized weight can be split at {first!r} only: change rules or mesh"
            )

    def place(split: bool) -> jax.sharding.Sharding:
        return NamedSharding(
            mesh, sharding.partition_spec(rules, *outputs, first if split else None)
        )

    return place, sharding.num_shards(mesh, rules, first)


def _kernel(
    parts: tuple[weights.DiskLeaf, ...],
    read: Read,
    group: int | None,
    shape: tuple[int, ...],
    place: Callable[[bool], jax.sharding.Sharding],
    ways: int,
    make: Make,
) -> PackedWeight:
    """A quantized kernel of padded `shape` [*O, I] with its inputs split `ways`, int4 unpacked."""
    values, scales = parts
    *outputs, inputs = shape
    read_values, read_scales = (functools.partial(read, part) for part in parts)
    if group is None or values.part == "int8":
        return PackedWeight(
            make(shape, jnp.int8, place(True), values.shape, read_values),
            make((*outputs, 1), jnp.float32, place(False), scales.shape, read_scales),
            inputs,
        )
    # Where inputs are whole, filling stays: `packed.dequantize` cuts it off.
    filled = values.shape[-1] * 2
    length = inputs if ways > 1 else filled
    finer = math.gcd(length // ways, group)
    if finer < min(group, _FINE) and values.layer == 0:
        logger.warning(
            "%s: the %d inputs of a device are no whole groups of %d; scales for every %d take %.1f"
            " bits a weight", values.weight.name, length // ways, group, finer, 16 / finer,
        )  # fmt: skip
    repeats = group // finer

    def unpacked(index: Index) -> np.ndarray:
        *rows, last = index
        start, stop = last.start // BLOCK, -(-last.stop // BLOCK)
        packed = read_values((*rows, slice(start * BLOCK // 2, stop * BLOCK // 2)))
        found = quantization_lib.unpack_host(packed)
        return found[..., last.start - start * BLOCK : last.stop - start * BLOCK]

    def repeated(index: Index) -> np.ndarray:
        *rows, last = index
        start, stop = last.start // repeats, -(-last.stop // repeats)
        found = np.repeat(read_scales((*rows, slice(start, stop))), repeats, -1)
        return found[..., last.start - start * repeats : last.stop - start * repeats]

    stored = values.shape[:-1]
    return PackedWeight(
        make((*outputs, length), jnp.int4, place(True), (*stored, filled), unpacked),
        make(
            (*outputs, length // finer),
            jnp.bfloat16,
            place(length > finer),  # one group has nothing to split
            (*stored, scales.shape[-1] * repeats),
            repeated,
        ),
        inputs,
    )
