"""A training run from its recipe, read from top to bottom.

A run directory holds `recipe.json` (as resolved), `checkpoints/`, `metrics.jsonl`, `tensorboard/`,
`loss.png` and `tokenizer/`. Calling `train` on it again goes on from the newest checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from btlm_jax.convert import load_hf
from etils import epath
from jax.sharding import Mesh

from btlm_jax import checkpoint, manifest, mup, sharding, staging, weights
from btlm_jax.config import BTLMConfig
from btlm_jax.model import BTLM
from btlm_jax.progress import Progress
from btlm_jax.tokenizer import load_tokenizer

from . import data, plots
from .checkpoints import Checkpoints
from .distributed import barrier
from .evaluation import Evaluation
from .feed import batches_on, prefetch
from .metrics import FILE, MetricsLog, curves, read_lines, utilisation
from .recipe import Phase, Recipe, to_dict
from .step import Metrics, TrainState, init_state, make_step
from .stopping import StopSignal
from .token_shards import TokenShards

logger = logging.getLogger(__name__)

RECIPE = "recipe.json"


class Outcome(NamedTuple):
    """How a call of `train` ended.

    Attributes:
      step: steps taken in all.
      finished: whether that is all of the recipe.
      loss: of the last step, in nats per token.
      held_out: of the last evaluation; NaN if there was none.
    """

    step: int
    finished: bool
    loss: float
    held_out: float


def train(recipe: Recipe, directory: str | os.PathLike[str]) -> Outcome:
    """Trains, or goes on training.

    Every process of a run calls this with the same recipe and a directory they share.

    Raises:
      ValueError: something that does not fit: recipe, data, mesh, checkpoint, run directory.
      FileNotFoundError: data or checkpoint are not there.
      FloatingPointError: gradients were not finite for `run.max_bad_steps` steps in a row.
      OSError: the disk is full or fails.
    """
    directory = Path(directory).absolute()
    mesh = sharding.make_mesh(
        data=recipe.mesh.data, fsdp=recipe.mesh.fsdp, tensor=recipe.mesh.tensor
    )
    sources, held = _open_data(recipe)
    model = BTLM(_config(recipe))
    if recipe.run.compute_dtype != "auto":
        model = BTLM(model.config, compute_dtype=recipe.run.compute_dtype)
    _check(recipe, model.config, mesh, sources, held)
    identity = {"recipe": to_dict(recipe), "data": [s.fingerprint for s in sources]}
    _claim(directory, identity, Path(sources[0].directory))

    tx = recipe.transformation(model.config)
    keeper = Checkpoints(
        directory / "checkpoints", keep_last=recipe.run.keep_last, keep_every=recipe.run.keep_every
    )
    restored = keeper.restore_newest(model, tx, mesh)
    if restored is not None:
        state = restored[0]
        if state.step >= recipe.steps:
            return _already_finished(recipe, directory, keeper)
        logger.info("going on from step %d", int(state.step))
    else:
        state = init_state(_weights(recipe, model, mesh), tx)
    first = int(state.step)
    if jax.process_index() == 0:
        logger.info(
            "%s parameters in muP groups:\n%s",
            f"{weights.count(model.config):,}",
            mup.format_groups(mup.param_groups(
                model.config, recipe.optimizer.peak_lr, recipe.optimizer.weight_decay,
                recipe.optimizer.decay,
                optimizer="adam" if recipe.optimizer.name == "adamw" else recipe.optimizer.name,
            )),
        )  # fmt: skip

    step_fn = make_step(model, tx)
    evaluate = Evaluation(recipe, model, mesh, held)
    log = MetricsLog(directory, first)
    batches = prefetch(batches_on(recipe, _sources(recipe), mesh, first))
    origin = {**identity, "run": str(directory)}
    loss, held_out, stopped = math.nan, math.nan, False
    waiting: tuple[int, Phase, Metrics] | None = None
    clock = time.monotonic()
    bar = Progress(recipe.steps, "step", "train", done=first)
    saved = first if restored is not None else -1
    step = first
    try:
        with StopSignal() as stop, bar as progress, jax.transfer_guard("disallow"):
            while step < recipe.steps and not stopped:
                _, phase = recipe.phase_at(step)
                state, metrics = step_fn(state, *next(batches))
                step += 1
                # The metrics of the step before: fetching this one's would wait for it.
                done, waiting = waiting, (step, phase, metrics)
                if done is not None:
                    now = time.monotonic()
                    loss, note = _report(recipe, model, log, done, now - clock)
                    clock = now
                    progress.update(1, note)
                    _stop_if_bad(recipe, done, keeper)
                aside = time.monotonic()
                if recipe.run.eval_every and step % recipe.run.eval_every == 0:
                    held_out = evaluate(state, log, step)
                if recipe.run.sample_every and step % recipe.run.sample_every == 0:
                    _sample(recipe, model, state, directory, step)
                every = recipe.run.checkpoint_every
                if every and step % every == 0 and step < recipe.steps:
                    keeper.save(model.config, state, step, origin)
                    saved = step
                clock += time.monotonic() - aside  # not the step's own time
                stopped = stop.asked(step)
            if waiting is not None:
                loss, note = _report(recipe, model, log, waiting, time.monotonic() - clock)
                progress.update(1, note)
                _stop_if_bad(recipe, waiting, keeper)
            every = recipe.run.eval_every
            if step == recipe.steps and not (every and step % every == 0):
                held_out = evaluate(state, log, step)
            if saved != step:
                keeper.save(model.config, state, step, origin)
    finally:
        log.close()
        keeper.close()  # waits until the last checkpoint is on the disk
    _draw(directory, recipe)
    return Outcome(step, step == recipe.steps, loss, held_out)


def _already_finished(recipe: Recipe, directory: Path, keeper: Checkpoints) -> Outcome:
    keeper.close()
    logger.info("%s: all %d steps are done", directory, recipe.steps)
    last: dict[str, float] = {}
    for line in read_lines(directory / FILE):
        last |= line
    return Outcome(
        recipe.steps, True, last.get("loss", math.nan), last.get("held_out_loss", math.nan)
    )


# Before the first step ----------------------------------------------------------------------------


def _open_data(recipe: Recipe) -> tuple[list[TokenShards], TokenShards | None]:
    if not recipe.data.train:
        raise ValueError(
            "data.train: not set; make a directory of tokens with `btlm tokenize TEXT --target DIR "
            "--tokenizer DIR` (or --new-tokenizer SIZE), then pass --set data.train=DIR"
        )
    folders = [s.directory for s in _sources(recipe)]
    held = recipe.data.held_out
    return [TokenShards(d) for d in folders], TokenShards(Path(held)) if held else None


def _sources(recipe: Recipe) -> list[data.Source]:
    parent = Path(recipe.data.train)
    if recipe.data.mixture is not None:
        return data.mixture_sources(parent, recipe.data.mixture)
    if recipe.data.weights:
        return [data.Source(parent / name, w) for name, w in recipe.data.weights.items()]
    return [data.Source(parent)]


def _config(recipe: Recipe) -> BTLMConfig:
    source = recipe.model.checkpoint
    if source is None:
        return recipe.model_config()
    return recipe.model_config(
        BTLMConfig.from_hf(source) if _is_hf(source) else manifest.read(source).config
    )


def _is_hf(source: str) -> bool:
    return (Path(source) / "config.json").is_file()


def _weights(recipe: Recipe, model: BTLM, mesh: Mesh) -> weights.Params:
    """Fresh weights, or those of the checkpoint to start from; fp32 masters."""
    source = recipe.model.checkpoint
    if source is None:
        return model.init(jax.random.key(recipe.run.seed), mesh=mesh)
    loader = load_hf if _is_hf(source) else checkpoint.load
    _, params = loader(source, mesh=mesh, dtype=jnp.float32)
    weights.check(params, model.config)
    return params


def _check(
    recipe: Recipe,
    config: BTLMConfig,
    mesh: Mesh,
    sources: list[TokenShards],
    held: TokenShards | None,
) -> None:
    """Refuses what would fail only later."""
    ways = sharding.ways(mesh, sharding.RULES, "batch")
    problems = []
    for i, phase in enumerate(recipe.phases):
        micro = phase.microbatch or phase.batch_size
        if micro % ways:
            name = "microbatch" if phase.microbatch else "batch_size"
            problems.append(
                f"phases.{i}.{name}: found {micro}, expected a multiple of {ways}, over which this "
                f"mesh splits the batch (data x fsdp)"
            )
        if not config.alibi and phase.length > config.n_positions:
            problems.append(
                f"phases.{i}.length: found {phase.length}, the learned positions of the model end "
                f"at {config.n_positions}"
            )
    for tokens in [*sources, *([held] if held is not None else [])]:
        if tokens.manifest.vocab_size > config.vocab_size:
            problems.append(
                f"{tokens.directory}: its tokenizer has {tokens.manifest.vocab_size} tokens, the "
                f"model {config.vocab_size}"
            )
    if len({t.manifest.tokenizer_sha256 for t in [*sources, *([held] if held else [])]}) > 1:
        problems.append("data: the directories were made with different tokenizers")
    if problems:
        raise ValueError("the recipe cannot be run:\n  " + "\n  ".join(problems))


def _claim(directory: Path, identity: dict[str, Any], tokens: Path) -> None:
    """Makes the run directory, or checks that it is of the same run."""
    file = directory / RECIPE
    if file.exists():
        before = json.loads(file.read_text())
        changed = sorted(_differences(_fixed(before), _fixed(identity)))
        if changed:
            raise ValueError(
                f"{directory} is of a run that differs in {', '.join(changed)}; name another "
                "directory (model.checkpoint can start from this run's weights)"
            )
    elif directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} exists and is not a run: name another directory")
    barrier("checked")  # what process 0 now writes must not confuse another's check
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        staging.write_text(epath.Path(file), json.dumps(identity, indent=2))
        (directory / "tokenizer").mkdir(exist_ok=True)
        for asset in manifest.assets_of(tokens):
            staging.write_bytes(
                epath.Path(directory / "tokenizer" / asset.name), asset.read_bytes()
            )
    barrier("claimed")


def _fixed(identity: dict[str, Any]) -> dict[str, Any]:
    """What must not change when a run goes on; mesh, intervals and microbatches may."""
    recipe = json.loads(json.dumps(identity["recipe"]))
    recipe.pop("mesh", None)
    recipe["run"] = {"seed": recipe["run"]["seed"]}
    for phase in recipe["phases"]:
        phase.pop("microbatch", None)
    for name in ("train", "held_out", "held_out_tokens"):  # the fingerprint counts, not the path
        recipe["data"].pop(name, None)
    return {**recipe, "data_fingerprint": identity["data"]}


def _differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {*a, *b}:
            yield from _differences(a.get(key), b.get(key), f"{where}.{key}" if where else key)
    elif a != b:
        yield f"{where} ({a} -> {b})"


# While it runs ------------------------------------------------------------------------------------


def _report(
    recipe: Recipe,
    model: BTLM,
    log: MetricsLog,
    done: tuple[int, Phase, Metrics],
    seconds: float,
) -> tuple[float, str]:
    """Fetches and writes the metrics of a step. Returns its loss and the note for the bar."""
    step, phase, on_device = done
    m: Metrics = jax.device_get(on_device)
    rate = float(m.tokens) / max(seconds, 1e-9) / jax.device_count()
    used = utilisation(model.config, phase.length, rate)
    if step % recipe.run.log_every == 0 or step in (1, recipe.steps):
        with jax.transfer_guard("allow"):
            learning_rate = float(recipe.learning_rate(step - 1))
        values = {
            "loss": float(m.loss),
            "learning_rate": learning_rate,
            "grad_norm": float(m.grad_norm),
            **{f"grad_norm/{k}": float(v) for k, v in m.grad_norms.items()},
            **{f"update_norm/{k}": float(v) for k, v in m.update_norms.items()},
            "tokens": float(m.tokens),
            "tokens_per_second_per_device": rate,
            **used,
            "skipped": float(m.skipped),
        }
        log.write(step, values)
    note = f"loss {m.loss:.3f}, {rate:,.0f} tokens/s/device"
    if used:
        note += f", MFU {used['mfu']:.1%} (causal {used['mfu_causal']:.1%})"
    return float(m.loss), note + (f", {m.skipped} skipped" if m.skipped else "")


def _stop_if_bad(recipe: Recipe, done: tuple[int, Phase, Metrics], keeper: Checkpoints) -> None:
    bad = int(jax.device_get(done[2].bad_in_a_row))
    if bad >= recipe.run.max_bad_steps:
        keeper.wait()
        steps = keeper.steps()
        good = (
            f"the last checkpoint is {keeper.path(steps[-1])}"
            if steps
            else "there is no checkpoint"
        )
        raise FloatingPointError(
            f"step {done[0]}: the gradients of {bad} steps in a row were not finite; {good}. Lower "
            "optimizer.peak_lr, or look at the data"
        )


def _sample(recipe: Recipe, model: BTLM, state: TrainState, directory: Path, step: int) -> None:
    from btlm_jax.generation.loop import generate

    tokenizer = load_tokenizer(directory)
    ids = np.array([tokenizer.encode(recipe.run.prompt).ids])
    with jax.transfer_guard("allow"):
        out = generate(model, state.params, ids, max_new_tokens=32, do_sample=True, seed=step)
    if jax.process_index() == 0:
        logger.info("step %d: %s", step, tokenizer.decode(np.asarray(out)[0].tolist()))


def _draw(directory: Path, recipe: Recipe) -> None:
    if jax.process_index() != 0:
        return
    try:
        plots.require_matplotlib()
    except ValueError as e:
        logger.warning("%s", e)
        return
    if drawn := curves(directory):
        plots.loss_curve(directory / "loss.png", drawn, {}, directory.name)
