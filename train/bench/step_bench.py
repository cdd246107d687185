"""Measures the train step beside a large matrix product, PyTorch's step, and the data loader."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.config import BTLMConfig
from btlm_jax.data import token_shards_metadata
from btlm_jax.data.token_shards import TokenShards
from btlm_jax.model import mup, sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.remat import Remat
from btlm_jax.perf import accounting
from btlm_jax.train.batches import Batches
from btlm_jax.train.bench import measure
from btlm_jax.train.bench.step_baselines import check_first_losses, open_step_baselines
from btlm_jax.train.mixture import Source
from btlm_jax.train.recipe import Phase
from btlm_jax.train.step import init_state, make_step
from btlm_jax.utils.progress import Progress

_LEARNING_RATE = 1e-3
_RATES = ("matmul", "loader")  # measured as rates; all others as seconds per step

# MPT-3B, a model of the same shape, in llm-foundry on 8 H100 80GB, bf16:
# github.com/mosaicml/llm-foundry, scripts/train/benchmarking: length -> (tokens/s/GPU, MFU in %).
MPT_3B = {2048: (24_100, 43.7), 8192: (16_600, 40.3)}


def bench_train(
    *,
    preset: str = "btlm-40m",
    length: int = 512,
    batch_size: int = 4,
    rounds: int = 5,
    dtype: Literal["float32", "bfloat16"] | None = None,
    remat: Remat = "dots",
    torch: bool | None = None,
) -> dict[str, Any]:
    """Times the train step, a large matrix product, PyTorch's step and the data loader in turn.

    Machines are noisy, so every ratio is the median of the ratios within the rounds. The step is
    the one of `btlm train` (loss, gradients, clipping, AdamW in muP groups) on all devices (fsdp).
    PyTorch's step runs in a process with the same model, weights and tokens; its first two losses
    must agree with ours.

    Args:
      preset: preset of the model.
      length: tokens per sequence.
      batch_size: sequences per device and step.
      rounds: rounds of measurements; medians are reported.
      dtype: compute dtype; by default bfloat16 on accelerators, float32 on CPU.
      remat: which results of a block our step saves for the backward pass.
      torch: whether to measure PyTorch; by default where it is installed and there is one device.

    Returns:
      The measurements and their conditions, for JSON. Rates are per second and device.

    Raises:
      ValueError: the preset is unknown, a size is below 1, the losses differ, or PyTorch is
        required and not installed.
    """
    measure.require_positive(length=length, batch_size=batch_size, rounds=rounds)
    compute_dtype = measure.benchmark_dtype(dtype)
    model = BTLM(BTLMConfig.preset(preset), compute_dtype=compute_dtype, remat=remat)
    mesh = sharding.make_mesh()
    params = model.init(jax.random.key(0), mesh=mesh if mesh.size > 1 else None)
    rows = batch_size * mesh.size
    vocab_size = model.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab_size, (rows, length + 1), np.int32)
    if torch is None:
        torch = importlib.util.find_spec("torch") is not None and mesh.size == 1
    with contextlib.ExitStack() as stack:
        baselines = {}
        if torch:
            baselines = stack.enter_context(
                open_step_baselines(model.config, params, tokens, compute_dtype, _LEARNING_RATE)
            )
        names = ("matmul", "step", "loader", *(f"torch {mode}" for mode in baselines))
        measurements: dict[str, list[float]] = {name: [] for name in names}
        step, compile_seconds = _compile_step(model, params, tokens)
        first_losses = {mode: baseline.first_losses for mode, baseline in baselines.items()}
        check_first_losses([step()[0] for _ in range(2)], first_losses, compute_dtype)
        product = measure.matmul_rate(compute_dtype)
        loader = stack.enter_context(_open_loader(model.config, rows, length))
        progress = stack.enter_context(Progress(rounds, "round", "bench"))
        for _ in range(rounds):
            measurements["matmul"].append(product())
            measurements["step"].append(step()[1])
            for mode, baseline in baselines.items():
                measurements[f"torch {mode}"].append(baseline.process.run()["seconds"])
            measurements["loader"].append(loader())
            progress.update(1)
    report = _summarize_steps(model.config, length, batch_size, measurements)
    report |= {"preset": preset, "dtype": compute_dtype, "remat": remat}
    report |= {"compile_seconds": compile_seconds}
    for line in _format_step_report(report):
        print(line)
    return report


def _compile_step(
    model: BTLM, params: Any, tokens: np.ndarray
) -> tuple[Callable[[], tuple[float, float]], float]:
    """Returns a function that takes a step and returns (loss, seconds), and its compile seconds."""
    tx = mup.adamw(_LEARNING_RATE, model.config)
    mesh = sharding.concrete_mesh_of(params["wte"])
    # A copy, because the step donates its state.
    state = init_state(jax.tree.map(jnp.copy, params), tx)
    batch: Any = jnp.asarray(tokens[None])
    if mesh is not None:
        spec = sharding.partition_spec(sharding.RULES, None, "batch", None)
        batch = jax.device_put(batch, jax.NamedSharding(mesh, spec))
    start = time.perf_counter()
    step_fn: Any = make_step(model, tx)
    compiled = step_fn.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start

    def step() -> tuple[float, float]:
        nonlocal state
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        loss = float(metrics["loss"])
        jax.block_until_ready(state)
        return loss, time.perf_counter() - start

    return step, compile_seconds


@contextlib.contextmanager
def _open_loader(config: BTLMConfig, rows: int, length: int) -> Iterator[Callable[[], float]]:
    """Yields a function that measures the tokens/s of the batches of a training run."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "tokens"
        _write_shards(directory, config.vocab_size, max(10_000_000, 2 * rows * length))
        phase = Phase(10_000_000, rows, length)
        batches: Any = Batches([Source(TokenShards(directory))], [phase], seed=0).iterate()
        with contextlib.closing(batches):
            for _ in range(20):  # more than are read ahead
                next(batches)

            def measure_rate(seconds: float = 1.0) -> float:
                tokens, start = 0, time.perf_counter()
                while (now := time.perf_counter()) - start < seconds:
                    next(batches)
                    tokens += rows * length
                return tokens / (now - start)

            yield measure_rate


def _write_shards(directory: Path, vocab_size: int, count: int) -> None:
    """Writes a token directory with one shard of random tokens."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, count)
    raw = tokens.astype(token_shards_metadata.token_dtype(vocab_size)).tobytes()
    (directory / "tokenizer").mkdir(parents=True)
    (directory / "tokenizer/tokenizer.json").write_text("{}")
    (directory / "tokens-00000.bin").write_bytes(raw)
    metadata = token_shards_metadata.TokenShardsMetadata(
        vocab_size=vocab_size,
        eos_id=0,
        tokenizer_sha256=token_shards_metadata.tokenizer_fingerprint({"tokenizer.json": b"{}"}),
        shards=(
            token_shards_metadata.TokenShard(
                "tokens-00000.bin",
                count,
                int((tokens == 0).sum()),
                int(tokens.max()),
                hashlib.sha256(raw).hexdigest(),
            ),
        ),
        sources=(token_shards_metadata.TextSource("random", count, 1, count),),
    )
    (directory / "manifest.json").write_text(metadata.to_json())


# The report ---------------------------------------------------------------------------------------


def _summarize_steps(
    config: BTLMConfig, length: int, batch_size: int, measurements: Mapping[str, list[float]]
) -> dict[str, Any]:
    """Returns medians over the rounds of rates (per second and device) and of their ratios."""
    tokens = batch_size * length
    rates = {
        name: values if name in _RATES else [tokens / s for s in values]
        for name, values in measurements.items()
    }
    flops = accounting.flops_per_token(config, length)

    def ratio(name: str, other: str, factor: float = 1.0) -> float:
        return measure.median_ratio([factor * rate for rate in rates[name]], rates[other])

    return {
        "length": length,
        "batch_size_per_device": batch_size,
        "rounds": len(measurements["step"]),
        "rates": {name: statistics.median(values) for name, values in rates.items()},
        "best": {name: max(values) for name, values in rates.items()},
        "mfu": ratio("step", "matmul", flops.training_full),
        "mfu_causal": ratio("step", "matmul", flops.training_causal),
        "loader_over_step": ratio("loader", "step") / jax.device_count(),
        "step_over_torch": {n: ratio("step", n) for n in rates if n.startswith("torch")},
    } | measure.measurement_conditions()


def _format_step_report(report: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{report['preset']}, {report['batch_size_per_device']} sequences of {report['length']} "
        f"tokens per device, {report['dtype']}, remat {report['remat']!r}, on {report['devices']} "
        f"x {report['device']} ({report['cores']} cores), jax {report['jax']}; median of "
        f"{report['rounds']} rounds (best)"
    )
    rates, best = report["rates"], report["best"]
    yield (
        f"matrix product of {measure.MATMUL_SIZE}: {rates['matmul'] / 1e9:,.0f} GFLOP/s "
        f"({best['matmul'] / 1e9:,.0f})"
    )
    for name, rate in rates.items():
        if name not in _RATES:
            yield f"{name}: {rate:,.0f} tokens/s ({best[name]:,.0f})"
    yield (
        f"step: MFU {report['mfu']:.1%} of the matrix product, causal {report['mfu_causal']:.1%}"
    )
    for name, ratio in report["step_over_torch"].items():
        yield f"step: {ratio:.2f} x {name}"
    yield (
        f"loader: {rates['loader']:,.0f} tokens/s, {report['loader_over_step']:,.0f} x the step's"
    )
    yield f"compiled in {report['compile_seconds']:.1f} s"
    yield from _compare_with_mpt(report)


def _compare_with_mpt(report: Mapping[str, Any]) -> Iterator[str]:
    """Yields a comparison with the published rates of MPT-3B, for the 3B model at their lengths."""
    length = report["length"]
    if report["preset"] != "btlm-3b-8k" or length not in MPT_3B:
        return
    mpt_rate, mpt_mfu = MPT_3B[length]
    rate = report["rates"]["step"]
    config = BTLMConfig.preset(report["preset"])
    utilization = accounting.model_flops_utilization(config, length, rate)
    yield (
        f"published for MPT-3B in llm-foundry on H100: {mpt_rate:,} tokens/s/GPU, MFU {mpt_mfu} % "
        f"of the data sheet's peak; here {rate / mpt_rate:.2f} x its tokens/s"
        + (f", MFU {utilization['mfu']:.1%}" if utilization else "")
    )
