"""The whole path on real text in a few minutes: tokenizer, training on a mesh, checkpoint, export,
conversion back, generation.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from btlm_jax.convert import convert, export, verify
from jax.sharding import Mesh
from tokenizers import Tokenizer

from btlm_jax import checkpoint, manifest, mup, sharding, staging, weights
from btlm_jax.config import BTLMConfig
from btlm_jax.generation.loop import generate
from btlm_jax.loss import IGNORE, next_token_loss
from btlm_jax.model import BTLM
from btlm_jax.progress import Progress
from btlm_jax.tokenizer import load_tokenizer

from . import manual, plots
from .step import init_state, make_step

logger = logging.getLogger(__name__)

VIRTUAL_DEVICES = 4
PROMPTS = ('The "with" statement', "A class definition", "If the iterator is")


class Recipe(NamedTuple):
    """The quickstart's run; tuned for two CPU cores."""

    vocab_size: int = 2048
    width: int = 256
    base_width: int = 64  # muP: the width at which learning rate and scales are meant
    embeddings_scale: float = 10.0
    output_alpha: float = 1.0
    initializer_range: float = 0.08
    layers: int = 4
    length: int = 128
    batch_size: int = 8
    steps: int = 800
    warmup: int = 30
    learning_rate: float = 0.006
    weight_decay: float = 0.1
    evaluate_every: int = 50


def model_config(recipe: Recipe) -> BTLMConfig:
    """BTLM's choices (SwiGLU, ALiBi, muP) at the recipe's size."""
    return dataclasses.replace(
        BTLMConfig.preset("tiny"),
        vocab_size=recipe.vocab_size,
        n_positions=recipe.length,
        n_embd=recipe.width,
        n_head=recipe.width // 64,
        n_layer=recipe.layers,
        n_inner=recipe.width * 8 // 3,
        initializer_range=recipe.initializer_range,
        mup_width_scale=recipe.base_width / recipe.width,
        mup_embeddings_scale=recipe.embeddings_scale,
        mup_output_alpha=recipe.output_alpha,
    )


def train(
    directory: Path, *, steps: int | None = None, seed: int = 0, recipe: Recipe | None = None
) -> None:
    """Runs the quickstart; `btlm quickstart` prints what it makes.

    Args:
      directory: made by this function.
      steps: overrides the recipe's.
      seed: of the initial weights and the order of the data.
      recipe: default `Recipe()`.

    Raises:
      FileExistsError: the directory exists.
      ValueError: matplotlib is missing, or steps < 1.
    """
    recipe = recipe or Recipe()
    recipe = recipe._replace(steps=steps) if steps is not None else recipe
    if recipe.steps < 1:
        raise ValueError(f"steps: found {recipe.steps}, expected at least 1")
    _virtual_devices()
    plots.require_matplotlib()
    config = model_config(recipe)
    mesh = _mesh(config)
    directory = _make(directory)
    started = time.monotonic()
    recipe = recipe._replace(batch_size=_round_up(recipe.batch_size, mesh))

    text = manual.manual()
    tokenizer = manual.train_tokenizer(text.train, recipe.vocab_size)
    files = directory / "tokenizer"
    files.mkdir()
    tokenizer.save(str(files / "tokenizer.json"))
    tokens, held = (manual.encode(tokenizer, docs) for docs in text)
    unigram = manual.unigram_entropy(held)
    print(f"text: Python's language reference, {tokens.size:,} tokens to train on, {held.size:,} "
          f"held out; unigram entropy of those {unigram:.3f} nats per token")  # fmt: skip

    model = BTLM(config)
    params = model.init(jax.random.key(seed), mesh=mesh)
    shape = ", ".join(f"{name} {n}" for name, n in mesh.shape.items() if n > 1) or "one device"
    print(f"model: {weights.count(config):,} parameters, width {recipe.width} (muP base "
          f"{recipe.base_width}), on a mesh of {mesh.size} {jax.default_backend()} devices "
          f"({shape})")  # fmt: skip
    params, losses, held_losses = _fit(model, params, tokens, held, recipe, seed)
    plots.loss_curve(
        directory / "loss.png",
        {"training": (list(losses), list(losses.values())),
         "held out": (list(held_losses), list(held_losses.values()))},
        {"unigram entropy": unigram},
        f"BTLM, {weights.count(config) / 1e6:.1f}M parameters, on the Python language reference",
    )  # fmt: skip
    with open(directory / "metrics.jsonl", "w") as f:
        for step, loss in losses.items():
            row = {"step": step, "loss": loss} | (
                {"held_out_loss": held_losses[step]} if step in held_losses else {}
            )
            f.write(json.dumps(row) + "\n")
    last = held_losses[max(held_losses)]
    bits = last * (held.size - 1) / np.log(2) / len("".join(text.held_out).encode())
    print(f"held-out loss {last:.3f} nats per token ({bits:.2f} bits per byte), "
          f"unigram entropy {unigram:.3f}")  # fmt: skip

    checkpoint.save(directory / "checkpoint", config, params, assets=sorted(files.iterdir()))
    export(directory / "checkpoint", directory / "hf")
    convert(directory / "hf", directory / "converted")
    same = verify(directory / "checkpoint", directory / "converted")
    if not same:
        raise ValueError(f"{directory}: the round trip changed weights: {same}")
    print("Orbax -> Hugging Face -> Orbax: every weight bit-equal")
    _show(model, params, tokenizer, PROMPTS)
    _summary(directory, {
        "loss.png": "loss curve", "metrics.jsonl": "the losses", "checkpoint/": "Orbax checkpoint",
        "hf/": "the same for transformers", "converted/": "converted back from hf/",
    }, started)  # fmt: skip


def from_hf(directory: Path, source: str) -> None:
    """Converts a Hugging Face checkpoint, checks the conversion and generates from it.

    Raises:
      FileExistsError: the directory exists.
      FileNotFoundError, ConnectionError, ValueError: see `convert.convert`.
    """
    started = time.monotonic()
    _virtual_devices()
    directory = Path(directory)
    staging.refuse_existing(directory, overwrite=False, ours=manifest.is_ours)
    report = convert(source, directory / "checkpoint")
    config = manifest.read(directory / "checkpoint").config
    print(f"converted {weights.count(config):,} parameters: {report}")
    tokenizer = load_tokenizer(directory / "checkpoint")
    model, params = checkpoint.load(directory / "checkpoint", mesh=_mesh(config))
    _show(model, params, tokenizer, PROMPTS)
    _summary(directory, {"checkpoint/": "Orbax checkpoint"}, started)


def _fit(model: BTLM, params, tokens, held, recipe: Recipe, seed: int):
    """Trains. Returns the weights, and the training and held-out losses by step."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, min(recipe.warmup, recipe.steps - 1), recipe.steps
    )
    tx = mup.adamw(schedule, model.config, weight_decay=recipe.weight_decay)
    state, step = init_state(params, tx), make_step(model, tx)
    batches = manual.training_batches(tokens, recipe.batch_size, recipe.length, seed)
    losses: dict[int, float] = {}
    held_losses: dict[int, float] = {}
    pending: Any = None
    with Progress(recipe.steps, "step", "train") as progress:
        for i in range(1, recipe.steps + 1):
            state, metrics = step(state, next(batches)[None])
            # The loss of the step before: fetching this one's would wait for it.
            if pending is not None:
                losses[i - 1] = float(pending)
            pending = metrics.loss
            if i % recipe.evaluate_every == 0 or i == recipe.steps:
                held_losses[i] = evaluate(model, state.params, held, recipe)
            shown = held_losses.get(i)
            note = f"loss {losses.get(i - 1, float('nan')):.3f}"
            progress.update(1, note if shown is None else f"{note}, held out {shown:.3f}")
    losses[recipe.steps] = float(pending)
    return state.params, losses, held_losses


def evaluate(model: BTLM, params, tokens: np.ndarray, recipe: Recipe) -> float:
    """Nats per token over a stream of tokens, in windows of the recipe's length."""
    nll = count = 0.0
    for ids, labels in manual.evaluation_batches(tokens, recipe.batch_size, recipe.length, IGNORE):
        loss = next_token_loss(model, params, ids, labels=labels)
        nll, count = nll + float(loss.nll), count + float(loss.tokens)
    return nll / count


def _show(model: BTLM, params, tokenizer: Tokenizer, prompts) -> None:
    for prompt in prompts:
        ids = np.array([tokenizer.encode(prompt).ids])
        for name, sample in (("greedy", False), ("sampled", True)):
            temperature = 0.7 if sample else 1.0
            out = generate(
                model, params, ids, max_new_tokens=48, do_sample=sample, temperature=temperature
            )
            print(f"\n[{name}] {tokenizer.decode(out[0].tolist())}")
    print()


def _make(directory: Path) -> Path:
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory} exists: name another directory, or delete it first")
    directory.mkdir(parents=True)
    return directory


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


def _round_up(batch_size: int, mesh: Mesh) -> int:
    parts = sharding.ways(mesh, sharding.RULES, "batch")
    return -(-batch_size // parts) * parts


def _summary(directory: Path, made: dict[str, str], started: float) -> None:
    print(f"made in {directory} ({time.monotonic() - started:.0f} s):")
    for name, what in made.items():
        print(f"  {name:<14} {what}")
    path = directory / "checkpoint"
    print(f"next: btlm generate {path} --prompt 'The statement' --sample --temperature 0.7")
