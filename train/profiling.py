"""Traces of a few steps, for TensorBoard's profiler, XProf or Perfetto."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from btlm_jax.utils import side_output

logger = logging.getLogger(__name__)

_SECONDS = 120.0  # within which a trace must be written


class StepProfiler:
    """Traces a range of steps into `profile/` of the run directory.

    Args:
      directory: the run directory.
      steps: first and last step to trace, from 1; None traces nothing.
      done: steps that the run has already taken.

    Raises:
      ValueError: the first step is already done, or comes after the last.
    """

    def __init__(self, directory: Path, steps: tuple[int, int] | None, done: int) -> None:
        if steps is not None and not done < steps[0] <= steps[1]:
            raise ValueError(
                f"profile: found {steps[0]}:{steps[1]}, expected FIRST:LAST from {done + 1} on"
            )
        self._directory, self._tracing = directory / "profile", False
        self._first, self._last = steps or (0, 0)

    def before_step(self, step: int) -> None:
        """Starts the trace if `step` is the first to trace."""
        if step == self._first:
            self._tracing = True
            self._attempt(lambda: jax.profiler.start_trace(str(self._directory)))

    def after_step(self, step: int, results: Any) -> None:
        """Ends the trace if `step` is the last to trace, once its results are computed."""
        if self._tracing and step == self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is running."""
        if self._tracing:
            self._attempt(jax.profiler.stop_trace)
            if self._tracing:
                logger.info("trace: tensorboard --logdir %s", self._directory)
            self._tracing = False

    def _attempt(self, call: Callable[[], Any]) -> None:
        """Calls the profiler; its failure ends the trace, not the run."""
        name = f"the trace in {self._directory}"
        cost = "training continues without a trace"
        self._tracing = side_output.attempt(name, cost, call, _SECONDS)
