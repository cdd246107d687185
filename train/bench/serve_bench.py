"""Measures an engine with several streams at a time, beside one stream after another."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Literal

import numpy as np

from btlm_jax.generation.engine import Engine
from btlm_jax.generation.request_handle import Handle
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import CACHE_DTYPES
from btlm_jax.model.params import Params
from btlm_jax.train.bench import measure
from btlm_jax.train.bench.random_model import make_random_model
from btlm_jax.utils.compile_cache import count_compilations
from btlm_jax.utils.dtypes import optional_dtype
from btlm_jax.utils.format import align_columns


@dataclasses.dataclass
class _Stream:
    """A request that runs, and when its tokens came."""

    handle: Handle
    submitted: float
    times: list[float] = dataclasses.field(default_factory=list)


def bench_serve(
    *,
    preset: str = "btlm-3b-8k",
    layers: int | None = None,
    weights: str = "int8",
    streams: tuple[int, ...] = (1, 8, 32),
    requests: int = 2,
    prompt: int = 64,
    tokens: int = 32,
    steps: int = 1,
    cache_dtype: Literal["int8"] | None = None,
) -> dict[str, Any]:
    """Times an engine that always has the same number of requests, with random weights.

    A request is followed by another one at once. One stream at a time is the baseline: what
    `btlm generate` would take for one request after another.

    Args:
      preset: preset of the model.
      layers: layers of the model; by default those of the preset.
      weights: scheme of the weights: float32, bfloat16, int8, int4 (groups of 64) or int4:128.
      streams: requests at a time; several values are measured one after another.
      requests: measured requests of every stream.
      prompt: tokens of a prompt, of which no two share a beginning.
      tokens: new tokens of a request.
      steps: tokens that are decoded between two fetches.
      cache_dtype: dtype of the KV cache; by default the compute dtype.

    Returns:
      The measurements and their conditions, for JSON.

    Raises:
      ValueError: a size is below 1, or the preset or scheme is unknown.
    """
    counts = {f"streams[{i}]": n for i, n in enumerate(streams)}
    measure.require_positive(requests=requests, prompt=prompt, tokens=tokens, steps=steps, **counts)
    optional_dtype(cache_dtype, "cache_dtype", CACHE_DTYPES)
    model, params = make_random_model(preset, layers, weights)
    rows = {}
    for n in (1, *(n for n in streams if n != 1)):
        engine = _new_engine(model, params, n, prompt + tokens, steps, cache_dtype)
        _run_streams(engine, n, 1, prompt, tokens)  # compiles
        with count_compilations() as compilations:
            rows[n] = _run_streams(engine, n, requests, prompt, tokens)
        rows[n]["compilations"] = compilations.count
    for row in rows.values():
        row["speedup"] = row["tokens_per_second"] / rows[1]["tokens_per_second"]
    report = {
        "streams": {str(n): row for n, row in rows.items()},
        "layers": model.config.n_layer,
        "weights": weights,
        "prompt": prompt,
        "tokens": tokens,
        "steps": steps,
        "cache_dtype": cache_dtype or str(model.compute_dtype),
    } | measure.measurement_conditions()
    for line in _format_report(report):
        print(line)
    return report


def _new_engine(
    model: BTLM, params: Params, rows: int, max_length: int, steps: int, cache_dtype: str | None
) -> Engine:
    return Engine(
        model,
        params,
        rows=rows,
        max_length=max_length,
        steps=steps,
        cache_dtype=cache_dtype,
        prefix_cache_bytes=0,
    )


def _run_streams(
    engine: Engine, num_streams: int, requests: int, prompt: int, tokens: int
) -> dict[str, Any]:
    """Runs requests in closed loops, and returns rates and times."""
    rng = np.random.default_rng(0)
    left, running, finished = num_streams * requests, list[_Stream](), list[_Stream]()
    start = time.perf_counter()
    while left or running:
        while left and len(running) < num_streams:
            ids = rng.integers(0, engine.model.config.vocab_size, prompt)
            handle = engine.submit(ids, max_new_tokens=tokens, eos_token_id=None)
            running.append(_Stream(handle, time.perf_counter()))
            left -= 1
        engine.step()
        now = time.perf_counter()
        for stream in running:
            stream.times += [now] * (len(stream.handle.tokens) - len(stream.times))
        finished += [stream for stream in running if stream.handle.finished]
        running = [stream for stream in running if not stream.handle.finished]
    seconds = time.perf_counter() - start
    first = [stream.times[0] - stream.submitted for stream in finished]
    between = np.concatenate([np.diff(stream.times) for stream in finished] or [np.zeros(1)])
    return {
        "tokens_per_second": sum(len(stream.times) for stream in finished) / seconds,
        "first_token_seconds": _percentiles(first),
        "token_seconds": _percentiles(between),
    }


def _percentiles(values: Any) -> dict[str, float]:
    values = np.asarray(values) if len(values) else np.zeros(1)
    return {name: float(np.percentile(values, q)) for name, q in (("p50", 50), ("p99", 99))}


def _format_report(report: dict[str, Any]) -> list[str]:
    """Returns the lines of a table."""
    table = [["streams", "tokens/s", "speedup", "first p50", "p99", "token p50", "p99", "compiled"]]
    for n, row in report["streams"].items():
        first, between = row["first_token_seconds"], row["token_seconds"]
        seconds = [first["p50"], first["p99"], between["p50"], between["p99"]]
        table.append(
            [
                n,
                f"{row['tokens_per_second']:.1f}",
                f"{row['speedup']:.2f}",
                *(f"{1000 * s:.0f} ms" for s in seconds),
                str(row["compilations"]),
            ]
        )
    return align_columns(table, ">")
