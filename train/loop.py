"""A training run, from its recipe to its last checkpoint.

A run directory holds `recipe.json` (as resolved), `checkpoints/`, `metrics.jsonl`, `tensorboard/`,
`loss.png`, `tokenizer/` and `run.lock`. Calling `train` on it again resumes from the newest
checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from typing import NamedTuple

import jax

from btlm_jax.checkpoint import trained_documents
from btlm_jax.model import mup, weights
from btlm_jax.model.btlm import BTLM
from btlm_jax.train.batches import Batches
from btlm_jax.train.checkpoints import Checkpoints
from btlm_jax.train.distributed import raise_together
from btlm_jax.train.feed import batches_on_mesh, open_batches, open_training_data, prefetch
from btlm_jax.train.held_out import HeldOutEvaluation
from btlm_jax.train.metrics import (
    METRICS_FILE,
    draw_loss_curves,
    latest_metrics,
    require_wandb,
)
from btlm_jax.train.preemption import StopSignal
from btlm_jax.train.preflight import check_run, unused_settings
from btlm_jax.train.profiling import StepProfiler
from btlm_jax.train.recipe import Recipe
from btlm_jax.train.recipe_build import (
    build_mesh,
    build_model,
    build_optimizer,
    build_param_groups,
    build_params,
    build_step,
    with_microbatches,
)
from btlm_jax.train.recipe_file import recipe_to_dict
from btlm_jax.train.reporter import Reporter
from btlm_jax.train.run_directory import RunDirectory
from btlm_jax.train.samples import Samples
from btlm_jax.train.step import init_state, move_optimizer_state
from btlm_jax.utils.local_paths import local_path

logger = logging.getLogger(__name__)


class TrainResult(NamedTuple):
    """How a call of `train` ended.

    Attributes:
      step: steps taken since the beginning of the run.
      finished: whether these are all steps of the recipe.
      loss: loss of the last step, in nats per token.
      held_out: loss of the last evaluation, in nats per token; NaN if there was none.
    """

    step: int
    finished: bool
    loss: float
    held_out: float


def train(
    recipe: Recipe, directory: str | os.PathLike[str], profile: tuple[int, int] | None = None
) -> TrainResult:
    """Trains by a recipe, or resumes a run that was stopped.

    Every process of a run calls this with the same recipe and a directory that they share.

    Args:
      recipe: what to train, on which data, and how.
      directory: the run directory; created, or resumed if it exists.
      profile: first and last step to trace (`StepProfiler`).

    Raises:
      ValueError: recipe, data, mesh, checkpoint and run directory do not fit together.
      FileNotFoundError: data or checkpoint do not exist.
      FloatingPointError: `run.max_bad_steps` steps in a row were not finite, or the last one.
      FileExistsError: the directory is not a run's, or another process is training in it.
      OSError: the disk is full or fails, so that no checkpoint can be written.
    """
    directory = local_path(directory, "directory").absolute()
    run = recipe.run

    # Whatever may be refused is built and checked before the run directory is claimed.
    with raise_together():
        if run.wandb_project:
            require_wandb()
        mesh = build_mesh(recipe)
        data = open_training_data(recipe)
        model = build_model(recipe)
        unused = list(unused_settings(recipe))
        recipe = with_microbatches(recipe, mesh)
        tx = build_optimizer(recipe, model.config)
        check_run(recipe, model, tx, mesh, data)
        step_fn = build_step(recipe, model, tx)
        batches = open_batches(recipe, data)
        evaluate = HeldOutEvaluation(recipe, model, mesh, data.held_out)
    identity = {
        "recipe": recipe_to_dict(recipe),
        "data": [source.tokens.fingerprint for source in data.sources],
        **trained_documents.describe(
            recipe.data.mask_documents, data.sources[0].tokens.metadata.eos_id
        ),
    }
    for sentence in unused if jax.process_index() == 0 else ():
        logger.warning("%s", sentence)

    with contextlib.ExitStack() as stack:
        run_directory = stack.enter_context(RunDirectory(directory, identity, data))
        # Closing the checkpoints waits until the last one is on the disk, or has stalled.
        checkpoints = Checkpoints(
            directory / "checkpoints", keep_last=run.keep_last, keep_every=run.keep_every
        )
        stack.enter_context(contextlib.closing(checkpoints))
        state = checkpoints.restore_newest(model, tx, mesh)
        if state is None:
            state = init_state(build_params(recipe, model, mesh), tx)
        elif state.step >= recipe.steps:
            logger.info("%s: all %d steps are done", directory, recipe.steps)
            return _result(recipe.steps, recipe, latest_metrics(directory / METRICS_FILE))
        else:
            logger.info("resuming from step %d", int(state.step))
        if run.offload_optimizer:
            opt_state = move_optimizer_state(state.opt_state, jax.memory.Space.Host)
            state = state._replace(opt_state=opt_state)
        first = int(state.step)
        with raise_together():
            checkpoints.require_space(state, _checkpoint_steps(recipe, first))
            profiler = StepProfiler(directory, profile, first)
            sample = Samples(recipe, model, data)
        run_directory.claim()
        with raise_together():
            reporter = Reporter(recipe, model.config, directory, first, checkpoints.describe_newest)
        _log_run(recipe, model, batches)
        feed = prefetch(batches_on_mesh(recipe, batches, mesh, first))
        # Closing the feed ends the threads that read ahead.
        stack.enter_context(reporter)
        stack.enter_context(contextlib.closing(feed))
        stack.enter_context(contextlib.closing(profiler))
        stop = stack.enter_context(StopSignal())
        checkpoints.stopping = lambda: stop.received
        stack.enter_context(jax.transfer_guard("disallow"))

        for step in range(first + 1, recipe.steps + 1):
            profiler.before_step(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = step_fn(state, *next(feed))
            profiler.after_step(step, metrics)
            reporter.record(step, recipe.phase_at(step - 1), metrics)

            last = step == recipe.steps
            if last or _is_due(step, run.eval_every):
                with reporter.pause():
                    reporter.log_held_out(step, evaluate(state.params))
            if _is_due(step, run.sample_every):
                with reporter.pause():
                    sample(state.params, step)
            stopping = stop.requested(step)
            if last or stopping or _is_due(step, run.checkpoint_every):
                with reporter.pause():
                    # Weights after a step that was not finite may be the cause of it. A checkpoint
                    # of them would be the newest, and have an older, good one removed.
                    if not reporter.bad_in_a_row:
                        origin = {**identity, "run": str(directory)}
                        checkpoints.save(model.config, state, step, origin)
                    elif last:
                        raise reporter.not_finite(step)
                    else:
                        logger.warning("step %d: no checkpoint, because it was not finite", step)
            if stopping:
                break
        checkpoints.wait()
        if jax.process_index() == 0:
            reporter.close()
            draw_loss_curves(directory)
    return _result(step, recipe, reporter.latest)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _checkpoint_steps(recipe: Recipe, first: int) -> list[int]:
    """Returns the steps after `first` whose state will be saved."""
    every = recipe.run.checkpoint_every
    return [s for s in range(first + 1, recipe.steps) if _is_due(s, every)] + [recipe.steps]


def _result(step: int, recipe: Recipe, metrics: dict[str, float]) -> TrainResult:
    loss, held_out = (metrics.get(name, math.nan) for name in ("loss", "held_out_loss"))
    return TrainResult(step, step == recipe.steps, loss, held_out)


def _log_run(recipe: Recipe, model: BTLM, batches: Batches) -> None:
    if jax.process_index() == 0:
        logger.info(
            "%s parameters in muP groups:\n%s",
            f"{weights.count_parameters(model.config):,}",
            mup.format_groups(build_param_groups(recipe, model.config)),
        )
        for name, epochs in batches.epochs.items():
            logger.info("data: %.3g epochs of %s", epochs, name)
