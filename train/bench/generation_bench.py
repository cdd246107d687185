"""Measure decoding and prefill with random weights, beside what the memory or the matrix units can
do, and beside PyTorch."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from btlm_jax.checkpoint import quantization, unstacked
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.config import BTLMConfig
from btlm_jax.generation import prompts, sample_loop
from btlm_jax.generation.decode import DecodeSpec, RowInputs
from btlm_jax.generation.options import GenerationOptions
from btlm_jax.generation.prefill import PromptState, prefill
from btlm_jax.model import sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.perf import accounting
from btlm_jax.train.bench import measure
from btlm_jax.train.bench.baseline import Baseline
from btlm_jax.utils.process_memory import peak_rss
from btlm_jax.utils.progress import Progress

_READ_BYTES = 256 << 20  # more than any cache holds
Show = Callable[[object], None]


def bench_decode(
    *,
    preset: str,
    layers: int | None,
    weights: str,
    context: int,
    steps: int,
    batch_sizes: Sequence[int],
    cache_dtype: str | None,
    rounds: int,
    torch: bool | None,
    show: Show = print,
) -> dict[str, Any]:
    """Times steps of decoding on one device, for every batch size, through the loop of `generate`.

    A step reads all weights and the whole cache; the limit is the rate at which a large array is
    summed in the same run. PyTorch's steps are bf16 (fp32 for fp32), with a KV cache, each layer's
    products `F.linear`, and random weights of its own: of the same shapes, not of the same results.

    Args:
      preset, layers: of the model; None keeps its layers.
      weights: "float32", "bfloat16", "int8", "int4" or "int4:128".
      context: tokens that the cache holds before the first step.
      steps: tokens in a measurement.
      batch_sizes: rows.
      cache_dtype: as in `generate`.
      rounds: how often everything is measured.
      torch: None compares where it is installed.
      show: takes each line of the report.

    Returns:
      The measurements and their conditions, as JSON can hold them.

    Raises:
      ValueError: a size out of range, or torch=True and no torch.
    """
    measure.check_sizes(context=context, steps=steps, rounds=rounds, **_named(batch_sizes))
    limit = _read_rate()  # before there are weights: the peak of memory should be theirs
    model, params = _random_model(preset, layers, weights)
    c, ways = model.config, {}
    weight_bytes = sum(accounting.array_bytes(x.shape, x.dtype) for x in jax.tree.leaves(params))
    with _peer(torch, c, weights) as peer:
        for rows in batch_sizes:
            ours = _decoder(model, params, rows, context, steps, rounds, cache_dtype)
            found: dict[str, list[float]] = {"ours": [], "torch": [], "limit": [limit] * rounds}
            with Progress(rounds, "round", f"batch {rows}") as progress:
                for _ in range(rounds):
                    found["ours"].append(ours.seconds() / steps)
                    if peer is not None:
                        work = dict(batch_size=rows, length=context, steps=steps)
                        found["torch"].append(peer.ask(**work)["seconds"] / steps)
                    progress.update(1)
            read = weight_bytes + ours.cache_bytes
            ways[str(rows)] = _row(found, read, rows) | {
                "cache_bytes": ours.cache_bytes,
                "temporary_bytes": ours.temporary_bytes,
            }
            del ours
        about = peer and peer.about
    report = {
        "ways": ways,
        "weights": weights,
        "weight_bytes": weight_bytes,
        "layers": c.n_layer,
        "context": context,
        "cache_dtype": cache_dtype or str(model.compute_dtype),
        "torch": about,
        "peak_bytes": _peak_bytes(),
        "rounds": rounds,
    } | measure.measurement_conditions()
    for line in _decode_lines(report):
        show(line)
    return report


def bench_prefill(
    *,
    preset: str,
    layers: int | None,
    weights: str,
    lengths: Sequence[int],
    rounds: int,
    torch: bool | None,
    show: Show = print,
) -> dict[str, Any]:
    """Times reading a prompt on one device, for every length, as `generate` does it.

    The limit is the rate of a large matrix product in bf16 (fp32 for fp32). Arguments, results and
    errors as in `bench_decode`.
    """
    measure.check_sizes(rounds=rounds, **_named(lengths))
    dtype = "float32" if weights == "float32" else "bfloat16"
    product = measure.matmul_rate(dtype)
    model, params = _random_model(preset, layers, weights)
    ways = {}
    with _peer(torch, model.config, weights) as peer:
        for length in lengths:
            ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length))
            args = (model, params, jnp.asarray(ids, jnp.int32), None, np.int32(length), length)
            jax.block_until_ready(prefill(*args))
            found: dict[str, list[float]] = {"ours": [], "torch": [], "limit": []}
            with Progress(rounds, "round", f"length {length}") as progress:
                for _ in range(rounds):
                    found["limit"].append(product())
                    began = time.perf_counter()
                    jax.block_until_ready(prefill(*args))
                    found["ours"].append(time.perf_counter() - began)
                    if peer is not None:
                        found["torch"].append(peer.ask(batch_size=1, length=length)["seconds"])
                    progress.update(1)
            c = model.config  # logits of the last token alone
            flops = length * accounting.flops_per_token(c, length).forward_causal
            flops -= 2.0 * (length - 1) * c.vocab_size * c.n_embd
            ways[str(length)] = _row(found, flops, length)
        about = peer and peer.about
    report = {
        "ways": ways,
        "weights": weights,
        "layers": model.config.n_layer,
        "dtype": dtype,
        "torch": about,
        "peak_bytes": _peak_bytes(),
        "rounds": rounds,
    } | measure.measurement_conditions()
    for line in _prefill_lines(report):
        show(line)
    return report


class _Decoder:
    """The loop of `generate` over rows that never end."""

    def __init__(self, program, params, prompt, state, steps: int) -> None:
        counts = np.int32(steps), np.int32(len(state.done))
        args = program, params, prompt.cache, state, None, *counts
        self._compiled: Any = sample_loop.advance_loop.lower(*args).compile()
        self._args, self._state = args, state
        own = sum(x.nbytes for x in jax.tree.leaves(state.cache.layers))
        self.cache_bytes = own + prompt.cache.nbytes
        memory: Any = self._compiled.memory_analysis()
        self.temporary_bytes = memory.temp_size_in_bytes
        self.seconds()

    def seconds(self) -> float:
        """Of as many steps as one measurement has."""
        _, params, prompts_, _, table, *counts = self._args
        began = time.perf_counter()
        self._state = self._compiled(params, prompts_, self._state, table, *counts)
        jax.block_until_ready(self._state)
        taken = time.perf_counter() - began
        if bool(np.asarray(self._state.done).any()):
            raise AssertionError("a row ended")
        return taken


def _decoder(
    model: BTLM, params, rows: int, context: int, steps: int, rounds: int, cache_dtype: str | None
) -> _Decoder:
    """Decoding after a context of zeros, which costs what any other does."""
    new = steps * (rounds + 1) + 1
    filled = jnp.full(rows, context, jnp.int32)
    empty = model.init_cache(params, rows, context, dtype=cache_dtype)
    cache = dataclasses.replace(
        empty,
        segment_ids=jnp.ones_like(empty.segment_ids),
        segment=jnp.ones(rows, jnp.int32),
        length=filled,
        cursor=jnp.int32(context),
        fresh=False,
    )
    prompt = PromptState(cache, jnp.zeros((rows, model.config.vocab_size)))
    zero = np.zeros(rows, np.int32)
    of_rows = RowInputs(
        filled, filled, zero, zero, filled + new + 1, zero.astype(np.uint32), zero, zero,
        np.ones(rows, bool),
    )  # fmt: skip
    program = DecodeSpec(model, GenerationOptions(), ())
    ids = np.zeros((rows, context + prompts.bucket_length(new + 1)), np.int32)
    begin = program, params, prompt, of_rows, ids, None, None
    state = sample_loop.start_loop(*begin, prompts.bucket_length(new))
    return _Decoder(program, params, prompt, state, steps)


def _random_model(preset: str, layers: int | None, kind: str) -> tuple[BTLM, Any]:
    """A model with random weights by layer, of a kind; nothing is ever there in floats first."""
    config = BTLMConfig.preset(preset)
    if layers is not None:
        measure.check_sizes(layers=layers)
        config = dataclasses.replace(config, n_layer=layers)
    floats = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
    to = None if kind in floats else Quantization.parse(kind)
    dtype = floats.get(kind, floats["bfloat16"])
    noise = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    floating = (0.02 * np.random.default_rng(0).standard_normal(1 << 20)).astype(dtype)

    def read(leaf, index) -> np.ndarray:
        shape = [s.stop - s.start for s in index]
        if leaf.part in ("int8", "int4"):
            return np.resize(noise, shape).view(leaf.dtype)
        if leaf.part == "scales":
            return np.full(shape, 0.02 / (64 if leaf.dtype == "float32" else 4), leaf.dtype)
        return np.resize(floating, shape)

    dtypes = {x.path: dtype for x in quantization.stored_leaves(config, to)}
    params = unstacked.load_unstacked(config, read, dtypes, quantization=to)
    return BTLM(config, compute_dtype=dtype.name), params


def _read_rate() -> float:
    """The bytes/s at which a device reads a large array, at best."""
    x = jnp.ones((_READ_BYTES // 4 // 4096, 4096), jnp.float32)
    total = jax.jit(lambda x: x.sum(-1))
    jax.block_until_ready(total(x))
    times = []
    for _ in range(20):
        began = time.perf_counter()
        jax.block_until_ready(total(x))
        times.append(time.perf_counter() - began)
    return x.nbytes / min(times)


@contextmanager
def _peer(torch: bool | None, c: BTLMConfig, weights: str) -> Iterator[Baseline | None]:
    """PyTorch, where it is installed."""
    there = importlib.util.find_spec("torch") is not None
    if torch and not there:
        raise ValueError("torch: it is not installed: pip install torch, or torch=None")
    if torch is False or not there:
        yield None
        return
    problem = dict(
        layers=c.n_layer,
        heads=c.n_head,
        D=c.n_embd,
        F=c.n_inner,
        V=c.vocab_size,
        dtype="float32" if weights == "float32" else "bfloat16",
        device="cuda" if jax.default_backend() == "gpu" else "cpu",
    )
    peer = Baseline("torch_generation", json.dumps(problem), "PyTorch's generation")
    try:
        yield peer
    finally:
        peer.close()


def _row(found: dict[str, list[float]], work: float, tokens: int) -> dict[str, Any]:
    """Medians, and of ratios within a round."""
    ours = found["ours"]
    row = {
        "seconds": statistics.median(ours),
        "best": min(ours),
        "tokens_per_second": tokens / statistics.median(ours),
        "limit": statistics.median(found["limit"]),
        "of_limit": statistics.median(
            work / s / r for s, r in zip(ours, found["limit"], strict=True)
        ),
    }
    if found["torch"]:
        row["torch_seconds"] = statistics.median(found["torch"])
        row["over_torch"] = statistics.median(
            t / s for t, s in zip(found["torch"], ours, strict=True)
        )
    return row


def _peak_bytes() -> int:
    """The most memory this process has held: of the device, or on CPU of the process."""
    if sharding.mesh_platform(None) != "cpu":
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return peak_rss()


def _named(sizes: Sequence[int]) -> dict[str, int]:
    return {f"size {i + 1}": n for i, n in enumerate(sizes)}


def _head(report: dict[str, Any], what: str) -> Iterator[str]:
    yield (
        f"{what}, {report['layers']} layers, {report['weights']}, on one {report['device']} "
        f"({report['cores']} cores), jax {report['jax']}; median of {report['rounds']} rounds "
        "(best)"
    )
    if report["torch"] is not None:
        yield f"beside torch {report['torch']['torch']} ({report['torch']['threads']} threads)"


def _decode_lines(r: dict[str, Any]) -> Iterator[str]:
    yield from _head(r, f"decoding after {r['context']:,} tokens, cache {r['cache_dtype']}")
    rate = next(iter(r["ways"].values()))["limit"]
    yield f"a large array is read at {rate / 1e9:.1f} GB/s"
    yield (
        f"{'batch':>6}{'ms/step':>10}{'(best)':>10}{'tokens/s':>10}{'GB/s':>8}{'of limit':>10}"
        f"{'x torch':>9}{'cache MiB':>11}{'temporary MiB':>15}"
    )
    for rows, x in r["ways"].items():
        read = r["weight_bytes"] + x["cache_bytes"]
        torch = f"{x['over_torch']:.2f}" if "over_torch" in x else "-"
        best = f"({1e3 * x['best']:.1f})"
        yield (
            f"{rows:>6}{1e3 * x['seconds']:>10.1f}{best:>10}{x['tokens_per_second']:>10.2f}"
            f"{read / x['seconds'] / 1e9:>8.1f}{x['of_limit']:>10.0%}{torch:>9}"
            f"{x['cache_bytes'] / 2**20:>11,.0f}{x['temporary_bytes'] / 2**20:>15,.0f}"
        )
    yield f"weights {r['weight_bytes'] / 1e9:.2f} GB; peak memory {r['peak_bytes'] / 1e9:.2f} GB"


def _prefill_lines(r: dict[str, Any]) -> Iterator[str]:
    yield from _head(r, "prefill")
    yield f"{'tokens':>7}{'ms':>10}{'(best)':>11}{'tokens/s':>10}{'of matmul':>11}{'x torch':>9}"
    for length, x in r["ways"].items():
        torch = f"{x['over_torch']:.2f}" if "over_torch" in x else "-"
        best = f"({1e3 * x['best']:,.0f})"
        yield (
            f"{length:>7}{1e3 * x['seconds']:>10,.0f}{best:>11}{x['tokens_per_second']:>10.1f}"
            f"{x['of_limit']:>11.0%}{torch:>9}"
        )
    yield f"peak memory {r['peak_bytes'] / 1e9:.2f} GB"
