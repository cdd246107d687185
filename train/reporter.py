"""Reports the progress of a run: metrics files, progress bar and log."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from btlm_jax.config import BTLMConfig
from btlm_jax.perf import accounting
from btlm_jax.train.metrics import MetricsLog
from btlm_jax.train.recipe import Phase, Recipe
from btlm_jax.train.recipe_build import build_schedule
from btlm_jax.train.recipe_file import recipe_to_dict
from btlm_jax.train.step import StepMetrics
from btlm_jax.utils.compile_cache import CompilationCount, count_compilations
from btlm_jax.utils.progress import Progress

logger = logging.getLogger(__name__)

_NOT_LOGGED = ("bad_in_a_row",)


class _Pending(NamedTuple):
    """A step whose metrics are still on the devices."""

    step: int
    phase: Phase
    metrics: StepMetrics


class Reporter:
    """Reports every step one step late: fetching its metrics at once would idle the devices.

    A context manager. Every process reports; only process 0 writes and shows anything.

    Args:
      recipe: the recipe.
      config: configuration of the model.
      directory: the run directory.
      first_step: steps that the run has already taken.
      describe_newest: describes the newest checkpoint from before a step, for the error about steps
        that were not finite.

    Attributes:
      latest: the newest value of every metric.
      bad_in_a_row: number of steps, up to the last reported one, whose loss, gradients or update
        were not finite.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: BTLMConfig,
        directory: Path,
        first_step: int,
        describe_newest: Callable[[int], str],
    ) -> None:
        self.latest: dict[str, float] = {}
        self.bad_in_a_row = 0
        self._recipe, self._config, self._describe_newest = recipe, config, describe_newest
        self._schedule = build_schedule(recipe)
        project = recipe.run.wandb_project
        self._log = MetricsLog(directory, first_step, recipe_to_dict(recipe), project)
        shown = jax.process_index() == 0
        self._bar = Progress(recipe.steps, "step", "train", done=first_step, shown=shown)
        self._pending: _Pending | None = None
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Reporter:
        self._exit.callback(self._log.close)
        self._exit.enter_context(self._bar)
        self._compiled: CompilationCount = self._exit.enter_context(count_compilations())
        self._start_clock()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Completes the metrics and the progress bar."""
        self._exit.close()

    def record(self, step: int, phase: Phase, metrics: StepMetrics) -> None:
        """Takes the metrics of a step just dispatched, and reports those of the step before.

        Raises:
          FloatingPointError: too many steps in a row were not finite.
        """
        if self._compiled.count > self._compiled_before.count:
            seconds = self._compiled.seconds - self._compiled_before.seconds
            logger.info("step %d: compiled its program in %.1f s", step, seconds)
        pending, self._pending = self._pending, _Pending(step, phase, metrics)
        if pending is not None:
            self._report(pending)
        self._compiled_before = dataclasses.replace(self._compiled)

    @contextlib.contextmanager
    def pause(self) -> Generator[None]:
        """Reports the pending step, and excludes the block from the time of the next one.

        For work between steps that waits for the devices anyway.

        Raises:
          FloatingPointError: as `record`.
        """
        if self._pending is not None:
            self._report(self._pending)
            self._pending = None
        yield
        self._start_clock()

    def log_held_out(self, step: int, values: Mapping[str, float]) -> None:
        """Writes and logs the metrics of an evaluation (`HeldOutEvaluation`), if there are any."""
        if values:
            self._write(step, values)
            logger.info(
                "step %d: held-out loss %.4f nats per token, %.4f bits per byte%s",
                step,
                values["held_out_loss"],
                values["held_out_bits_per_byte"],
                ", documents masked" if values["held_out_masked"] else "",
            )

    def _start_clock(self) -> None:
        self._clock = time.monotonic()
        self._compiled_before = dataclasses.replace(self._compiled)

    def _report(self, pending: _Pending) -> None:
        step, phase, on_device = pending
        metrics = {name: float(x) for name, x in jax.device_get(on_device).items()}
        now = time.monotonic()
        seconds, self._clock = max(now - self._clock, 1e-9), now
        rate = metrics["tokens"] / seconds / jax.device_count()
        mfu = accounting.model_flops_utilization(self._config, phase.length, rate)
        self.latest["loss"] = metrics["loss"]
        if step % self._recipe.run.log_every == 0 or step in (1, self._recipe.steps):
            values = {name: x for name, x in metrics.items() if name not in _NOT_LOGGED}
            values["learning_rate"] = self._learning_rate(step, metrics)
            values["tokens_per_second_per_device"] = rate
            self._write(step, values | mfu)
        note = f"loss {metrics['loss']:.3f}, {rate:,.0f} tokens/s/device"
        if mfu:
            note += f", MFU {mfu['mfu']:.1%} (causal {mfu['mfu_causal']:.1%})"
        if metrics["skipped"]:
            note += f", {metrics['skipped']:.0f} skipped"
        self._bar.update(1, note)
        self.bad_in_a_row = int(metrics["bad_in_a_row"])
        if self.bad_in_a_row >= self._recipe.run.max_bad_steps:
            raise self.not_finite(step)

    def not_finite(self, step: int) -> FloatingPointError:
        """Returns the error for a run whose last steps, up to `step`, were not finite."""
        bad = self.bad_in_a_row
        return FloatingPointError(
            f"step {step}: the loss, gradients or updates of {bad} steps in a row were not finite; "
            f"{self._describe_newest(step - bad)}. Lower optimizer.peak_lr, or inspect the data"
        )

    def _learning_rate(self, step: int, metrics: Mapping[str, float]) -> float:
        """Returns the learning rate of a step's update.

        Skipped steps do not advance the schedule; a skipped step shows the rate of the next update.
        """
        updates = step - int(metrics["skipped"]) - (0 if metrics["bad_in_a_row"] else 1)
        with jax.transfer_guard("allow"):
            return float(self._schedule(updates))

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        self.latest |= values
        self._log.write(step, values)
