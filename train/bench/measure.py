"""Shared parts of the benchmarks: rounds of measurements, their limit, and the text of a report."""

from __future__ import annotations

import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from btlm_jax.utils.dtypes import checked_dtype
from btlm_jax.utils.progress import Progress

MATMUL_SIZE = 4096  # a square matrix product of this size reaches the speed of the hardware


def benchmark_dtype(dtype: str | None) -> str:
    """Returns the compute dtype of a benchmark; by default that of the platform.

    Raises:
      ValueError: another dtype than float32 and bfloat16, whose rounding the checks know.
    """
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return checked_dtype(default if dtype is None else dtype, "dtype", ("float32", "bfloat16")).name


def matmul_rate(dtype: str) -> Callable[[], float]:
    """Returns a function that measures the FLOP/s of a large matrix product on one device."""
    x = jax.random.normal(jax.random.key(0), (MATMUL_SIZE, MATMUL_SIZE), dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    multiply = functools.partial(
        jnp.dot, precision=precision, preferred_element_type=jnp.float32
    )  # as in the model's layers; also the faster kind for bf16
    product = jax.jit(
        lambda x, n: jax.lax.fori_loop(0, n, lambda _, y: (multiply(x, y) / 64).astype(x.dtype), x)
    )
    flops = 2.0 * MATMUL_SIZE**3

    def seconds(repeats: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(product(x, repeats))
        return time.perf_counter() - start

    seconds(1)
    repeats = max(1, round(0.5 / seconds(1)))
    return lambda: repeats * flops / seconds(repeats)


def measure_in_turn(
    programs: Mapping[str, Any], args: tuple[Any, ...], *, rounds: int, dtype: str, flops: float
) -> dict[str, Any]:
    """Runs compiled programs and a large matrix product in turn, once per round.

    Args:
      programs: compiled programs by name, ours first.
      args: the arguments of every program.
      rounds: rounds.
      dtype: dtype of the matrix product.
      flops: FLOPs of the matrix products in a program, to compare with the measured rate.

    Returns:
      The result of `summarize_rounds`.
    """
    measurements: dict[str, list[float]] = {name: [] for name in programs}
    rates, product = [], matmul_rate(dtype)
    with Progress(rounds, "round", "bench") as progress:
        for _ in range(rounds):
            rates.append(product())
            for name, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(*args))
                measurements[name].append(time.perf_counter() - start)
            progress.update(1)
    temporary = {
        name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()
    }
    return summarize_rounds(measurements, rates, flops, temporary)


def summarize_rounds(
    seconds: Mapping[str, Sequence[float]],
    rates: Sequence[float],
    flops: float,
    temporary: Mapping[str, int],
) -> dict[str, Any]:
    """Returns medians over the rounds of times, and of ratios within a round, for JSON.

    Args:
      seconds: the time of every round for each variant, ours first.
      rates: the FLOP/s of the matrix product in every round.
      flops: FLOPs of the matrix products in a variant.
      temporary: bytes of temporary arrays of each variant.
    """
    ours = next(iter(seconds.values()))
    variants = {}
    for name, times in seconds.items():
        variants[name] = {
            "seconds": statistics.median(times),
            "best": min(times),
            "of_matmul": median_ratio([flops / s for s in times], rates),
            "over_ours": median_ratio(times, ours),
            "temporary_bytes": temporary[name],
        }
    return {"ways": variants, "matmul": statistics.median(rates), "rounds": len(rates)}


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Returns the median over the rounds of the ratio within a round.

    A machine that slows down for some rounds does not bias it.
    """
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def format_measurements(title: str, report: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of a report of `measure_in_turn` with its `measurement_conditions`."""
    yield (
        f"{title}, {report['dtype']}, on one {report['device']} ({report['cores']} cores), "
        f"jax {report['jax']}; median of {report['rounds']} rounds (best)"
    )
    yield f"matrix product of {MATMUL_SIZE}: {report['matmul'] / 1e9:,.0f} GFLOP/s"
    yield f"{'':<24}{'ms':>10}{'(best)':>12}{'x ours':>9}{'of limit':>10}{'temporary MiB':>15}"
    for name, row in report["ways"].items():
        best = f"({1e3 * row['best']:,.1f})"
        yield (
            f"{name:<24}{1e3 * row['seconds']:>10,.1f}{best:>12}{row['over_ours']:>9.2f}"
            f"{row['of_matmul']:>10.1%}{row['temporary_bytes'] / 2**20:>15,.0f}"
        )


def require_positive(**sizes: int) -> None:
    """Raises ValueError, naming the argument, if a size is below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: found {value}, expected at least 1")


def measurement_conditions() -> dict[str, Any]:
    """Returns the devices, their platform ("cpu", "gpu", "tpu"), and the versions."""
    return {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
