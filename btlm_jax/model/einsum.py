"""Einsum that accumulates in fp32, forward and backward."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec, reshard


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5))
def einsum(
    equation: str,
    x: jax.Array,
    y: jax.Array,
    precision: jax.lax.Precision | None = None,
    out_sharding: PartitionSpec | None = None,
    y_gathered: PartitionSpec | None = None,
) -> jax.Array:
    """Computes jnp.einsum of two arrays of one dtype, accumulated and returned in fp32.

    The gradients are products of the same kind: on accelerators the incoming gradient is rounded to
    the dtype of the operands, so that bf16 stays on the matrix units. JAX's own rule would multiply
    fp32 by bf16, which GPUs compute in fp32. (fp32 results also keep bf16 on XLA's fast CPU path.)

    Args:
      equation: such as "btd,df->btf": letters only, each in at least two of the three terms.
      x, y: the operands.
      precision: of this product and of those in its gradients.
      out_sharding: of the result, on an explicit mesh.
      y_gathered: the sharding in which y is used, if it is stored in another. The gradient of y is
        reduced straight into the stored shards, for half the bytes of an all-reduce.

    Returns:
      fp32; the gradients have the dtypes and shardings of the operands.
    """
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


def _einsum_forward(equation, x, y, precision, out_sharding, y_gathered):
    return einsum(equation, x, y, precision, out_sharding, y_gathered), (x, y)


def _einsum_backward(equation, precision, out_sharding, y_gathered, operands, gradient):
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


einsum.defvjp(_einsum_forward, _einsum_backward)


def _explicit_spec(x: jax.Array) -> PartitionSpec | None:
    """Returns the PartitionSpec in the type of an array, or None without an explicit mesh."""
    sharding = jax.typeof(x).sharding
    return sharding.spec if AxisType.Explicit in sharding.mesh.axis_types else None
