"""A training run from its recipe, read from top to bottom.

A run directory holds `recipe.json` (as resolved), `checkpoints/`, `metrics.jsonl`, `tensorboard/`,
`loss.png` and `tokenizer/`. Calling `train` on it again goes on from the newest checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from btlm_jax.config import BTLMConfig
from btlm_jax.convert import auto
from btlm_jax.data.token_shards import TokenShards
from btlm_jax.data.tokenizer import load_tokenizer, tokenizers_match
from btlm_jax.model import mup, sharding, weights
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params, check_params, is_unstacked
from btlm_jax.perf import accounting
from btlm_jax.train import batches as batches_lib
from btlm_jax.train.checkpoints import Checkpoints
from btlm_jax.train.distributed import raise_together
from btlm_jax.train.feed import batches_on, prefetch, reader
from btlm_jax.train.held_out import Evaluation
from btlm_jax.train.metrics import (
    METRICS_FILE,
    MetricsLog,
    loss_curves,
    read_metrics,
    require_wandb,
)
from btlm_jax.train.preemption import StopSignal
from btlm_jax.train.profiling import Profile
from btlm_jax.train.recipe import Phase, Recipe
from btlm_jax.train.recipe_build import (
    build_mesh,
    build_model,
    build_optimizer,
    build_param_groups,
    build_schedule,
    build_step,
    with_microbatches,
)
from btlm_jax.train.recipe_file import recipe_to_dict
from btlm_jax.train.run_directory import claim_run_directory
from btlm_jax.train.step import StepMetrics, TrainState, init_state, offloaded
from btlm_jax.utils import plots
from btlm_jax.utils.compile_cache import count_compilations
from btlm_jax.utils.progress import Progress

logger = logging.getLogger(__name__)


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


def train(
    recipe: Recipe, directory: str | os.PathLike[str], profile: tuple[int, int] | None = None
) -> Outcome:
    """Trains, or goes on training.

    Every process of a run calls this with the same recipe and a directory they share.

    Args:
      recipe: what to do.
      directory: of the run.
      profile: the first and the last step to trace (`Profile`).

    Raises:
      ValueError: something that does not fit: recipe, data, mesh, checkpoint, run directory.
      FileNotFoundError: data or checkpoint are not there.
      FloatingPointError: gradients were not finite for `run.max_bad_steps` steps in a row.
      OSError: the disk is full or fails.
    """
    directory = Path(directory).absolute()
    with raise_together():
        if recipe.run.wandb_project:
            require_wandb()
        mesh = build_mesh(recipe)
        sources, held = _open_data(recipe)
        model = build_model(recipe)
        recipe = with_microbatches(recipe, mesh)
        _check(recipe, model.config, mesh, sources, held)
        # All of these may refuse, and must before the directory is claimed.
        tx = build_optimizer(recipe, model.config)
        read = reader(recipe, _sources(recipe))
        evaluate = Evaluation(recipe, model, mesh, held)
    identity = {"recipe": recipe_to_dict(recipe), "data": [s.fingerprint for s in sources]}
    also = None if held is None else held.fingerprint
    claim_run_directory(directory, identity, also, Path(sources[0].directory))

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
    if recipe.run.offload_optimizer:
        state = state._replace(opt_state=offloaded(state.opt_state))
    first = int(state.step)
    with raise_together():
        keeper.require_space(state, _saves(recipe, first))
    if jax.process_index() == 0:
        logger.info(
            "%s parameters in muP groups:\n%s",
            f"{weights.count_parameters(model.config):,}",
            mup.format_groups(build_param_groups(recipe, model.config)),
        )
        for name, epochs in read.epochs.items():
            logger.info("data: %.3g epochs of %s", epochs, name)

    step_fn = build_step(recipe, model, tx)
    with raise_together():
        log = MetricsLog(directory, first, recipe_to_dict(recipe), recipe.run.wandb_project)
        trace = Profile(directory, profile, first)
    batches = prefetch(batches_on(recipe, read, mesh, first))
    origin = {**identity, "run": str(directory)}
    loss, held_out, stopped = math.nan, math.nan, False
    waiting: tuple[int, Phase, StepMetrics] | None = None
    clock = time.monotonic()
    bar = Progress(recipe.steps, "step", "train", done=first, shown=jax.process_index() == 0)
    saved = first if restored is not None else -1
    step = first
    try:
        with (
            StopSignal() as stop, bar as progress, count_compilations() as compiled,
            jax.transfer_guard("disallow"),
        ):  # fmt: skip
            while step < recipe.steps and not stopped:
                _, phase = recipe.phase_at(step)
                trace.before(step + 1)
                before = dataclasses.replace(compiled)
                with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                    state, metrics = step_fn(state, *next(batches))
                step += 1
                if compiled.count > before.count:
                    seconds = compiled.seconds - before.seconds
                    logger.info("step %d: compiled its program in %.1f s", step, seconds)
                trace.after(step, metrics)
                # The metrics of the step before: fetching this one's would wait for it.
                done, waiting = waiting, (step, phase, metrics)
                if done is not None:
                    now = time.monotonic()
                    loss, note = _report(recipe, model, log, done, now - clock)
                    clock = now
                    progress.update(1, note)
                    _stop_if_bad(recipe, done, keeper)
                run = recipe.run
                evaluating, sampling, saving = (
                    bool(every) and step % every == 0
                    for every in (run.eval_every, run.sample_every, run.checkpoint_every)
                )
                if evaluating or sampling or saving:
                    jax.block_until_ready(metrics)  # what follows waits for it anyway
                aside = time.monotonic()
                if evaluating:
                    held_out = evaluate(state, log, step)
                if sampling:
                    _sample(recipe, model, state, directory, step)
                if saving and step < recipe.steps:
                    keeper.save(model.config, state, step, origin)
                    saved = step
                clock += time.monotonic() - aside  # not the step's own time
                stopped = stop.requested(step)
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
        trace.close()
        batches.close()  # ends the threads that read ahead
        log.close()
        keeper.close()  # waits until the last checkpoint is on the disk
    _draw(directory, recipe)
    return Outcome(step, step == recipe.steps, loss, held_out)


def _saves(recipe: Recipe, first: int) -> list[int]:
    """The steps after `first` whose state is saved."""
    every = recipe.run.checkpoint_every
    return [s for s in range(first + 1, recipe.steps) if every and s % every == 0] + [recipe.steps]


def _already_finished(recipe: Recipe, directory: Path, keeper: Checkpoints) -> Outcome:
    keeper.close()
    logger.info("%s: all %d steps are done", directory, recipe.steps)
    last: dict[str, float] = {}
    for line in read_metrics(directory / METRICS_FILE):
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


def _sources(recipe: Recipe) -> list[batches_lib.Source]:
    parent = Path(recipe.data.train)
    if recipe.data.mixture is not None:
        return batches_lib.mixture_sources(parent, recipe.data.mixture)
    if recipe.data.weights:
        return [batches_lib.Source(parent / name, w) for name, w in recipe.data.weights.items()]
    return [batches_lib.Source(parent)]


def _weights(recipe: Recipe, model: BTLM, mesh: Mesh) -> Params:
    """Fresh weights, or those of the checkpoint to start from; fp32 masters."""
    source = recipe.model.checkpoint
    if source is None:
        key = jax.random.key(recipe.run.seed)
        return model.init(key, mesh=mesh, truncation=recipe.model.init_truncation)
    _, params = auto.load_any_checkpoint(source, mesh=mesh, dtype=jnp.float32)
    if is_unstacked(params):
        raise ValueError(
            f"model.checkpoint: {source} is quantized, and only floats can be trained: name the "
            "checkpoint it was made from"
        )
    check_params(params, model.config)
    return params


def _check(
    recipe: Recipe,
    config: BTLMConfig,
    mesh: Mesh,
    sources: list[TokenShards],
    held: TokenShards | None,
) -> None:
    """Refuses what would fail only later."""
    ways = sharding.num_shards(mesh, sharding.RULES, "batch")
    problems = []
    for i, phase in enumerate(recipe.phases):
        micro = phase.microbatch or phase.batch_size
        if micro % ways:
            name = "microbatch" if phase.microbatch else "batch_size"
            problems.append(
                f"phases.{i}.{name}: found {micro}, expected a multiple of {ways}, over which this "
                f"mesh splits the batch (data x fsdp)"
            )
        stripes = sharding.num_chunks(sharding.num_shards(mesh, sharding.RULES, "sequence"))
        if phase.length % stripes:
            problems.append(
                f"phases.{i}.length: found {phase.length}, expected a multiple of {stripes}, twice "
                "mesh.context"
            )
        if not config.alibi and phase.length > config.n_positions:
            problems.append(
                f"phases.{i}.length: found {phase.length}, the learned positions of the model end "
                f"at {config.n_positions}"
            )
    for tokens in [*sources, *([held] if held is not None else [])]:
        if tokens.metadata.vocab_size > config.vocab_size:
            problems.append(
                f"{tokens.directory}: its tokenizer has {tokens.metadata.vocab_size} tokens, the "
                f"model {config.vocab_size}"
            )
    if len({t.metadata.tokenizer_sha256 for t in [*sources, *([held] if held else [])]}) > 1:
        problems.append("data: the directories were made with different tokenizers")
    start = recipe.model.checkpoint
    known = auto.read_any_tokenizer(start) if start is not None else None
    if known is not None and not tokenizers_match(known, load_tokenizer(sources[0].directory)):
        problems.append(
            f"data.train: {sources[0].directory} was made with another tokenizer than that of "
            f"{start}: tokenize it with --tokenizer {start}"
        )
    if problems:
        raise ValueError("the recipe cannot be run:\n  " + "\n  ".join(problems))


# While it runs ------------------------------------------------------------------------------------


def _report(
    recipe: Recipe,
    model: BTLM,
    log: MetricsLog,
    done: tuple[int, Phase, StepMetrics],
    seconds: float,
) -> tuple[float, str]:
    """Fetches and writes the metrics of a step. Returns its loss and the note for the bar."""
    step, phase, on_device = done
    m = jax.device_get(on_device)
    rate = float(m["tokens"]) / max(seconds, 1e-9) / jax.device_count()
    used = accounting.model_flops_utilization(model.config, phase.length, rate)
    if step % recipe.run.log_every == 0 or step in (1, recipe.steps):
        # Skipped steps do not move the schedule. This one, if it was, would have had the next rate.
        updates = step - int(m["skipped"]) - (0 if m["bad_in_a_row"] else 1)
        with jax.transfer_guard("allow"):
            learning_rate = float(build_schedule(recipe)(updates))
        values = {
            **{name: float(x) for name, x in m.items() if name != "bad_in_a_row"},
            "learning_rate": learning_rate,
            "tokens_per_second_per_device": rate,
            **used,
        }
        log.write(step, values)
    note = f"loss {m['loss']:.3f}, {rate:,.0f} tokens/s/device"
    if used:
        note += f", MFU {used['mfu']:.1%} (causal {used['mfu_causal']:.1%})"
    return float(m["loss"]), note + (f", {m['skipped']} skipped" if m["skipped"] else "")


def _stop_if_bad(recipe: Recipe, done: tuple[int, Phase, StepMetrics], keeper: Checkpoints) -> None:
    bad = int(jax.device_get(done[2]["bad_in_a_row"]))
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
    from btlm_jax.generation.generate import generate

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
    if drawn := loss_curves(directory):
        plots.draw_loss_curve(directory / "loss.png", drawn, {}, directory.name)
