"""The result of a learning-rate sweep: losses, optima and the cost of keeping a learning rate."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np

COMPARED = ("muP", "SP")
# Upper limits for muP, and lower limits for SP, without which the sweep could not distinguish them.
MUP_OCTAVES, MUP_REGRET = 0.35, 0.03
SP_OCTAVES, SP_REGRET = 0.7, 0.2
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

    def curve(self, parametrization: str, width: int) -> dict[int, float]:
        """Returns exponent of the learning rate -> mean loss over seeds."""
        name = stored_name(parametrization, width, self.widths)
        losses = defaultdict(list)
        for run in self.runs:
            if (run.parametrization, run.width) == (name, width):
                losses[run.exponent].append(run.loss)
        return {e: float(np.mean(losses[e])) for e in sorted(losses)}

    def optimum(self, parametrization: str, width: int) -> tuple[float, float]:
        """Returns log2 of the best learning rate and its loss, from a parabola."""
        curve = self.curve(parametrization, width)
        best = min(curve, key=curve.__getitem__)
        left, middle, right = (curve.get(best + i, math.inf) for i in (-1, 0, 1))
        curvature = left - 2 * middle + right
        if not 0 < curvature < math.inf:
            return float(best), middle
        return best + 0.5 * (left - right) / curvature, middle - (left - right) ** 2 / (
            8 * curvature
        )

    def octaves(self, parametrization: str) -> float:
        """Returns the fitted change of log2 of the optimum when the width doubles."""
        optima = [self.optimum(parametrization, w)[0] for w in self.widths]
        return float(np.polyfit(np.log2(self.widths), optima, 1)[0])

    def regret(self, parametrization: str, width: int) -> float:
        """Returns the cost of keeping the best learning rate of the base, in nats per token.

        It is the loss at the best exponent of the base, minus the loss at the optimum.
        """
        base = self.curve(parametrization, self.widths[0])
        loss = self.curve(parametrization, width)[min(base, key=base.__getitem__)]
        return loss - self.optimum(parametrization, width)[1]


def stored_name(parametrization: str, width: int, widths: tuple[int, ...]) -> str:
    """Returns the name under which a run is stored: at the base width all are the same as muP."""
    return "muP" if width == widths[0] else parametrization
