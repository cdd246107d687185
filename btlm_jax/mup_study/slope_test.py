"""A statistical test of scaling exponents: passes, fails, or undecided where noise is too large.

Measurements at several widths, repeated with several seeds, give a slope of log2(value) against
log2(width) and its standard error. Theory gives the interval in which the slope lies.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import stdtrit

Verdict = Literal["passes", "fails", "undecided"]

ERROR_RATE = 0.01
"""The largest probability of a wrong verdict of either kind, for all slopes that are tested."""


class Interval(NamedTuple):
    """A closed interval of slopes."""

    low: float
    high: float


class SlopeFit(NamedTuple):
    """A fitted slope.

    Attributes:
      slope: change of the value when the width doubles; inf if a wider model diverged while the
        narrowest did not; NaN where nothing can be fitted.
      error: standard error of the slope; inf without degrees of freedom.
      degrees: degrees of freedom of the standard error.
    """

    slope: float
    error: float
    degrees: int

    def margin(self, error_rate: float) -> float:
        """Returns the half-width of the interval that misses the slope, on one side, so often."""
        if self.degrees < 1:
            return math.inf
        return float(stdtrit(self.degrees, 1 - error_rate)) * self.error


def fit_slope(widths: tuple[int, ...], values: np.ndarray) -> SlopeFit:
    """Fits a line of one slope, with an intercept for every seed.

    Seeds share their data over the widths, so that their intercepts differ; what remains is noise,
    and curvature, which counts as noise.

    Args:
      widths: the widths.
      values: logarithms to base 2, [seeds, widths].
    """
    if np.isnan(values[:, 0]).any() or (np.isinf(values)).any():
        return SlopeFit(math.nan, math.inf, 0)
    if np.isnan(values).any():
        return SlopeFit(math.inf, 0.0, 0)
    x = np.log2(widths)
    x = x - x.mean()
    y = values - values.mean(1, keepdims=True)
    slope = float((y @ x).mean() / (x @ x))
    degrees = values.size - len(values) - 1
    if degrees < 1:
        return SlopeFit(slope, math.inf, 0)
    variance = float(np.square(y - slope * x).sum()) / degrees
    return SlopeFit(slope, math.sqrt(variance / (len(values) * (x @ x))), degrees)


def judge_slope(fit: SlopeFit, allowed: Interval, tests: int = 1) -> Verdict:
    """Decides whether a slope lies in an interval.

    It passes if the slope is inside with confidence, and fails if it is outside with confidence.

    Args:
      fit: the slope.
      allowed: the interval.
      tests: the number of slopes of one model. The model fails if any of them does, so each may
        fail by chance only so much more rarely. It passes if all of them do, which needs no
        correction: a slope that is outside passes by chance as rarely as if it were alone.
    """
    if fit.slope == math.inf:
        return "fails"
    margin = fit.margin(ERROR_RATE)
    if allowed.low <= fit.slope - margin and fit.slope + margin <= allowed.high:
        return "passes"
    margin = fit.margin(ERROR_RATE / tests / 2)
    if fit.slope - margin > allowed.high or fit.slope + margin < allowed.low:
        return "fails"
    return "undecided"


def join_verdicts(verdicts: list[Verdict]) -> Verdict:
    """Returns "fails" if any fails, else "undecided" if any is, else "passes"."""
    for verdict in ("fails", "undecided"):
        if verdict in verdicts:
            return verdict
    return "passes"
