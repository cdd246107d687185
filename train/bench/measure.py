"""What the benches share: ways of doing one thing in turn, and the limit they are held against."""

from __future__ import annotations

import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from btlm_jax.utils.progress import Progress

MATMUL_SIZE = 4096  # a square matrix product of this size reaches what the hardware can do


def matmul_rate(dtype: str) -> Callable[[], float]:
    """A function that returns the FLOP/s of one device in a large matrix product."""
    x = jax.random.normal(jax.random.key(0), (MATMUL_SIZE, MATMUL_SIZE), dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    multiply = functools.partial(
        jnp.dot, precision=precision, preferred_element_type=jnp.float32
    )  # as the layers do, and the faster kind for bf16
    product = jax.jit(
        lambda x, n: jax.lax.fori_loop(0, n, lambda _, y: (multiply(x, y) / 64).astype(x.dtype), x)
    )
    flops = 2.0 * MATMUL_SIZE**3

    def seconds(n: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(product(x, n))
        return time.perf_counter() - began

    seconds(1)
    times = max(1, round(0.5 / seconds(1)))
    return lambda: times * flops / seconds(times)


def measure_in_turn(
    compiled: Mapping[str, Any], args: tuple[Any, ...], *, rounds: int, dtype: str, flops: float
) -> dict[str, Any]:
    """Runs compiled programs in turn, each round beside a large matrix product.

    Args:
      compiled: the programs, of which the first is ours; each is called with `args`.
      flops: of the matrix products that the work needs, for the share of the limit.

    Returns:
      Medians over the rounds, of seconds and of ratios within a round, and the bytes the programs
      take for temporary arrays; see `summarize_rounds`.
    """
    found: dict[str, list[float]] = {way: [] for way in compiled}
    rates, product = [], matmul_rate(dtype)
    with Progress(rounds, "round", "bench") as progress:
        for _ in range(rounds):
            rates.append(product())
            for way, fn in compiled.items():
                began = time.perf_counter()
                jax.block_until_ready(fn(*args))
                found[way].append(time.perf_counter() - began)
            progress.update(1)
    temporary = {w: fn.memory_analysis().temp_size_in_bytes for w, fn in compiled.items()}
    return summarize_rounds(found, rates, flops, temporary)


def summarize_rounds(
    found: Mapping[str, list[float]],
    rates: list[float],
    flops: float,
    temporary: Mapping[str, int],
) -> dict[str, Any]:
    """Medians over the rounds of seconds and of ratios within a round, as JSON can hold them."""
    ways, ours = {}, next(iter(found.values()))
    for way, seconds in found.items():
        ways[way] = {
            "seconds": statistics.median(seconds),
            "best": min(seconds),
            "of_matmul": statistics.median(
                flops / s / rate for s, rate in zip(seconds, rates, strict=True)
            ),
            "over_ours": statistics.median(s / o for s, o in zip(seconds, ours, strict=True)),
            "temporary_bytes": temporary[way],
        }
    return {"ways": ways, "matmul": statistics.median(rates), "rounds": len(rates)}


def format_measurements(what: str, r: Mapping[str, Any]) -> Iterator[str]:
    """A report, with its `conditions`, as text."""
    yield (
        f"{what}, {r['dtype']}, on one {r['device']} ({r['cores']} cores), jax {r['jax']}; "
        f"median of {r['rounds']} rounds (best)"
    )
    yield f"matrix product of {MATMUL_SIZE}: {r['matmul'] / 1e9:,.0f} GFLOP/s"
    yield f"{'':<24}{'ms':>10}{'(best)':>12}{'x ours':>9}{'of limit':>10}{'temporary MiB':>15}"
    for way, x in r["ways"].items():
        best = f"({1e3 * x['best']:,.1f})"
        yield (
            f"{way:<24}{1e3 * x['seconds']:>10,.1f}{best:>12}{x['over_ours']:>9.2f}"
            f"{x['of_matmul']:>10.1%}{x['temporary_bytes'] / 2**20:>15,.0f}"
        )


def check_sizes(**sizes: int) -> None:
    """Raises ValueError, with its name, if a size is below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: found {value}, expected at least 1")


def measurement_conditions() -> dict[str, Any]:
    """Of a measurement: the devices, their platform ("cpu", "gpu", "tpu"), and the versions."""
    return {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
