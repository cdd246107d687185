"""Measure the training step beside a large matrix product, PyTorch's step, and the data loader."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.config import BTLMConfig
from btlm_jax.data import token_shards_metadata
from btlm_jax.data.token_shards import TokenShards
from btlm_jax.model import alibi, mup, sharding, weights
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import flatten_tree
from btlm_jax.model.remat import Remat
from btlm_jax.perf import accounting
from btlm_jax.train.batches import Batches
from btlm_jax.train.bench import measure, torch_step
from btlm_jax.train.bench.baseline import Baseline
from btlm_jax.train.mixture import Source
from btlm_jax.train.recipe import Phase
from btlm_jax.train.step import init_state, make_step
from btlm_jax.utils.progress import Progress

_LEARNING_RATE = 1e-3
_RATES = ("matmul", "loader")  # measured as rates; the others as seconds per step
Show = Callable[[object], None]

# MPT-3B, a model of the same shape, in llm-foundry on 8 H100 80GB, bf16:
# github.com/mosaicml/llm-foundry, scripts/train/benchmarking: length -> (tokens/s/GPU, MFU in %).
MPT_3B = {2048: (24_100, 43.7), 8192: (16_600, 40.3)}


def bench_train(
    *,
    preset: str,
    length: int,
    batch_size: int,
    rounds: int,
    dtype: str | None,
    remat: Remat = "dots",
    torch: bool | None = None,
    show: Show = print,
) -> dict[str, Any]:
    """Times our step, a matrix product, PyTorch's step and the loader in turn, `rounds` times.

    In turn, because machines are noisy: every ratio is the median of the ratios within the rounds.
    The step is the one of `btlm train` (loss, gradients, clipping, AdamW in muP groups), on all
    devices (fsdp); PyTorch's is the same model with the same weights on the same tokens, in a
    process of its own, its first two losses checked against ours.

    Args:
      preset: of the model.
      length: T, tokens per sequence.
      batch_size: sequences per device and step.
      rounds: how often everything is measured.
      dtype: of the computation; None is that of `BTLM`.
      remat: what our forward pass keeps (`BTLM.remat`).
      torch: whether to measure PyTorch; None if it is installed and there is one device.
      show: takes each line of the report.

    Returns:
      The measurements and their conditions, as JSON can hold them. Rates are per second and device.

    Raises:
      ValueError: an unknown preset, a size below 1, losses that differ, or torch=True and no torch.
    """
    measure.check_sizes(length=length, batch_size=batch_size, rounds=rounds)
    model = BTLM(BTLMConfig.preset(preset), compute_dtype=dtype, remat=remat)
    mesh = sharding.make_mesh()
    params = model.init(jax.random.key(0), mesh=mesh if mesh.size > 1 else None)
    dtype = str(model.runtime(params).dtype)
    tokens = _tokens(model.config, batch_size * mesh.size, length)
    if torch is None:
        torch = importlib.util.find_spec("torch") is not None and mesh.size == 1
    found: dict[str, list[float]] = {"matmul": [], "step": [], "loader": []}
    with contextlib.ExitStack() as stack:
        peers = {}
        if torch:
            peers = stack.enter_context(_peers(model.config, params, tokens, dtype, show))
        found |= {f"torch {mode}": [] for mode in peers}
        ours, compile_seconds = _our_step(model, params, tokens)
        losses = {mode: losses for mode, (_, losses) in peers.items()}
        _check_losses([ours()[0] for _ in range(2)], losses, dtype)
        product = measure.matmul_rate(dtype)
        loader = stack.enter_context(_loader(model.config, batch_size * mesh.size, length))
        progress = stack.enter_context(Progress(rounds, "round", "bench"))
        for _ in range(rounds):
            found["matmul"].append(product())
            found["step"].append(ours()[1])
            for mode, (peer, _) in peers.items():
                found[f"torch {mode}"].append(peer.ask()["seconds"])
            found["loader"].append(loader())
            progress.update(1)
    report = _report(model.config, length, batch_size, found)
    report |= {"preset": preset, "dtype": dtype, "remat": remat, "compile_seconds": compile_seconds}
    for line in _lines(report):
        show(line)
    return report


def _tokens(config: BTLMConfig, batch_size: int, length: int) -> np.ndarray:
    draw = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, length + 1))
    return draw.astype(np.int32)


def _our_step(model: BTLM, params, tokens: np.ndarray) -> tuple[Callable, float]:
    """A function that takes a step and returns loss and seconds; and the seconds to compile it."""
    tx = mup.adamw(_LEARNING_RATE, model.config)
    mesh = sharding.concrete_mesh_of(params["wte"])
    # A copy, because the step reuses the memory of its state.
    state = init_state(jax.tree.map(jnp.copy, params), tx)
    batch: Any = jnp.asarray(tokens[None])
    if mesh is not None:
        batch = jax.device_put(
            batch,
            jax.NamedSharding(mesh, sharding.partition_spec(sharding.RULES, None, "batch", None)),
        )
    began = time.perf_counter()
    step_fn: Any = make_step(model, tx)
    compiled = step_fn.lower(state, batch).compile()
    seconds = time.perf_counter() - began

    def step() -> tuple[float, float]:
        nonlocal state
        began = time.perf_counter()
        state, metrics = compiled(state, batch)
        loss = float(metrics["loss"])
        jax.block_until_ready(state)
        return loss, time.perf_counter() - began

    return step, seconds


@contextlib.contextmanager
def _loader(config: BTLMConfig, batch_size: int, length: int) -> Iterator[Callable[[], float]]:
    """A function that returns the tokens per second read from shards, as training reads them."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "tokens"
        _write_shards(directory, config, max(10_000_000, 2 * batch_size * length))
        source = Source(TokenShards(directory))
        phase = Phase(10_000_000, batch_size, length)
        batches: Any = Batches([source], [phase], seed=0).iterate()
        with contextlib.closing(batches):
            for _ in range(20):  # more than are read ahead
                next(batches)

            def read(seconds: float = 1.0) -> float:
                taken, began = 0, time.perf_counter()
                while (now := time.perf_counter()) - began < seconds:
                    next(batches)
                    taken += batch_size * length
                return taken / (now - began)

            yield read


def _write_shards(directory: Path, config: BTLMConfig, n: int) -> None:
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, n)
    raw = tokens.astype(token_shards_metadata.token_dtype(config.vocab_size)).tobytes()
    (directory / "tokenizer").mkdir(parents=True)
    (directory / "tokenizer/tokenizer.json").write_text("{}")
    (directory / "tokens-00000.bin").write_bytes(raw)
    manifest = token_shards_metadata.TokenShardsMetadata(
        vocab_size=config.vocab_size,
        eos_id=0,
        tokenizer_sha256=token_shards_metadata.tokenizer_fingerprint({"tokenizer.json": b"{}"}),
        shards=(
            token_shards_metadata.TokenShard(
                "tokens-00000.bin",
                n,
                int((tokens == 0).sum()),
                int(tokens.max()),
                hashlib.sha256(raw).hexdigest(),
            ),
        ),
        sources=(token_shards_metadata.TextSource("random", n, 1, n),),
    )
    (directory / "manifest.json").write_text(manifest.to_json())


# PyTorch ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _peers(
    config: BTLMConfig, params, tokens: np.ndarray, dtype: str, show: Show
) -> Iterator[dict[str, tuple[Baseline, list[float]]]]:
    """PyTorch's step, as it is and compiled where that works, both after their first two steps."""
    c = config
    if not (c.alibi and c.gated and c.tie_word_embeddings and c.alibi_scaling is None):
        raise ValueError("PyTorch's step is written for BTLM: ALiBi, SwiGLU and a tied head")
    flat = flatten_tree(params)
    arrays = {}
    for leaf in weights.disk_leaves(c):
        x = flat[leaf.weight.path]
        one = x if leaf.layer is None else x[leaf.layer]
        arrays[leaf.hf_name] = np.asarray(one).reshape(leaf.weight.hf_shape)
    arrays |= {"slopes": np.asarray(alibi.model_slopes(c), np.float32), "tokens": tokens}
    problem = dict(
        dtype=dtype,
        device="cuda" if jax.default_backend() == "gpu" else "cpu",
        lr=_LEARNING_RATE,
        weight_decay=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        clip_norm=1.0,
        width_scale=c.mup_width_scale,
        embeddings_scale=c.mup_embeddings_scale,
        logits_scale=c.logits_scale,
        attention_scale=c.attention_scale,
        epsilon=c.layer_norm_epsilon,
        layers=c.n_layer,
        heads=c.n_head,
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        found = {}
        for mode in ("eager", "compile"):
            file = Path(folder) / f"{mode}.npz"
            # Its best: uncompiled, and in training on CPUs, flex_attention is no kernel.
            best = "flex" if (mode, problem["device"]) == ("compile", "cuda") else "bias"
            torch_step.write(file, {**problem, "mode": mode, "attention": best}, arrays)
            peer = Baseline("torch_step", str(file), f"PyTorch's step ({mode})")
            stack.callback(peer.close)
            try:
                losses = [peer.ask()["loss"] for _ in range(2)]
            except ValueError as e:
                if mode == "eager":
                    raise
                show(f"torch.compile does not work here, eager PyTorch is the peer: {e}")
            else:
                found[mode] = peer, losses
        yield found


def _check_losses(ours: list[float], peers: Mapping[str, list[float]], dtype: str) -> None:
    """Raises ValueError if the first two losses differ: then the steps are not the same work."""
    # bf16 rounds at other places in the two programs; ln(V) is about 11.
    tolerance = 2e-4 if dtype == "float32" else 5e-2
    for mode, theirs in peers.items():
        if not np.allclose(ours, theirs, rtol=0, atol=tolerance):
            raise ValueError(
                f"PyTorch's step ({mode}) is not ours: its first losses are {theirs}, "
                f"expected {ours} to {tolerance}"
            )


# The report ---------------------------------------------------------------------------------------


def _report(
    config: BTLMConfig, length: int, batch_size: int, found: Mapping[str, list[float]]
) -> dict[str, Any]:
    """Medians over the rounds of rates (per second and device) and of ratios within a round."""
    tokens = batch_size * length
    rates = {name: [tokens / s for s in found[name]] for name in found if name not in _RATES}
    rates |= {name: found[name] for name in _RATES}
    flops = accounting.flops_per_token(config, length)
    devices = jax.device_count()

    def of(name: str, other: str, factor: float = 1.0) -> float:
        pairs = zip(rates[name], rates[other], strict=True)
        return statistics.median(a * factor / b for a, b in pairs)

    torch = {name: of("step", name) for name in rates if name.startswith("torch")}
    return {
        "length": length,
        "batch_size_per_device": batch_size,
        "rounds": len(found["step"]),
        "rates": {name: statistics.median(values) for name, values in rates.items()},
        "best": {name: max(values) for name, values in rates.items()},
        "mfu": of("step", "matmul", flops.training_full),
        "mfu_causal": of("step", "matmul", flops.training_causal),
        "loader_over_step": of("loader", "step") / devices,
        "step_over_torch": torch,
    } | measure.measurement_conditions()


def _lines(r: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{r['preset']}, {r['batch_size_per_device']} sequences of {r['length']} tokens per device,"
        f" {r['dtype']}, remat {r['remat']!r}, on {r['devices']} x {r['device']} ({r['cores']} "
        f"cores), jax {r['jax']}; median of {r['rounds']} rounds (best)"
    )
    rates, best = r["rates"], r["best"]
    flops = rates["matmul"] / 1e9, best["matmul"] / 1e9
    yield f"matrix product of {measure.MATMUL_SIZE}: {flops[0]:,.0f} GFLOP/s ({flops[1]:,.0f})"
    for name in rates:
        if name not in _RATES:
            yield f"{name}: {rates[name]:,.0f} tokens/s ({best[name]:,.0f})"
    yield f"step: MFU {r['mfu']:.1%} of the matrix product, causal {r['mfu_causal']:.1%}"
    for name, ratio in r["step_over_torch"].items():
        yield f"step: {ratio:.2f} x {name}"
    yield f"loader: {rates['loader']:,.0f} tokens/s, {r['loader_over_step']:,.0f} x the step's"
    yield f"compiled in {r['compile_seconds']:.1f} s"
    yield from _beside_mpt(r)


def _beside_mpt(r: Mapping[str, Any]) -> Iterator[str]:
    if r["preset"] != "btlm-3b-8k" or r["length"] not in MPT_3B:
        return
    rate, mfu = MPT_3B[r["length"]]
    here = r["rates"]["step"]
    used = accounting.model_flops_utilization(BTLMConfig.preset(r["preset"]), r["length"], here)
    yield (
        f"published for MPT-3B in llm-foundry on H100: {rate:,} tokens/s/GPU, MFU {mfu} % of the "
        f"data sheet's peak; here {here / rate:.2f} x its tokens/s"
        + (f", MFU {used['mfu']:.1%}" if used else "")
    )
