"""Packed weights: the weights of a projection in the layout of decoding, in floats, int8 or int4.

O is the shape of the outputs, such as [3, H, K] or [F]; I the number of inputs, flattened if they
have several dimensions; G the number of groups of inputs, each with its own scale.

A step of decoding spends its time reading weights: 2 N bytes in bf16, N in int8, N / 2 in int4 for
N parameters. So they must be read in place, without a copy. CPUs do so if the inputs are the last
dimension (three to five times faster than columns) and, in bf16 and int8, if the product has two
rows or more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, reshard

# Two int4 share a byte: in a block of 128 inputs, input i is the low half of byte i and input
# 64 + i its high half. Halves of whole vectors, unlike neighbors, unpack without shuffling.
BLOCK = 128
# The number of rows a matrix unit multiplies in the time it takes to read the weights.
_MATRIX_ROWS = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """The weights of a projection, with the inputs as the last dimension.

    Attributes:
      values: [*O, I], floats, int8 or int4; or uint8 [*O, I / 2], two int4 to a byte in blocks of
        128 inputs, where I is padded with zeros to whole blocks.
      scales: None for floats; else [*O, G], each for I / G consecutive inputs (1 group for int8). A
        weight is its value times its scale.
      inputs: I without padding.
    """

    values: jax.Array
    scales: jax.Array | None
    inputs: int = dataclasses.field(metadata=dict(static=True))

    @property
    def packed(self) -> bool:
        """Whether two values share a byte."""
        return self.values.dtype == jnp.uint8

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """[*O, I], without padding."""
        return (*self.values.shape[:-1], self.inputs)


def transposed(x: jax.Array, inputs: Sequence[int]) -> PackedWeight:
    """Returns float weights with the inputs as the last dimension.

    Args:
      x: a weight in the layout of the table.
      inputs: its input dimensions (`weights.Weight.inputs`).
    """
    outputs = [i for i in range(x.ndim) if i not in inputs]
    num_inputs = math.prod(x.shape[i] for i in inputs)
    shape = (*(x.shape[i] for i in outputs), num_inputs)
    return PackedWeight(x.transpose(*outputs, *inputs).reshape(shape), None, num_inputs)


def unpack(packed: jax.Array) -> jax.Array:
    """Unpacks uint8 [..., I / 2] to int8 [..., I], values from -8 to 7."""
    pairs = jax.lax.bitcast_convert_type(packed, jnp.int8)
    pairs = pairs.reshape(*packed.shape[:-1], -1, BLOCK // 2)
    four = jnp.int8(4)
    low = jax.lax.shift_right_arithmetic(jax.lax.shift_left(pairs, four), four)
    high = jax.lax.shift_right_arithmetic(pairs, four)
    return jnp.stack([low, high], -2).reshape(*packed.shape[:-1], -1)


def as_array(w: jax.Array | PackedWeight, dtype) -> jax.Array:
    """Returns an array as it is, and a packed weight dequantized to `dtype`."""
    return dequantize(w, dtype) if isinstance(w, PackedWeight) else w


def dequantize(w: PackedWeight, dtype) -> jax.Array:
    """Returns the weights as an array [*O, I] of `dtype`, each rounded once."""
    values, scales = w.values, w.scales
    if w.packed:
        values = unpack(values)
    if scales is not None:
        (*outputs, padded), groups = values.shape, scales.shape[-1]
        *spec, input_axis = jax.typeof(values).sharding.spec
        group_axes = (input_axis, None) if groups > 1 else (None, input_axis)
        values = _reshape(values, (*outputs, groups, padded // groups), (*spec, *group_axes))
        values = values.astype(jnp.float32) * scales[..., None].astype(jnp.float32)
        values = _reshape(values, (*outputs, padded), (*spec, input_axis))
    if values.shape[-1] > w.inputs:
        values = jax.lax.slice_in_dim(values, 0, w.inputs, axis=-1)
    return values.astype(dtype)


def _reshape(x: jax.Array, shape: tuple[int, ...], spec: Sequence) -> jax.Array:
    """Reshapes x; on a mesh the result is sharded by `spec`, not as JAX would choose."""
    mesh = jax.typeof(x).sharding.mesh
    out = None if mesh.empty else NamedSharding(mesh, PartitionSpec(*spec))
    return jnp.reshape(x, shape, out_sharding=out)


def shard(w: PackedWeight, spec: PartitionSpec) -> PackedWeight:
    """Reshards a packed weight by the spec of [*O, I]; groups are sharded like inputs."""
    scales = w.scales
    if scales is not None:
        scales_spec = spec if scales.shape[-1] > 1 else PartitionSpec(*spec[:-1], None)
        scales = reshard(scales, scales_spec)
    return dataclasses.replace(w, values=reshard(w.values, spec), scales=scales)


def embedding_rows(
    w: jax.Array | PackedWeight, index: jax.Array, out_sharding: PartitionSpec | None = None
) -> jax.Array:
    """Looks up rows of an embedding [V, D] in floats or int8, as fp32; the index is clipped."""

    def take(x, index):
        return x.at[index].get(mode="clip", out_sharding=out_sharding).astype(jnp.float32)

    if not isinstance(w, PackedWeight):
        return take(w, index)
    # In a loop XLA's CPU backend would otherwise convert the whole table to fp32 before the loop.
    w, index = jax.lax.optimization_barrier((w, index))
    rows = take(w.values, index)
    return rows if w.scales is None else rows * take(w.scales, index)


def packed_matmul(
    x: jax.Array,
    w: PackedWeight,
    *,
    on_cpu: bool,
    precision: jax.lax.Precision | None = None,
    out_sharding: PartitionSpec | None = None,
) -> jax.Array:
    """Multiplies x [..., I] by the weights, summed over the inputs in fp32: fp32 [..., *O].

    With `on_cpu` and int8 weights, x is rounded to int8 with one scale per row, because only this
    form reads the weights in place. On accelerators, and for int4 everywhere, the weights are
    converted to the dtype of x inside the product.
    """
    if w.dtype == jnp.int8 and w.scales is not None and w.scales.shape[-1] == 1:
        return _int8_matmul(x, w, on_cpu, precision, out_sharding)
    if w.dtype == jnp.int4 and _prefers_groups(x, w):
        return _grouped_matmul(x, w, precision, out_sharding)
    if w.packed:
        # The barrier and the xor (with 0, unless x is NaN) tie the weights to x. Otherwise XLA
        # would unpack all weights of the model before the first product, and hold them, and all
        # scales in fp32.
        zero = jnp.isnan(x.reshape(-1)[0]).astype(jnp.uint8)
        scales, x = jax.lax.optimization_barrier((w.scales, x))
        w = dataclasses.replace(w, values=w.values ^ zero, scales=scales)
    return _dot(x, dequantize(w, x.dtype), on_cpu, precision, out_sharding, jnp.float32)


def _int8_matmul(x, w: PackedWeight, on_cpu, precision, out_sharding) -> jax.Array:
    """Multiplies by int8 weights; their scales, one per output, multiply the sums."""
    assert w.scales is not None
    if not on_cpu:
        y = _dot(x, w.values.astype(x.dtype), on_cpu, precision, out_sharding, jnp.float32)
        return y * w.scales[..., 0]
    x_scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True).astype(jnp.float32), 1e-30) / 127
    rounded = jnp.round(x / x_scale).astype(jnp.int8)
    y = _dot(rounded, w.values, on_cpu, None, out_sharding, jnp.int32).astype(jnp.float32)
    x_scale = x_scale.reshape(*x.shape[:-1], *(1,) * (y.ndim - x.ndim + 1))
    return y * x_scale * w.scales[..., 0]


def _prefers_groups(x: jax.Array, w: PackedWeight) -> bool:
    """Returns whether `_grouped_matmul` can be used and costs less than reading the weights.

    It needs all inputs on one device.
    """
    assert w.scales is not None
    sharding = jax.typeof(w.values).sharding
    axes = sharding.spec[-1] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    num_shards = math.prod(sharding.mesh.shape[a] for a in axes)
    return num_shards == 1 and math.prod(x.shape[:-1]) * w.scales.shape[-1] <= _MATRIX_ROWS


def _grouped_matmul(x, w: PackedWeight, precision, out_sharding) -> jax.Array:
    """Multiplies a few rows by int4 weights, as one product of G rows for every row.

    Each of the G rows holds the inputs of one group, and zeros elsewhere. So scales multiply the
    sums, and only int4 is read: XLA would write scaled weights to memory before multiplying them.
    """
    values, scales = w.values, w.scales
    assert scales is not None
    padded, groups = values.shape[-1], scales.shape[-1]
    pad_width = [(0, 0)] * (x.ndim - 1) + [(0, padded - x.shape[-1])]
    in_group = np.arange(padded) // (padded // groups) == np.arange(groups)[:, None]
    x = jnp.where(in_group, jnp.pad(x, pad_width)[..., None, :], jnp.zeros((), x.dtype))
    lead = x.ndim - 2
    if out_sharding is not None:
        out_sharding = PartitionSpec(*out_sharding[:lead], None, *out_sharding[lead:])
    y = _dot(x, values.astype(x.dtype), False, precision, out_sharding, jnp.float32)
    return (y * jnp.moveaxis(scales.astype(jnp.float32), -1, 0)).sum(lead)


def _dot(x, w, on_cpu, precision, out_sharding, dtype):
    """Contracts the last dimensions of x [..., I] and w [*O, I], accumulating in `dtype`."""
    lead, shape = x.shape[:-1], (*x.shape[:-1], *w.shape[:-1])
    as_matrices = on_cpu and out_sharding is None
    if as_matrices:
        # For more dimensions, or one row, XLA's CPU backend would first copy the weights,
        # transposed or in fp32.
        is_one_row = math.prod(lead) == 1 and x.dtype != jnp.float32
        x, w = x.reshape(-1, x.shape[-1]), w.reshape(-1, w.shape[-1])
        x = jnp.concatenate([x, x]) if is_one_row else x
    y = jax.lax.dot_general(
        x,
        w,
        (((x.ndim - 1,), (w.ndim - 1,)), ((), ())),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=out_sharding,
    )
    return y[: math.prod(lead)].reshape(shape) if as_matrices else y
