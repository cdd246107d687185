"""Measures decoding and prefill with random weights, beside a limit of the device and PyTorch."""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.config import BTLMConfig
from btlm_jax.generation.prefill import prefill
from btlm_jax.model import sharding
from btlm_jax.model.kv_cache import CACHE_DTYPES
from btlm_jax.perf import accounting
from btlm_jax.train.bench import measure
from btlm_jax.train.bench.baseline import Baseline
from btlm_jax.train.bench.decode_loop import DecodeLoop
from btlm_jax.train.bench.random_model import make_random_model
from btlm_jax.utils.dtypes import optional_dtype
from btlm_jax.utils.process_memory import peak_rss
from btlm_jax.utils.progress import Progress

_READ_BYTES = 256 << 20  # more than any CPU cache holds


def bench_decode(
    *,
    preset: str = "btlm-3b-8k",
    layers: int | None = None,
    weights: str = "bfloat16",
    context: int = 512,
    steps: int = 16,
    batch_size: tuple[int, ...] = (1,),
    cache_dtype: Literal["int8"] | None = None,
    rounds: int = 5,
    torch: bool | None = None,
) -> dict[str, Any]:
    """Times decoding steps with random weights on one device, in the loop of `btlm generate`.

    A step reads all weights and the whole cache. The limit is the rate at which the device reads a
    large array in the same run. PyTorch, where it is installed, runs in turn with ours: with random
    weights of the same shapes in bf16 (fp32 for float32) and a KV cache.

    Args:
      preset: preset of the model.
      layers: layers of the model; by default those of the preset.
      weights: scheme of the weights: float32, bfloat16, int8, int4 (groups of 64) or int4:128.
      context: tokens in the cache before the first step.
      steps: tokens in a measurement.
      batch_size: sequences; several values are measured one after another.
      cache_dtype: dtype of the KV cache; by default the compute dtype.
      rounds: rounds of measurements; medians are reported.
      torch: whether to measure PyTorch, which needs memory for a second set of weights; by default
        where it is installed.

    Returns:
      The measurements and their conditions, for JSON.

    Raises:
      ValueError: a size is below 1, the preset or scheme is unknown, or PyTorch is required and not
        installed.
    """
    measure.require_positive(context=context, steps=steps, rounds=rounds, **_numbered(batch_size))
    optional_dtype(cache_dtype, "cache_dtype", CACHE_DTYPES)
    limit = _read_rate()  # before the weights exist, so that they set the peak memory
    model, params = make_random_model(preset, layers, weights)
    config, rows = model.config, {}
    weight_bytes = sum(accounting.array_bytes(x.shape, x.dtype) for x in jax.tree.leaves(params))
    with _open_baseline(torch, config, weights) as baseline:
        for size in batch_size:
            loop = DecodeLoop(
                model, params, batch_size=size, context=context, steps=steps, rounds=rounds,
                cache_dtype=cache_dtype,
            )  # fmt: skip
            times = _empty_measurements()
            with Progress(rounds, "round", f"batch {size}") as progress:
                for _ in range(rounds):
                    times["limit"].append(limit)
                    times["ours"].append(loop.measure_seconds() / steps)
                    if baseline is not None:
                        answer = baseline.run(batch_size=size, length=context, steps=steps)
                        times["torch"].append(answer["seconds"] / steps)
                    progress.update(1)
            rows[str(size)] = _summarize(times, weight_bytes + loop.cache_bytes, size) | {
                "cache_bytes": loop.cache_bytes,
                "temporary_bytes": loop.temporary_bytes,
            }
            del loop
    report = {
        "ways": rows,
        "weights": weights,
        "weight_bytes": weight_bytes,
        "layers": config.n_layer,
        "context": context,
        "cache_dtype": cache_dtype or str(model.compute_dtype),
        "torch": None if baseline is None else baseline.metadata,
        "peak_bytes": _peak_bytes(),
        "rounds": rounds,
    } | measure.measurement_conditions()
    for line in _format_decode_report(report):
        print(line)
    return report


def bench_prefill(
    *,
    preset: str = "btlm-3b-8k",
    layers: int | None = None,
    weights: str = "bfloat16",
    length: tuple[int, ...] = (512,),
    rounds: int = 5,
    torch: bool | None = None,
) -> dict[str, Any]:
    """Times prefilling a prompt with random weights on one device, as `btlm generate` does it.

    The limit is the rate of a large matrix product in bf16 (fp32 for float32). PyTorch, where it is
    installed, runs in turn with ours.

    Args:
      preset: preset of the model.
      layers: layers of the model; by default those of the preset.
      weights: scheme of the weights: float32, bfloat16, int8, int4 (groups of 64) or int4:128.
      length: tokens of the prompt; several values are measured one after another.
      rounds: rounds of measurements; medians are reported.
      torch: whether to measure PyTorch, which needs memory for a second set of weights; by default
        where it is installed.

    Returns:
      The measurements and their conditions, for JSON.

    Raises:
      ValueError: as `bench_decode`.
    """
    measure.require_positive(rounds=rounds, **_numbered(length))
    dtype = "float32" if weights == "float32" else "bfloat16"
    product = measure.matmul_rate(dtype)
    model, params = make_random_model(preset, layers, weights)
    config, rows = model.config, {}
    with _open_baseline(torch, config, weights) as baseline:
        for size in length:
            ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, size))
            args = (model, params, jnp.asarray(ids, jnp.int32), None, np.int32(size), size)
            jax.block_until_ready(prefill(*args))
            times = _empty_measurements()
            with Progress(rounds, "round", f"length {size}") as progress:
                for _ in range(rounds):
                    times["limit"].append(product())
                    start = time.perf_counter()
                    jax.block_until_ready(prefill(*args))
                    times["ours"].append(time.perf_counter() - start)
                    if baseline is not None:
                        answer = baseline.run(batch_size=1, length=size)
                        times["torch"].append(answer["seconds"])
                    progress.update(1)
            flops = size * accounting.flops_per_token(config, size).forward_causal
            # Only the last token has logits.
            flops -= 2.0 * (size - 1) * config.vocab_size * config.n_embd
            rows[str(size)] = _summarize(times, flops, size)
    report = {
        "ways": rows,
        "weights": weights,
        "layers": config.n_layer,
        "dtype": dtype,
        "torch": None if baseline is None else baseline.metadata,
        "peak_bytes": _peak_bytes(),
        "rounds": rounds,
    } | measure.measurement_conditions()
    for line in _format_prefill_report(report):
        print(line)
    return report


def _read_rate() -> float:
    """Returns the highest bytes/s at which the device reads a large array."""
    x = jnp.ones((_READ_BYTES // 4 // 4096, 4096), jnp.float32)
    total = jax.jit(lambda x: x.sum(-1))
    jax.block_until_ready(total(x))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(total(x))
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds)


@contextmanager
def _open_baseline(
    torch: bool | None, config: BTLMConfig, weights: str
) -> Iterator[Baseline | None]:
    """Starts PyTorch's generation, or yields None if it is not installed or not wanted."""
    installed = importlib.util.find_spec("torch") is not None
    if torch and not installed:
        raise ValueError("torch: it is not installed: pip install torch, or torch=None")
    if torch is False or not installed:
        yield None
        return
    problem = dict(
        layers=config.n_layer,
        heads=config.n_head,
        D=config.n_embd,
        F=config.n_inner,
        V=config.vocab_size,
        dtype="float32" if weights == "float32" else "bfloat16",
        device="cuda" if jax.default_backend() == "gpu" else "cpu",
    )
    baseline = Baseline("torch_generation", json.dumps(problem), "PyTorch's generation")
    try:
        yield baseline
    finally:
        baseline.close()


def _empty_measurements() -> dict[str, list[float]]:
    """Returns lists of measurements per round: seconds, and the rate of the limit."""
    return {"ours": [], "torch": [], "limit": []}


def _summarize(times: dict[str, list[float]], work: float, tokens: int) -> dict[str, Any]:
    """Returns medians over the rounds.

    Args:
      times: the measurements of every round.
      work: bytes or FLOPs, in the unit of the limit.
      tokens: tokens in a measurement.
    """
    ours = times["ours"]
    seconds = statistics.median(ours)
    row = {
        "seconds": seconds,
        "best": min(ours),
        "tokens_per_second": tokens / seconds,
        "limit": statistics.median(times["limit"]),
        "of_limit": measure.median_ratio([work / s for s in ours], times["limit"]),
    }
    if times["torch"]:
        row["torch_seconds"] = statistics.median(times["torch"])
        row["over_torch"] = measure.median_ratio(times["torch"], ours)
    return row


def _peak_bytes() -> int:
    """Returns the peak memory of the device, or on CPU of this process."""
    if sharding.mesh_platform(None) != "cpu":
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return peak_rss()


def _numbered(sizes: Sequence[int]) -> dict[str, int]:
    return {f"size {i + 1}": n for i, n in enumerate(sizes)}


# The reports --------------------------------------------------------------------------------------


def _heading(report: dict[str, Any], title: str) -> Iterator[str]:
    yield (
        f"{title}, {report['layers']} layers, {report['weights']}, on one {report['device']} "
        f"({report['cores']} cores), jax {report['jax']}; median of {report['rounds']} rounds "
        "(best)"
    )
    if report["torch"] is not None:
        yield f"beside torch {report['torch']['torch']} ({report['torch']['threads']} threads)"


def _format_decode_report(report: dict[str, Any]) -> Iterator[str]:
    title = f"decoding after {report['context']:,} tokens, cache {report['cache_dtype']}"
    yield from _heading(report, title)
    rate = next(iter(report["ways"].values()))["limit"]
    yield f"a large array is read at {rate / 1e9:.1f} GB/s"
    yield (
        f"{'batch':>6}{'ms/step':>10}{'(best)':>10}{'tokens/s':>10}{'GB/s':>8}{'of limit':>10}"
        f"{'x torch':>9}{'cache MiB':>11}{'temporary MiB':>15}"
    )
    for size, row in report["ways"].items():
        nbytes = report["weight_bytes"] + row["cache_bytes"]
        torch = f"{row['over_torch']:.2f}" if "over_torch" in row else "-"
        best = f"({1e3 * row['best']:.1f})"
        yield (
            f"{size:>6}{1e3 * row['seconds']:>10.1f}{best:>10}{row['tokens_per_second']:>10.2f}"
            f"{nbytes / row['seconds'] / 1e9:>8.1f}{row['of_limit']:>10.0%}{torch:>9}"
            f"{row['cache_bytes'] / 2**20:>11,.0f}{row['temporary_bytes'] / 2**20:>15,.0f}"
        )
    yield (
        f"weights {report['weight_bytes'] / 1e9:.2f} GB; peak memory "
        f"{report['peak_bytes'] / 1e9:.2f} GB"
    )


def _format_prefill_report(report: dict[str, Any]) -> Iterator[str]:
    yield from _heading(report, "prefill")
    yield f"{'tokens':>7}{'ms':>10}{'(best)':>11}{'tokens/s':>10}{'of matmul':>11}{'x torch':>9}"
    for length, row in report["ways"].items():
        torch = f"{row['over_torch']:.2f}" if "over_torch" in row else "-"
        best = f"({1e3 * row['best']:,.0f})"
        yield (
            f"{length:>7}{1e3 * row['seconds']:>10,.0f}{best:>11}"
            f"{row['tokens_per_second']:>10.1f}{row['of_limit']:>11.0%}{torch:>9}"
        )
    yield f"peak memory {report['peak_bytes'] / 1e9:.2f} GB"
