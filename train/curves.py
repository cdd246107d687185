"""Training runs as `btlm_jax.scaling` compares them: loss curves, sizes and timescales."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from btlm_jax.model import weights
from btlm_jax.scaling import collapse
from btlm_jax.scaling.timescale import timescale
from btlm_jax.train.metrics import METRICS_FILE, read_metrics
from btlm_jax.train.recipe import Recipe
from btlm_jax.train.recipe_build import build_config, build_param_groups
from btlm_jax.train.recipe_file import parse_recipe
from btlm_jax.train.run_directory import RECIPE_FILE
from btlm_jax.utils import json_files
from btlm_jax.utils.local_paths import local_path

logger = logging.getLogger(__name__)

# How much runs that are compared may differ: tokens per parameter and timescale as a ratio, the
# learning rate at any time as a fraction of its peak. The paper varies these by whole factors.
TOLERANCE = 0.05


class TrainingRun(NamedTuple):
    """A training run.

    Attributes:
      name: its directory, as given by the caller.
      curve: its training losses.
      step: last step that was logged.
      steps: steps of the recipe.
      parameters: size of the model.
      tokens_per_parameter: ratio for the whole training.
      timescale: AdamW's timescale for the hidden matrices; None without weight decay.
      schedule: the learning-rate schedule in words.
      rates: float64 [`collapse.BINS`], the logged learning rate as a fraction of its peak; NaN
        where the run has not arrived yet.
    """

    name: str
    curve: collapse.LossCurve
    step: int
    steps: int
    parameters: int
    tokens_per_parameter: float
    timescale: float | None
    schedule: str
    rates: np.ndarray

    @property
    def finished(self) -> bool:
        """Whether the last step of the recipe was logged."""
        return self.step >= self.steps


def read_training_run(directory: str | Path) -> TrainingRun:
    """Reads a run, finished or not, from its directory.

    Steps whose loss is not finite are left out, with a warning.

    Raises:
      FileNotFoundError: the directory is not a run directory, or has no metrics.
      ValueError: there are too few losses, or this version cannot read the recipe.
    """
    directory = local_path(directory, "directory")
    file = directory / RECIPE_FILE
    if not file.exists():
        raise FileNotFoundError(
            f"{directory}: no {RECIPE_FILE}: expected a directory of `btlm train`"
        )
    values = json_files.read_object(file, "copy the run directory again")
    if "recipe" not in values:
        raise ValueError(f"{file} holds no recipe: copy the run directory again")
    try:
        recipe = parse_recipe(values["recipe"])
    except ValueError as e:
        raise ValueError(
            f"{file} is no recipe of this version ({e}): copy the run directory again, or read it "
            "with the version that wrote it"
        ) from None
    lines = [line for line in read_metrics(directory / METRICS_FILE) if "loss" in line]
    if len(lines) < 2:
        raise ValueError(
            f"{directory}: found {len(lines)} losses in {METRICS_FILE}, expected 2 or more: wait, "
            "or log more often (run.log_every)"
        )
    finite = [line for line in lines if math.isfinite(line["loss"])]
    if dropped := len(lines) - len(finite):
        logger.warning("%s: %d losses that are not finite are left out", directory, dropped)
    tokens_per_step = np.repeat(
        [float(p.tokens_per_step) for p in recipe.phases], [p.steps for p in recipe.phases]
    )
    done = np.cumsum(tokens_per_step) / recipe.tokens
    steps = np.array([int(line["step"]) for line in finite])
    try:
        curve = collapse.LossCurve.of(done[steps - 1], [line["loss"] for line in finite])
    except ValueError as e:
        raise ValueError(f"{directory}: {e}") from None
    parameters = weights.count_parameters(build_config(recipe))
    # From the log rather than from `build_schedule`, which would use an accelerator that is busy
    # training.
    rates = np.interp(
        collapse.bin_centers(collapse.BINS),
        curve.done,
        [line["learning_rate"] / recipe.optimizer.peak_lr for line in finite],
        right=np.nan,
    )
    return TrainingRun(
        name=str(directory),
        curve=curve,
        step=int(lines[-1]["step"]),
        steps=recipe.steps,
        parameters=parameters,
        tokens_per_parameter=recipe.tokens / parameters,
        timescale=recipe_timescale(recipe),
        schedule=_describe_schedule(recipe),
        rates=rates,
    )


def recipe_timescale(recipe: Recipe) -> float | None:
    """Returns AdamW's timescale for the hidden matrices; None without weight decay."""
    if not recipe.optimizer.weight_decay:
        return None
    groups = build_param_groups(recipe, build_config(recipe))
    hidden = next(g for g in groups if g.name == "hidden")
    return timescale(hidden.lr, hidden.weight_decay, recipe.steps)


def run_differences(runs: Sequence[TrainingRun]) -> Iterator[str]:
    """Yields a sentence for each difference between runs that collapse assumes to be equal."""
    first = runs[0]
    for run in runs[1:]:
        for label, a, b in (
            ("tokens per parameter", first.tokens_per_parameter, run.tokens_per_parameter),
            ("timescale", first.timescale, run.timescale),
        ):
            if a != b and (a is None or b is None or abs(math.log(b / a)) > TOLERANCE):
                value, expected = ["none" if x is None else f"{x:.3g}" for x in (b, a)]
                yield f"{run.name}: {label} {value}, {first.name} has {expected}"
        compared = collapse.bin_centers(collapse.BINS) > collapse.IGNORED
        compared &= ~np.isnan(run.rates) & ~np.isnan(first.rates)
        distance = np.abs(run.rates - first.rates)[compared].max(initial=0)
        if distance > TOLERANCE:
            yield (
                f"{run.name}: learning rate up to {distance:.0%} of its peak from that of "
                f"{first.name} ({run.schedule}; {first.schedule})"
            )


def _describe_schedule(recipe: Recipe) -> str:
    settings = recipe.optimizer
    warmup = f"{settings.warmup_tokens / recipe.tokens:.1%} warmup"
    if settings.schedule == "constant":
        return f"constant, {warmup}"
    return f"{settings.schedule} to {settings.final_lr / settings.peak_lr:.2%}, {warmup}"
