"""The whole path on real text in a few minutes: tokenizer, training on a mesh, checkpoint, export,
conversion back, generation. Every step is what a command does: tokenize, train, export, convert,
verify, generate.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from btlm_jax.checkpoint import checkpoint, metadata
from btlm_jax.config import BTLMConfig
from btlm_jax.convert import convert, export, verify
from btlm_jax.data import sample_text
from btlm_jax.data.prepare import HELD_OUT, TRAIN, prepare_tokens
from btlm_jax.data.token_shards import TokenShards
from btlm_jax.data.tokenizer import load_tokenizer
from btlm_jax.generation.generate import generate
from btlm_jax.model import sharding, weights
from btlm_jax.train.loop import train as train_by
from btlm_jax.train.metrics import loss_curves
from btlm_jax.train.recipe import Recipe
from btlm_jax.train.recipe_build import build_config
from btlm_jax.train.recipe_file import load_recipe
from btlm_jax.utils import atomic, plots

logger = logging.getLogger(__name__)

RECIPE = "tiny"
FRACTION = 0.1  # held out
VIRTUAL_DEVICES = 4
PROMPTS = ('The "with" statement', "A class definition", "If the iterator is")


def train(
    directory: Path, *, steps: int | None = None, seed: int = 0, overrides: Sequence[str] = ()
) -> None:
    """Runs the quickstart; `btlm quickstart` prints what it makes.

    Args:
      directory: made by this function. `text.txt` and `tokens/` are what is trained on, `run/` is
        the run, `hf/` its export, `converted/` that converted back, `loss.png` the loss curve.
      steps: overrides the recipe's.
      seed: of the initial weights and the order of the data.
      overrides: of other values of the recipe `tiny`, as of `btlm train --set`.

    Raises:
      FileExistsError: the directory exists.
      ValueError: matplotlib is missing, or steps < 1.
    """
    _virtual_devices()
    plots.require_matplotlib()
    directory, started = Path(directory), time.monotonic()
    tokens, run = directory / "tokens", directory / "run"
    settings = [
        f"data.train={json.dumps(str(tokens / TRAIN))}",
        f"data.held_out={json.dumps(str(tokens / HELD_OUT))}",
        f"run.seed={seed}",
        *overrides,
    ]
    settings += _shortened(load_recipe(RECIPE, settings), steps)
    config = build_config(load_recipe(RECIPE, settings))
    mesh = _mesh(config)
    settings += _fitting(load_recipe(RECIPE, settings), mesh)
    _make(directory)

    (directory / "text.txt").write_text(sample_text.read_sample_text(), encoding="utf-8")
    prepare_tokens(
        directory / "text.txt", tokens, new_tokenizer=config.vocab_size, held_out=FRACTION
    )
    taught, held = (TokenShards(tokens / name) for name in (TRAIN, HELD_OUT))
    unigram = unigram_entropy(held.read(0, len(held)))
    print(f"text: Python's language reference, {len(taught):,} tokens to train on, {len(held):,} "
          f"held out; unigram entropy of those {unigram:.3f} nats per token")  # fmt: skip
    shape = ", ".join(f"{name} {n}" for name, n in mesh.shape.items() if n > 1) or "one device"
    parameters = weights.count_parameters(config)
    print(f"model: {parameters:,} parameters, width {config.n_embd} (muP base "
          f"{config.n_embd * config.mup_width_scale:.0f}), on a mesh of {mesh.size} "
          f"{jax.default_backend()} devices ({shape})")  # fmt: skip

    done = train_by(load_recipe(RECIPE, settings), run)
    if not done.finished:
        # Without the mesh, which is of virtual devices, and may change.
        kept = [s for s in settings if not s.startswith("mesh.")]
        options = " ".join(f"--set {shlex.quote(s)}" for s in kept)
        print(f"stopped after step {done.step}; go on with: btlm train {RECIPE} "
              f"{shlex.quote(str(run))} {options}")  # fmt: skip
        return
    plots.draw_loss_curve(
        directory / "loss.png", loss_curves(run), {"unigram entropy": unigram},
        f"BTLM, {parameters / 1e6:.1f}M parameters, on the Python language reference",
    )  # fmt: skip
    bits = done.held_out * len(held) / math.log(2) / held.metadata.text_bytes
    print(f"held-out loss {done.held_out:.3f} nats per token ({bits:.2f} bits per byte), "
          f"unigram entropy {unigram:.3f}")  # fmt: skip

    export(run, directory / "hf")
    convert(directory / "hf", directory / "converted")
    same = verify(run, directory / "converted")
    if not same:
        raise ValueError(f"{directory}: the round trip changed weights: {same}")
    print("Orbax -> Hugging Face -> Orbax: every weight bit-equal")
    _show(directory / "converted", mesh)
    _summary(directory, {
        "text.txt": "the text", "tokens/": "its tokens, and tokenizer", "loss.png": "loss curve",
        "run/": "the training run: metrics, Orbax checkpoints",
        "hf/": "its weights for transformers", "converted/": "converted back from hf/",
    }, "run", started)  # fmt: skip


def from_hf(directory: Path, source: str) -> None:
    """Converts a Hugging Face checkpoint, checks the conversion and generates from it.

    Raises:
      FileExistsError: the directory exists.
      FileNotFoundError, ConnectionError, ValueError: see `convert.convert`.
    """
    started = time.monotonic()
    _virtual_devices()
    directory = Path(directory)
    atomic.refuse_existing(directory, overwrite=False, ours=metadata.is_btlm_checkpoint)
    report = convert(source, directory / "checkpoint")
    config = metadata.read_metadata(directory / "checkpoint").config
    print(f"converted {weights.count_parameters(config):,} parameters: {report}")
    _show(directory / "checkpoint", _mesh(config))
    _summary(directory, {"checkpoint/": "Orbax checkpoint"}, "checkpoint", started)


def unigram_entropy(tokens: np.ndarray) -> float:
    """The entropy of the token frequencies, nats per token: the best any unigram model can do."""
    p = np.unique(tokens, return_counts=True)[1] / tokens.size
    return float(-(p * np.log(p)).sum())


def _shortened(full: Recipe, steps: int | None) -> list[str]:
    """What to set for another number of steps; the warmup must leave at least one of them."""
    if steps is None:
        return []
    if steps < 1:
        raise ValueError(f"steps: found {steps}, expected at least 1")
    warmup = min(full.optimizer.warmup_tokens, (steps - 1) * full.phases[0].tokens_per_step)
    return [f"phases.0.steps={steps}", f"optimizer.warmup_tokens={warmup}"]


def _fitting(full: Recipe, mesh: Mesh) -> list[str]:
    """What to set for the recipe to run on the mesh: its axes, and a batch that they divide."""
    parts = sharding.num_shards(mesh, sharding.RULES, "batch")
    batch_size = -(-full.phases[0].batch_size // parts) * parts
    return [f"mesh.tensor={mesh.shape['tensor']}", f"phases.0.batch_size={batch_size}"]


def _show(path: Path, mesh: Mesh) -> None:
    """Prints what the checkpoint makes of the prompts."""
    tokenizer = load_tokenizer(path)
    model, params = checkpoint.load(path, mesh=mesh)
    for prompt in PROMPTS:
        ids = np.array([tokenizer.encode(prompt).ids])
        for name, sample in (("greedy", False), ("sampled", True)):
            temperature = 0.7 if sample else 1.0
            out = generate(
                model, params, ids, max_new_tokens=48, do_sample=sample, temperature=temperature
            )
            print(f"\n[{name}] {tokenizer.decode(out[0].tolist())}")
    print()


def _make(directory: Path) -> None:
    if directory.exists():
        raise FileExistsError(f"{directory} exists: name another directory, or delete it first")
    directory.mkdir(parents=True)


def _virtual_devices() -> None:
    """On a CPU, several devices, so that the weights are sharded for real.

    It comes before anything else, because JAX counts its devices once.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", VIRTUAL_DEVICES)


def _mesh(config: BTLMConfig) -> Mesh:
    """All devices; tensor parallel too on virtual ones."""
    devices = len(jax.devices())
    pairs = devices % 2 == 0 and config.n_head % 2 == 0
    tensor = 2 if jax.default_backend() == "cpu" and pairs else 1
    return sharding.make_mesh(fsdp=devices // tensor, tensor=tensor)


def _summary(directory: Path, made: dict[str, str], model: str, started: float) -> None:
    print(f"made in {directory} ({time.monotonic() - started:.0f} s):")
    for name, what in made.items():
        print(f"  {name:<14} {what}")
    path = shlex.quote(str(directory / model))
    print(f"next: btlm generate {path} --prompt 'The statement' --sample --temperature 0.7")
