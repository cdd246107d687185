"""Training runs as what `btlm_jax.scaling` compares: curves, sizes and timescales."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
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

logger = logging.getLogger(__name__)

# How much runs of one family may differ: TPP and timescale in relation to each other, the learning
# rate at any time in parts of its peak. Small beside what the paper varies, by factors.
TOLERANCE = 0.05


class TrainingRun(NamedTuple):
    """A training run.

    Attributes:
      name: of its directory, as it was given.
      curve: of the training losses.
      step, steps: the last one that was logged, and the recipe's.
      parameters: of the model.
      tokens_per_parameter: of the whole training.
      timescale: AdamW's, of the hidden matrices; None without weight decay.
      schedule: of the learning rate, in words.
      rates: float64 [`collapse.BINS`], the logged learning rate as a part of its peak; NaN where
        the run is not yet.
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
    """A run from its directory, of `btlm train`, finished or not.

    Steps whose loss is not finite are left out, with a warning.

    Raises:
      FileNotFoundError: not a run directory, or without metrics.
      ValueError: too few losses, or a recipe that this version cannot read.
    """
    directory = Path(directory)
    file = directory / RECIPE_FILE
    if not file.exists():
        raise FileNotFoundError(
            f"{directory}: no {RECIPE_FILE}: expected a directory of `btlm train`"
        )
    recipe = parse_recipe(json.loads(file.read_text())["recipe"])
    lines = [line for line in read_metrics(directory / METRICS_FILE) if "loss" in line]
    if len(lines) < 2:
        raise ValueError(
            f"{directory}: found {len(lines)} losses in {METRICS_FILE}, expected 2 or more: wait, "
            "or log more often (run.log_every)"
        )
    finite = [line for line in lines if math.isfinite(line["loss"])]
    if dropped := len(lines) - len(finite):
        logger.warning("%s: %d losses that are not finite are left out", directory, dropped)
    per_step = np.repeat(
        [float(p.tokens_per_step) for p in recipe.phases], [p.steps for p in recipe.phases]
    )
    done = np.cumsum(per_step) / recipe.tokens
    steps = np.array([int(line["step"]) for line in finite])
    try:
        curve = collapse.LossCurve.of(done[steps - 1], [line["loss"] for line in finite])
    except ValueError as e:
        raise ValueError(f"{directory}: {e}") from None
    parameters = weights.count_parameters(build_config(recipe))
    # From the log, not by `Recipe.learning_rate`: that would take an accelerator that is training.
    rates = np.interp(
        collapse.bin_centers(collapse.BINS),
        curve.done,
        [line["learning_rate"] / recipe.optimizer.peak_lr for line in finite],
        right=np.nan,
    )
    return TrainingRun(
        str(directory),
        curve,
        int(lines[-1]["step"]),
        recipe.steps,
        parameters,
        recipe.tokens / parameters,
        _timescale(recipe),
        _schedule(recipe),
        rates,
    )


def _timescale(recipe: Recipe) -> float | None:
    if not recipe.optimizer.weight_decay:
        return None
    groups = build_param_groups(recipe, build_config(recipe))
    hidden = next(g for g in groups if g.name == "hidden")
    return timescale(hidden.lr, hidden.weight_decay, recipe.steps)


def _schedule(recipe: Recipe) -> str:
    o = recipe.optimizer
    warmup = f"{o.warmup_tokens / recipe.tokens:.1%} warmup"
    if o.schedule == "constant":
        return f"constant, {warmup}"
    return f"{o.schedule} to {o.final_lr / o.peak_lr:.2%}, {warmup}"


def run_differences(runs: Sequence[TrainingRun]) -> Iterable[str]:
    """What differs between runs that collapse supposes equal; a sentence each."""
    first = runs[0]
    for run in runs[1:]:
        for what, a, b in (
            ("tokens per parameter", first.tokens_per_parameter, run.tokens_per_parameter),
            ("timescale", first.timescale, run.timescale),
        ):
            if a != b and (a is None or b is None or abs(math.log(b / a)) > TOLERANCE):
                shown = ["none" if x is None else f"{x:.3g}" for x in (b, a)]
                yield f"{run.name}: {what} {shown[0]}, {first.name} has {shown[1]}"
        both = (collapse.bin_centers(collapse.BINS) > collapse.IGNORED) & ~np.isnan(run.rates)
        apart = np.abs(run.rates - first.rates)[both & ~np.isnan(first.rates)].max(initial=0)
        if apart > TOLERANCE:
            yield (
                f"{run.name}: learning rate up to {apart:.0%} of its peak from that of "
                f"{first.name} ({run.schedule}; {first.schedule})"
            )
