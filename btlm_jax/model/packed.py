"""The weights of a projection as decoding wants them: inputs last, in floats, int8 or int4.

O is the shape of the outputs, such as [3, H, K] or [F]; I the number of inputs, those of several
dimensions flattened; G the number of groups of inputs that share a scale.

Reading its weights is all a step of decoding has to do: 2 N bytes in bf16, N in int8, N / 2 in
int4. So what counts is that they are read as they rest, without a copy. CPUs do that for rows of
inputs (three to five times faster than columns), and in bf16 and int8 for products of two rows or
more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, reshard

# Two int4 share a byte: of 128 inputs, number i is the low and number 64 + i the high half of
# byte i. Halves of whole vectors, rather than neighbours, unpack without shuffling.
BLOCK = 128
# Rows that a matrix unit multiplies in the time it takes to read the weights.
_MATRIX_ROWS = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """The weights of a projection, inputs last.

    Attributes:
      values: [*O, I], floats, int8 or int4; or uint8 [*O, I / 2], int4 packed two to a byte in
        blocks of 128 inputs, to which I is filled up with zeros.
      scales: None for floats; else [*O, G], for I / G consecutive inputs each (1 group for int8):
        a weight is its value times its scale.
      inputs: I, without filling.
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
        """Of the values."""
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """[*O, I]."""
        return (*self.values.shape[:-1], self.inputs)


def transposed(x: jax.Array, inputs: Sequence[int]) -> PackedWeight:
    """A float kernel.

    Args:
      x: a weight as the table has it.
      inputs: the dimensions that are inputs (`weights.Weight.inputs`).
    """
    outputs = [i for i in range(x.ndim) if i not in inputs]
    n = math.prod(x.shape[i] for i in inputs)
    shape = (*(x.shape[i] for i in outputs), n)
    return PackedWeight(x.transpose(*outputs, *inputs).reshape(shape), None, n)


def unpack(packed: jax.Array) -> jax.Array:
    """int8 [..., I] from uint8 [..., I / 2]: values from -8 to 7."""
    pairs = jax.lax.bitcast_convert_type(packed, jnp.int8)
    pairs = pairs.reshape(*packed.shape[:-1], -1, BLOCK // 2)
    four = jnp.int8(4)
    low = jax.lax.shift_right_arithmetic(jax.lax.shift_left(pairs, four), four)
    high = jax.lax.shift_right_arithmetic(pairs, four)
    return jnp.stack([low, high], -2).reshape(*packed.shape[:-1], -1)


def dequantize(kernel: PackedWeight, dtype) -> jax.Array:
    """The weights as an array [*O, I] of `dtype`; each is rounded once."""
    values, scales = kernel.values, kernel.scales
    if kernel.packed:
        values = unpack(values)
    if scales is not None:
        (*outputs, filled), groups = values.shape, scales.shape[-1]
        *spec, split = jax.typeof(values).sharding.spec
        apart = (split, None) if groups > 1 else (None, split)
        values = _reshape(values, (*outputs, groups, filled // groups), (*spec, *apart))
        values = values.astype(jnp.float32) * scales[..., None].astype(jnp.float32)
        values = _reshape(values, (*outputs, filled), (*spec, split))
    if values.shape[-1] > kernel.inputs:
        values = jax.lax.slice_in_dim(values, 0, kernel.inputs, axis=-1)
    return values.astype(dtype)


def _reshape(x: jax.Array, shape: tuple[int, ...], spec: Sequence) -> jax.Array:
    """To `shape`, on a mesh sharded by `spec`: JAX would split (or merge) axes in its own way."""
    mesh = jax.typeof(x).sharding.mesh
    out = None if mesh.empty else NamedSharding(mesh, PartitionSpec(*spec))
    return jnp.reshape(x, shape, out_sharding=out)


def embedding_rows(
    kernel: PackedWeight, index: jax.Array, out_sharding: PartitionSpec | None = None
) -> jax.Array:
    """Rows of an embedding [V, D] of floats or int8, fp32; indices outside are clipped."""

    # Within a loop XLA's CPU backend would make the whole table fp32 before it, once for all.
    kernel, index = jax.lax.optimization_barrier((kernel, index))

    def of(x):
        return x.at[index].get(mode="clip", out_sharding=out_sharding).astype(jnp.float32)

    found = of(kernel.values)
    return found if kernel.scales is None else found * of(kernel.scales)


def packed_matmul(
    x: jax.Array,
    kernel: PackedWeight,
    *,
    on_cpu: bool,
    precision: jax.lax.Precision | None = None,
    out_sharding: PartitionSpec | None = None,
) -> jax.Array:
    """x [..., I] times the weights, summed over the inputs in fp32. Returns fp32 [..., *O].

    `on_cpu`, int8 weights meet inputs that are rounded to int8, by a scale for each row: nothing
    else reads them as they rest. On accelerators, and int4 everywhere, weights become what x is
    within the product.
    """
    values, scales = kernel.values, kernel.scales
    if values.dtype == jnp.int8 and on_cpu:
        assert scales is not None
        x_scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True).astype(jnp.float32), 1e-30) / 127
        rounded = jnp.round(x / x_scale).astype(jnp.int8)
        y = _dot(rounded, values, on_cpu, None, out_sharding, jnp.int32).astype(jnp.float32)
        return y * x_scale.reshape(*x.shape[:-1], *(1,) * (y.ndim - x.ndim + 1)) * scales[..., 0]
    if values.dtype == jnp.int8:  # one scale for all inputs: after the sum
        y = _dot(x, values.astype(x.dtype), on_cpu, precision, out_sharding, jnp.float32)
        assert scales is not None
        return y * scales[..., 0]
    if values.dtype == jnp.int4 and _few(x, kernel):
        return _by_groups(x, kernel, precision, out_sharding)
    if kernel.packed:
        # Else XLA would unpack every weight of the model before the first product, and hold them;
        # and all scales in fp32.
        bits = jnp.isnan(x.reshape(-1)[0]).astype(jnp.uint8)
        scales, x = jax.lax.optimization_barrier((scales, x))
        kernel = dataclasses.replace(kernel, values=values ^ bits, scales=scales)
    w = dequantize(kernel, x.dtype)
    return _dot(x, w, on_cpu, precision, out_sharding, jnp.float32)


def _few(x: jax.Array, kernel: PackedWeight) -> bool:
    """Whether `_by_groups` costs less than reading the weights; it wants all inputs together."""
    assert kernel.scales is not None
    own = jax.typeof(kernel.values).sharding
    axes = own.spec[-1] or ()
    split = math.prod(own.mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes))
    return split == 1 and math.prod(x.shape[:-1]) * kernel.scales.shape[-1] <= _MATRIX_ROWS


def _by_groups(x, kernel: PackedWeight, precision, out_sharding) -> jax.Array:
    """The product with int4 of few rows, by one product of G rows for each of them.

    Each has the inputs of one group and zeros. So scales come after the sums, and int4 is all that
    is read: XLA would write weights with their scales to memory before it multiplied them.
    """
    values, scales = kernel.values, kernel.scales
    assert scales is not None
    filled, groups = values.shape[-1], scales.shape[-1]
    room = [(0, 0)] * (x.ndim - 1) + [(0, filled - x.shape[-1])]
    own = np.arange(filled) // (filled // groups) == np.arange(groups)[:, None]
    x = jnp.where(own, jnp.pad(x, room)[..., None, :], jnp.zeros((), x.dtype))
    lead = x.ndim - 2
    if out_sharding is not None:
        out_sharding = PartitionSpec(*out_sharding[:lead], None, *out_sharding[lead:])
    y = _dot(x, values.astype(x.dtype), False, precision, out_sharding, jnp.float32)
    return (y * jnp.moveaxis(scales.astype(jnp.float32), -1, 0)).sum(lead)


def _dot(x, w, on_cpu, precision, out_sharding, dtype):
    """x [..., I] by w [*O, I]."""
    lead, shape = x.shape[:-1], (*x.shape[:-1], *w.shape[:-1])
    matrices = on_cpu and out_sharding is None
    if matrices:
        # Of more dimensions, or of one row, XLA's CPU backend would copy the weights first: turned
        # round, or in fp32.
        one = math.prod(lead) == 1 and x.dtype != jnp.float32
        x, w = x.reshape(-1, x.shape[-1]), w.reshape(-1, w.shape[-1])
        x = jnp.concatenate([x, x]) if one else x
    y = jax.lax.dot_general(
        x,
        w,
        (((x.ndim - 1,), (w.ndim - 1,)), ((), ())),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=out_sharding,
    )
    return y[: math.prod(lead)].reshape(shape) if matrices else y


def shard(kernel: PackedWeight, spec: PartitionSpec) -> PackedWeight:
    """The kernel in another sharding, of [*O, I]; groups are split as inputs are."""
    scales = kernel.scales
    if scales is not None:
        grouped = spec if scales.shape[-1] > 1 else PartitionSpec(*spec[:-1], None)
        scales = reshard(scales, grouped)
    return dataclasses.replace(kernel, values=reshard(kernel.values, spec), scales=scales)
