"""Matrix products that sum in fp32, forward and backward."""

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
    gathered: PartitionSpec | None = None,
) -> jax.Array:
    """jnp.einsum of two arrays of one dtype, accumulated and returned in fp32.

    Its gradients are products of the same kind: on accelerators the incoming gradient is rounded to
    the operands' dtype, so that bf16 stays on the matrix units. JAX's own rule would multiply fp32
    by bf16, for which GPUs take fp32. (fp32 results also keep bf16 on XLA's fast CPU path.)

    Args:
      equation: such as "btd,df->btf": letters only, each in two of the three terms at least.
      x, y: the operands.
      precision: of this product and those of its gradients.
      out_sharding: of the result, on an explicit mesh.
      gathered: the sharding in which y is used, where it rests in another. Its gradient is summed
        straight into the shards, half the bytes of a sum that all devices get.

    Returns:
      fp32; the gradients have the operands' dtypes and shardings.
    """
    terms, result = equation.split("->")
    a, b = terms.split(",")
    y = _used(y, gathered)
    n = _leading(a, b, result, x, y)
    if n > 1:
        # As one dimension: XLA would transpose one operand to sum over several.
        x, y = (z.reshape(-1, *z.shape[n:]) for z in (x, y))
        a, b = a[n - 1 :], b[n - 1 :]
    return jnp.einsum(
        f"{a},{b}->{result}",
        x,
        y,
        precision=precision,
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )


def _leading(a: str, b: str, result: str, x: jax.Array, y: jax.Array) -> int:
    """How many dimensions, summed over, both operands begin with and could be merged."""
    n = 0
    split = [jax.typeof(z).sharding.spec for z in (x, y)]
    for i, j in zip(a, b, strict=False):
        if i != j or i in result or (n and any(spec[n] for spec in split)):
            break
        n += 1
    return n


def _used(y: jax.Array, gathered: PartitionSpec | None) -> jax.Array:
    return y if gathered is None else reshard(y, gathered)


def _forward(equation, x, y, precision, out_sharding, gathered):
    return einsum(equation, x, y, precision, out_sharding, gathered), (x, y)


def _backward(equation, precision, out_sharding, gathered, operands, gradient):
    def both(x, y, gradient, dtype):
        (a, b), result = equation.split("->")[0].split(","), equation.split("->")[1]
        x_, y_, g = (z.astype(dtype) for z in (x, y, gradient))
        dx = einsum(f"{result},{b}->{a}", g, _used(y_, gathered), precision, _explicit(x))
        dy = einsum(f"{a},{result}->{b}", x_, g, precision, _explicit(y))
        return dx.astype(x.dtype), dy.astype(y.dtype)

    dtype = jnp.result_type(*operands)
    # XLA's CPU backend accepts bf16 products only in some of the layouts that arise here.
    return jax.lax.platform_dependent(
        *operands,
        gradient,
        cpu=functools.partial(both, dtype=jnp.float32),
        default=functools.partial(both, dtype=dtype),
    )


einsum.defvjp(_forward, _backward)


def _explicit(x: jax.Array) -> PartitionSpec | None:
    """The PartitionSpec in an array's type; None off any explicit mesh."""
    sharding = jax.typeof(x).sharding
    return sharding.spec if AxisType.Explicit in sharding.mesh.axis_types else None
