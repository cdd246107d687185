"""Einsum that accumulates in fp32, forward and backward, with weights in floats or packed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec, reshard

from btlm_jax.model import packed, sharding
from btlm_jax.model.packed import PackedWeight


def einsum(
    equation: str,
    x: jax.Array,
    w: jax.Array | PackedWeight,
    precision: jax.lax.Precision | None = None,
    out_sharding: PartitionSpec | None = None,
    w_gathered: PartitionSpec | None = None,
) -> jax.Array:
    """Computes jnp.einsum of two arrays, or of an array and a packed weight, in fp32.

    The gradients are products of the same kind: on accelerators the incoming gradient is rounded to
    the dtype of the operands, so that bf16 stays on the matrix units. JAX's own rule would multiply
    fp32 by bf16, which GPUs compute in fp32. (fp32 results also keep bf16 on XLA's fast CPU path.)

    Args:
      equation: such as "btd,df->btf": letters only, each in at least two of the three terms. A
        packed weight is contracted with the last dimensions of x, in their order.
      x: the first operand.
      w: the second operand; an array is converted to the dtype of x.
      precision: of this product and of those in its gradients.
      out_sharding: of the result, on an explicit mesh.
      w_gathered: the sharding in which w is used, if it is stored in another, by the dimensions in
        the equation. The gradient of an array is reduced straight into the stored shards, for half
        the bytes of an all-reduce.

    Returns:
      The product, accumulated in fp32; the gradients have the dtypes and shardings of the operands.
    """
    if isinstance(w, PackedWeight):
        return _packed_einsum(equation, x, w, precision, out_sharding, w_gathered)
    return _dense_einsum(equation, x, w.astype(x.dtype), precision, out_sharding, w_gathered)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5))
def _dense_einsum(equation: str, x, y, precision, out_sharding, y_gathered) -> jax.Array:
    """Computes `einsum` of two arrays of one dtype."""
    terms, result = equation.split("->")
    x_dims, y_dims = terms.split(",")
    y = _gather(y, y_gathered)
    n = _num_mergeable(x_dims, y_dims, result, x, y)
    if n > 1:
        # XLA would transpose one operand to sum over several dimensions.
        x, y = (z.reshape(-1, *z.shape[n:]) for z in (x, y))
        x_dims, y_dims = x_dims[n - 1 :], y_dims[n - 1 :]
    return jnp.einsum(
        f"{x_dims},{y_dims}->{result}",
        x,
        y,
        precision=precision,
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )


def _num_mergeable(x_dims: str, y_dims: str, result: str, x: jax.Array, y: jax.Array) -> int:
    """Returns how many leading dimensions are summed over in both operands and can be merged.

    Only the first of them may be sharded.
    """
    n = 0
    specs = [jax.typeof(z).sharding.spec for z in (x, y)]
    for i, j in zip(x_dims, y_dims, strict=False):
        if i != j or i in result or (n and any(spec[n] for spec in specs)):
            break
        n += 1
    return n


def _gather(y: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    return y if spec is None else reshard(y, spec)


def _dense_einsum_forward(equation, x, y, precision, out_sharding, y_gathered):
    return _dense_einsum(equation, x, y, precision, out_sharding, y_gathered), (x, y)


def _dense_einsum_backward(equation, precision, out_sharding, y_gathered, operands, gradient):
    terms, result = equation.split("->")
    x_dims, y_dims = terms.split(",")

    def gradients(x, y, gradient, dtype):
        x_cast, y_cast, g = (z.astype(dtype) for z in (x, y, gradient))
        y_cast = _gather(y_cast, y_gathered)
        dx = einsum(f"{result},{y_dims}->{x_dims}", g, y_cast, precision, _explicit_spec(x))
        dy = einsum(f"{x_dims},{result}->{y_dims}", x_cast, g, precision, _explicit_spec(y))
        return dx.astype(x.dtype), dy.astype(y.dtype)

    # XLA's CPU backend accepts bf16 products only in some of the layouts that arise here.
    return jax.lax.platform_dependent(
        *operands,
        gradient,
        cpu=functools.partial(gradients, dtype=jnp.float32),
        default=functools.partial(gradients, dtype=jnp.result_type(*operands)),
    )


_dense_einsum.defvjp(_dense_einsum_forward, _dense_einsum_backward)


def _explicit_spec(x: jax.Array) -> PartitionSpec | None:
    """Returns the PartitionSpec in the type of an array, or None without an explicit mesh."""
    stored = jax.typeof(x).sharding
    return stored.spec if AxisType.Explicit in stored.mesh.axis_types else None


def _packed_einsum(
    equation: str, x: jax.Array, w: PackedWeight, precision, out_sharding, w_gathered
) -> jax.Array:
    """Computes `einsum` of an array and a packed weight."""
    terms, _ = equation.split("->")
    x_dims, w_dims = terms.split(",")
    inputs = [dim for dim in w_dims if dim in x_dims]
    if w_gathered is not None:
        axes = dict(zip(w_dims, w_gathered, strict=True))
        outputs = (axes[dim] for dim in w_dims if dim not in inputs)
        w = packed.shard(w, PartitionSpec(*outputs, axes[inputs[0]]))
    if len(inputs) > 1:  # of which only the first may be sharded
        lead, spec = x.ndim - len(inputs), _explicit_spec(x)
        flat = None if spec is None else PartitionSpec(*spec[: lead + 1])
        x = jnp.reshape(x, (*x.shape[:lead], -1), out_sharding=flat)
    on_cpu = sharding.mesh_platform(jax.sharding.get_abstract_mesh()) == "cpu"
    return packed.packed_matmul(x, w, on_cpu=on_cpu, precision=precision, out_sharding=out_sharding)
