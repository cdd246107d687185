"""The result of a learning-rate sweep: losses, optima and the cost of keeping a learning rate."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from btlm_jax.mup_study.slope_test import (
    ERROR_RATE,
    Interval,
    SlopeFit,
    Verdict,
    fit_slope,
    join_verdicts,
    judge_slope,
)

COMPARED = ("muP", "SP")
# In theory the optimum moves by 0 octaves per doubling under muP and by -1 in SP; the limit between
# them is the same for both.
OCTAVES = 0.5
# Nats per token: the most for muP, and the least for SP, without which the sweep distinguishes
# nothing.
MUP_REGRET, SP_REGRET = 0.03, 0.2
SP_WIDTH = 4  # times the base width, where SP is judged


class SweepRun(NamedTuple):
    """One training run; the learning rate is 2**exponent."""

    parametrization: str
    width: int
    exponent: int
    seed: int
    loss: float  # held-out, nats per token; inf where it diverged


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A complete sweep.

    Attributes:
      widths: the widths, ascending; the first is the base width of muP.
      runs: all runs.
    """

    widths: tuple[int, ...]
    runs: tuple[SweepRun, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Returns the seeds."""
        return tuple(sorted({run.seed for run in self.runs}))

    def curve(self, parametrization: str, width: int, seed: int | None = None) -> dict[int, float]:
        """Returns exponent of the learning rate -> loss, of one seed or the mean over all."""
        name = stored_name(parametrization, width, self.widths)
        losses = defaultdict(list)
        for run in self.runs:
            if (run.parametrization, run.width) == (name, width) and seed in (None, run.seed):
                losses[run.exponent].append(run.loss)
        return {e: float(np.mean(losses[e])) for e in sorted(losses)}

    def optimum(
        self, parametrization: str, width: int, seed: int | None = None
    ) -> tuple[float, float]:
        """Returns log2 of the best learning rate and its loss, from a parabola."""
        curve = self.curve(parametrization, width, seed)
        best = min(curve, key=curve.__getitem__)
        left, middle, right = (curve.get(best + i, math.inf) for i in (-1, 0, 1))
        curvature = left - 2 * middle + right
        if not 0 < curvature < math.inf:
            return float(best), middle
        return best + 0.5 * (left - right) / curvature, middle - (left - right) ** 2 / (
            8 * curvature
        )

    def octaves(self, parametrization: str) -> SlopeFit:
        """Returns the fitted change of log2 of the optimum when the width doubles."""
        optima = [
            [self.optimum(parametrization, w, seed)[0] for w in self.widths] for seed in self.seeds
        ]
        return fit_slope(self.widths, np.array(optima))

    def regret(self, parametrization: str, width: int, seed: int | None = None) -> float:
        """Returns the cost of keeping the best learning rate of the base, in nats per token.

        It is the loss at the best exponent of the base, minus the loss at the optimum.
        """
        base = self.curve(parametrization, self.widths[0])
        curve = self.curve(parametrization, width, seed)
        return (
            curve[min(base, key=base.__getitem__)] - self.optimum(parametrization, width, seed)[1]
        )

    def verdict(self) -> Verdict:
        """Returns whether the learning rate transfers under muP."""
        octaves = judge_slope(self.octaves("muP"), Interval(-OCTAVES, OCTAVES), tests=2)
        return join_verdicts([octaves, *(self._judge_regret(w) for w in self.widths[1:])])

    def _judge_regret(self, width: int) -> Verdict:
        """A regret above its limit fails only where the seeds agree."""
        if self.regret("muP", width) <= MUP_REGRET:
            return "passes"
        regrets = np.array([self.regret("muP", width, seed) for seed in self.seeds])
        if not np.isfinite(regrets).all():  # the base's learning rate diverges
            return "fails"
        degrees = len(regrets) - 1
        error = regrets.std(ddof=1) / math.sqrt(len(regrets)) if degrees else math.inf
        margin = SlopeFit(0.0, float(error), degrees).margin(ERROR_RATE / 2 / len(self.widths[1:]))
        return "fails" if regrets.mean() - margin > MUP_REGRET else "undecided"

    def sp_differs(self) -> bool | None:
        """Returns whether SP is seen not to transfer; None if no width is wide enough to tell."""
        far = [w for w in self.widths if w >= SP_WIDTH * self.widths[0]]
        if not far:
            return None
        fit = self.octaves("SP")
        moves = judge_slope(fit, Interval(-OCTAVES, math.inf)) == "fails"
        return moves and self.regret("SP", far[0]) >= SP_REGRET

    def outcome(self) -> Verdict:
        """Returns the verdict on muP; undecided too if SP, the control, would pass."""
        verdict = self.verdict()
        return "undecided" if verdict == "passes" and self.sp_differs() is False else verdict


def stored_name(parametrization: str, width: int, widths: tuple[int, ...]) -> str:
    """Returns the name under which a run is stored: at the base width all are the same as muP."""
    return "muP" if width == widths[0] else parametrization
