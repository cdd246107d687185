"""The quickstart: runs every step end to end on real text, in a few minutes.

Tokenizer, training on a mesh, checkpoint, export, conversion back and generation. Each step is one
that a command performs: tokenize, train, export, convert, verify, generate.
"""

from __future__ import annotations

import json
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
from btlm_jax.convert import auto, convert, export, verify
from btlm_jax.data import sample_text
from btlm_jax.data.prepare import HELD_OUT, TRAIN, prepare_tokens
from btlm_jax.data.token_shards import TokenShards
from btlm_jax.data.tokenizer import encode_prompt, load_tokenizer
from btlm_jax.generation.generate import generate
from btlm_jax.model import sharding, weights
from btlm_jax.train.loop import train
from btlm_jax.train.metrics import loss_curves
from btlm_jax.train.recipe import Recipe
from btlm_jax.train.recipe_build import build_config
from btlm_jax.train.recipe_file import load_recipe
from btlm_jax.utils import atomic, plots
from btlm_jax.utils.local_paths import local_path

RECIPE_NAME = "tiny"
HELD_OUT_FRACTION = 0.1
VIRTUAL_DEVICES = 4
PROMPTS = ('The "with" statement', "A class definition", "If the iterator is")


def run_quickstart(
    directory: Path, *, steps: int | None = None, seed: int = 0, overrides: Sequence[str] = ()
) -> None:
    """Trains, exports, converts and generates; prints what it does.

    Args:
      directory: created. `text.txt` and `tokens/` are the data, `run/` is the training run, `hf/`
        its export, `converted/` the export converted back, and `loss.png` the loss curve.
      steps: number of steps; by default the recipe's.
      seed: seed of the initial weights and of the order of the data.
      overrides: other values of the recipe `tiny`, as for `btlm train --set`.

    Raises:
      FileExistsError: the directory exists.
      ValueError: matplotlib is missing, or steps < 1.
    """
    _use_virtual_devices()
    plots.require_matplotlib()
    directory, started = local_path(directory, "directory"), time.monotonic()
    tokens, run = directory / "tokens", directory / "run"
    settings = [
        f"data.train={json.dumps(str(tokens / TRAIN))}",
        f"data.held_out={json.dumps(str(tokens / HELD_OUT))}",
        f"run.seed={seed}",
        *overrides,
    ]
    settings += _step_overrides(load_recipe(RECIPE_NAME, settings), steps)
    config = build_config(load_recipe(RECIPE_NAME, settings))
    mesh = _make_mesh(config)
    settings += _mesh_overrides(load_recipe(RECIPE_NAME, settings), mesh)
    if directory.exists():
        raise FileExistsError(f"{directory} exists: name another directory, or delete it first")
    directory.mkdir(parents=True)

    text = directory / "text.txt"
    text.write_text(sample_text.read_sample_text(), encoding="utf-8")
    prepare_tokens(text, tokens, new_tokenizer=config.vocab_size, held_out=HELD_OUT_FRACTION)
    train_tokens, held_out = (TokenShards(tokens / name) for name in (TRAIN, HELD_OUT))
    unigram = unigram_entropy(held_out.read(0, len(held_out)))
    print(f"text: Python's language reference, {len(train_tokens):,} tokens to train on, "
          f"{len(held_out):,} held out, with a unigram entropy of {unigram:.3f} nats per token"
    )  # fmt: skip
    shape = ", ".join(f"{name} {n}" for name, n in mesh.shape.items() if n > 1) or "one device"
    parameters = weights.count_parameters(config)
    print(f"model: {parameters:,} parameters, width {config.n_embd} (muP base "
          f"{config.n_embd * config.mup_width_scale:.0f}), on a mesh of {mesh.size} "
          f"{jax.default_backend()} devices ({shape})")  # fmt: skip

    result = train(load_recipe(RECIPE_NAME, settings), run)
    if not result.finished:
        # The mesh is left out: it is one of virtual devices, and their number may change.
        kept = [s for s in settings if not s.startswith("mesh.")]
        options = " ".join(f"--set {shlex.quote(s)}" for s in kept)
        print(f"stopped after step {result.step}; resume with: btlm train {RECIPE_NAME} "
              f"{shlex.quote(str(run))} {options}")  # fmt: skip
        return
    plots.draw_loss_curve(
        directory / "loss.png", loss_curves(run), {"unigram entropy": unigram},
        f"BTLM, {parameters / 1e6:.1f}M parameters, on the Python language reference",
    )  # fmt: skip
    bits = result.held_out * len(held_out) / math.log(2) / held_out.metadata.text_bytes
    print(f"held-out loss {result.held_out:.3f} nats per token ({bits:.2f} bits per byte), "
          f"unigram entropy {unigram:.3f}")  # fmt: skip

    export(run, directory / "hf")
    convert(directory / "hf", directory / "converted")
    comparison = verify(run, directory / "converted")
    if not comparison:
        raise ValueError(f"{directory}: the round trip changed weights: {comparison}")
    print("Orbax -> Hugging Face -> Orbax: every weight bit-equal")
    _print_samples(directory / "converted", mesh)
    _print_summary(directory, {
        "text.txt": "the text", "tokens/": "its tokens and tokenizer", "loss.png": "loss curve",
        "run/": "the training run: metrics, Orbax checkpoints",
        "hf/": "its weights for transformers", "converted/": "converted back from hf/",
    }, "run", started)  # fmt: skip


def run_quickstart_from_hf(directory: Path, source: str) -> None:
    """Converts a Hugging Face checkpoint, checks the conversion and generates from it.

    Args:
      directory: created; holds the converted checkpoint.
      source: a Hugging Face directory or a Hub id.

    Raises:
      FileExistsError: the directory exists.
      FileNotFoundError, ConnectionError, ValueError: as `convert.convert`.
    """
    started = time.monotonic()
    _use_virtual_devices()
    directory = local_path(directory, "directory")
    atomic.refuse_existing(directory, overwrite=False, ours=metadata.is_btlm_checkpoint)
    if auto.read_any_tokenizer(source) is None:
        raise FileNotFoundError(
            f"{source}: no tokenizer.json, nor vocab.json with merges.txt, which generation needs: "
            "copy them from the model's repository"
        )
    report = convert(source, directory / "checkpoint")
    config = metadata.read_metadata(directory / "checkpoint").config
    print(f"converted {weights.count_parameters(config):,} parameters: {report}")
    _print_samples(directory / "checkpoint", _make_mesh(config))
    _print_summary(directory, {"checkpoint/": "Orbax checkpoint"}, "checkpoint", started)


def unigram_entropy(tokens: np.ndarray) -> float:
    """Returns the entropy of the token frequencies, in nats per token.

    No unigram model can have a lower loss.
    """
    p = np.unique(tokens, return_counts=True)[1] / tokens.size
    return float(-(p * np.log(p)).sum())


def _step_overrides(recipe: Recipe, steps: int | None) -> list[str]:
    """Returns the overrides for another number of steps; warmup leaves at least one of them."""
    if steps is None:
        return []
    if steps < 1:
        raise ValueError(f"steps: found {steps}, expected at least 1")
    settings, phase = recipe.optimizer, recipe.phases[0]
    warmup = min(settings.warmup_tokens, (steps - 1) * phase.tokens_per_step)
    return [f"phases.0.steps={steps}", f"optimizer.warmup_tokens={warmup}"]


def _mesh_overrides(recipe: Recipe, mesh: Mesh) -> list[str]:
    """Returns the overrides for a mesh: its tensor axis, and a batch size that it divides."""
    num_shards = sharding.num_shards(mesh, sharding.RULES, "batch")
    batch_size = sharding.round_up(recipe.phases[0].batch_size, num_shards)
    return [f"mesh.tensor={mesh.shape['tensor']}", f"phases.0.batch_size={batch_size}"]


def _print_samples(path: Path, mesh: Mesh) -> None:
    """Prints continuations of the prompts, greedy and sampled."""
    tokenizer = load_tokenizer(path)
    model, params = checkpoint.load(path, mesh=mesh)
    for prompt in PROMPTS:
        ids = np.array([encode_prompt(tokenizer, prompt)])
        for name, sample in (("greedy", False), ("sampled", True)):
            temperature = 0.7 if sample else 1.0
            out = generate(
                model, params, ids, max_new_tokens=48, do_sample=sample, temperature=temperature
            )
            print(f"\n[{name}] {tokenizer.decode(out[0].tolist())}")
    print()


def _use_virtual_devices() -> None:
    """Has JAX show several devices on a CPU, so that the weights are really sharded.

    Called before anything else, because JAX counts its devices only once.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", VIRTUAL_DEVICES)


def _make_mesh(config: BTLMConfig) -> Mesh:
    """Returns a mesh of all devices, with tensor parallelism on virtual ones."""
    devices = len(jax.devices())
    divisible = devices % 2 == 0 and config.n_head % 2 == 0
    tensor = 2 if jax.default_backend() == "cpu" and divisible else 1
    return sharding.make_mesh(fsdp=devices // tensor, tensor=tensor)


def _print_summary(directory: Path, files: dict[str, str], model: str, started: float) -> None:
    print(f"written to {directory} ({time.monotonic() - started:.0f} s):")
    for name, description in files.items():
        print(f"  {name:<14} {description}")
    path = shlex.quote(str(directory / model))
    print(f"next: btlm generate {path} --prompt 'The statement' --sample --temperature 0.7")
