"""What the measurements of `bench` and `loss_bench` share: the limit they are held against."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MATMUL = 4096  # a square matrix product of this size reaches what the hardware can do


def matmul_rate(dtype: str) -> Callable[[], float]:
    """A function that returns the FLOP/s of one device in a large matrix product."""
    x = jax.random.normal(jax.random.key(0), (MATMUL, MATMUL), dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    multiply = functools.partial(
        jnp.dot, precision=precision, preferred_element_type=jnp.float32
    )  # as the layers do, and the faster kind for bf16
    product = jax.jit(
        lambda x, n: jax.lax.fori_loop(0, n, lambda _, y: (multiply(x, y) / 64).astype(x.dtype), x)
    )
    flops = 2.0 * MATMUL**3

    def seconds(n: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(product(x, n))
        return time.perf_counter() - began

    seconds(1)
    times = max(1, round(0.5 / seconds(1)))
    return lambda: times * flops / seconds(times)


def check_sizes(**sizes: int) -> None:
    """Raises ValueError, with its name, if a size is below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: found {value}, expected at least 1")


def conditions() -> dict[str, Any]:
    """Of a measurement: the devices and the versions."""
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
