"""Training-curve collapse (arXiv 2509.25087).

Runs of different sizes with the same schedule, tokens per parameter and AdamW timescale have one
curve, if time is a fraction of the training and losses are divided by the final loss. A family of
finished runs therefore predicts how a running one ends, and a run that leaves the family has a
fault. All computations use logarithms of losses, where division is subtraction, and averages over
bins of the training, which make runs with different logging intervals comparable.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

IGNORED = 0.2
"""The initial fraction of training that does not collapse (warmup, and the fall from ln V)."""
WINDOW = (0.25, 0.5)
"""The fractions of training between which curves are aligned; the paper's early-align."""
BINS = 100
"""The largest number of bins in a training; a bin needs two logged losses."""
FALSE_ALARM = 0.01
"""The largest probability that `monitor_curve` reports a run that belongs to the family."""

_FEWEST_BINS = 20
_BLOCK = 5  # bins in a block, for slow variation between the runs of a family
_END = 0.2  # last fraction of training, whose parabola gives the final loss
_SLACK = 0.75  # standard deviations that the monitor ignores
_FINEST = 1e-4  # least noise of log(loss): differences below 0.01 % are not a fault


class LossCurve(NamedTuple):
    """A training curve.

    Attributes:
      done: float64 [points], fraction of the run's tokens seen so far; increasing, in (0, 1].
      loss: float64 [points], nats per token.
    """

    done: np.ndarray
    loss: np.ndarray

    @classmethod
    def of(cls, done: ArrayLike, loss: ArrayLike) -> LossCurve:
        """Returns a curve after checking the values.

        Raises:
          ValueError: different lengths, too few points, fractions that do not increase in (0, 1],
            or losses that are not positive and finite.
        """
        t, y = np.asarray(done, np.float64), np.asarray(loss, np.float64)
        if t.ndim != 1 or t.shape != y.shape or len(t) < 2:
            raise ValueError(
                f"curve: found {t.shape} fractions and {y.shape} losses, expected equal lengths "
                "of 2 or more"
            )
        if not (np.all(np.diff(t) > 0) and t[0] > 0 and t[-1] <= 1 + 1e-9):
            raise ValueError("curve.done: expected increasing fractions in (0, 1]")
        if not (np.isfinite(y).all() and (y > 0).all()):
            bad = int(np.flatnonzero(~(np.isfinite(y) & (y > 0)))[0])
            raise ValueError(
                f"curve.loss: found {y[bad]} at {t[bad]:.1%} of training, expected positive, "
                "finite losses"
            )
        return cls(t, y)


def choose_bins(curves: Sequence[LossCurve]) -> int:
    """Returns the number of bins, at most `BINS`, that gives every curve two points per bin.

    Raises:
      ValueError: a curve is too sparse.
    """
    sparsest = min(len(c.done) / c.done[-1] for c in curves)  # points in a whole training
    bins = min(BINS, int(sparsest) // 2 // 20 * 20)
    if bins < _FEWEST_BINS:
        raise ValueError(
            f"curve: found {sparsest:.0f} losses in a whole training, expected {2 * _FEWEST_BINS} "
            "or more: log more often (run.log_every)"
        )
    return bins


def bin_centers(bins: int) -> np.ndarray:
    """Returns the centers of the bins, as fractions of training: [bins]."""
    return (np.arange(bins) + 0.5) / bins


def bin_curve(curve: LossCurve, bins: int) -> np.ndarray:
    """Averages log(loss) over bins of training: float64 [bins], NaN after the end of the run.

    The average is that of the line through the points, so that the positions of the points within
    a bin do not bias it.
    """
    t, y = curve.done, np.log(curve.loss)
    edges = np.linspace(0, 1, bins + 1)
    t = np.concatenate([[0.0], t, [max(1.0, t[-1])]])
    y = np.concatenate([y[:1], y, y[-1:]])
    area = np.concatenate([[0.0], np.cumsum(np.diff(t) * (y[1:] + y[:-1]) / 2)])
    left = np.clip(np.searchsorted(t, edges, side="right") - 1, 0, len(t) - 2)
    integral = area[left] + (edges - t[left]) * (y[left] + np.interp(edges, t, y)) / 2
    averages = np.diff(integral) * bins
    # The last logged loss may precede the end of its bin, the first one follow its beginning.
    spacing = 1.5 * (curve.done[-1] - curve.done[0]) / (len(curve.done) - 1)
    missing = (edges[1:] > curve.done[-1] + spacing) | (edges[:-1] < curve.done[0] - spacing)
    return np.where(missing, np.nan, averages)


@functools.cache
def _end_weights(bins: int) -> np.ndarray:
    """Returns weights [bins] whose product with binned values is the value at the end."""
    t = bin_centers(bins) - 1
    last = t > -_END
    weights = np.zeros(bins)
    weights[last] = np.linalg.pinv(np.vander(t[last], 3))[-1]
    return weights


class LossEstimate(NamedTuple):
    """A loss in nats and its standard deviation."""

    loss: float
    std: float


@dataclasses.dataclass(frozen=True)
class CurveFamily:
    """Finished runs whose curves have one shape.

    Attributes:
      shape: float64 [bins], log(loss / final loss), the mean over the runs.
      runs: the number of runs.
      noise: standard deviation of log(loss) in one bin of one run; larger if the runs differ more
        from each other, in single bins or over blocks of `_BLOCK` bins.
    """

    shape: np.ndarray
    runs: int
    noise: float


def fit_family(curves: Sequence[LossCurve], bins: int) -> CurveFamily:
    """Fits a family to finished runs.

    Runs are aligned by their whole curves after `IGNORED`, not by their last, noisy losses.

    Args:
      curves: one or more finished runs.
      bins: from `choose_bins`, for these and all curves that will be compared with them.

    Raises:
      ValueError: no curves, or one that does not reach the end.
    """
    if not curves:
        raise ValueError("family: found no finished run, expected one or more to compare with")
    y = np.stack([bin_curve(c, bins) for c in curves])
    used = bin_centers(bins) > IGNORED
    if np.isnan(y[:, used]).any():
        which = int(np.flatnonzero(np.isnan(y[:, used]).any(1))[0])
        raise ValueError(
            f"family: run {which} reaches {curves[which].done[-1]:.0%} of its training, expected "
            "finished runs"
        )
    levels = y[:, used].mean(1, keepdims=True)
    mean = (y - levels).mean(0)
    deviations = (y - levels - mean)[:, used]
    noise = max(_roughness(row) for row in y[:, used])
    if len(y) > 1:
        blocks = deviations[:, : deviations.shape[1] // _BLOCK * _BLOCK]
        blocks = blocks.reshape(len(y), -1, _BLOCK).mean(-1)
        for size, values in ((1, deviations), (_BLOCK, blocks)):
            degrees = (len(y) - 1) * (values.shape[1] - 1)
            noise = max(noise, float(np.sqrt(size * np.square(values).sum() / degrees)))
    return CurveFamily(mean - _end_weights(bins)[used] @ mean[used], len(y), noise)


def _roughness(y: np.ndarray) -> float:
    """Returns the standard deviation of independent noise on a smooth curve.

    Second differences remove the curve and multiply the variance by 6.
    """
    return float(np.sqrt(np.mean(np.square(np.diff(y, 2))) / 6))


def final_loss(curve: LossCurve, bins: int) -> LossEstimate:
    """Returns the final loss of a finished run, from a parabola through the last fifth of it."""
    y, weights = bin_curve(curve, bins), _end_weights(bins)
    used = bin_centers(bins) > IGNORED
    loss = float(np.exp(weights[used] @ y[used]))
    return LossEstimate(loss, loss * _roughness(y[used]) * float(np.linalg.norm(weights)))


class AlignedCurve(NamedTuple):
    """A run aligned with a family.

    Attributes:
      final: the final loss that the family predicts, from `WINDOW` alone. The standard deviation
        accounts for noise only; `backtest_family` shows how well the runs collapse.
      residuals: float64 [bins], log(loss / loss of the family); NaN before `IGNORED` and after the
        end of the run.
    """

    final: LossEstimate
    residuals: np.ndarray


class TooEarlyError(ValueError):
    """Raised for a run that is too short to be compared with a family."""


def align_curve(family: CurveFamily, curve: LossCurve) -> AlignedCurve:
    """Aligns a run, finished or not, with the family.

    Raises:
      TooEarlyError: the run has not covered enough of `WINDOW`.
    """
    bins, y = len(family.shape), bin_curve(curve, len(family.shape))
    t = bin_centers(bins)
    window = (t > WINDOW[0]) & (t < WINDOW[1]) & ~np.isnan(y)
    if window.sum() < 0.05 * bins:
        raise TooEarlyError(
            f"curve: found {curve.done[-1]:.1%} of the training, expected "
            f"{WINDOW[0] + 0.05:.0%} or more: too early to compare it with a family"
        )
    level = float((y - family.shape)[window].mean())
    roughness = _roughness(y[(t > IGNORED) & ~np.isnan(y)])
    variance = max(roughness, family.noise) ** 2 + family.noise**2 / family.runs
    end = family.noise**2 / family.runs * float(np.square(_end_weights(bins)).sum())
    std = float(np.sqrt(variance / window.sum() + end))
    residuals = np.where(t > IGNORED, y - family.shape - level, np.nan)
    return AlignedCurve(LossEstimate(float(np.exp(level)), float(np.exp(level)) * std), residuals)


class CollapseVerdict(NamedTuple):
    """Whether a run stays in its family.

    Attributes:
      left_at: the fraction of training at which it began to leave; None if it stays.
      noticed_at: the fraction of training at which the statistic passed the threshold.
      excess: log(loss / loss of the family), averaged over the last bins of the run.
      statistic, threshold: the largest cumulative sum, and its limit (see `monitor_curve`).
    """

    left_at: float | None
    noticed_at: float | None
    excess: float
    statistic: float
    threshold: float


def monitor_curve(family: CurveFamily, curve: LossCurve) -> CollapseVerdict:
    """Decides whether and where a run leaves the family, above or below.

    Page's cumulative sum of the residuals, in units of their noise and less a slack, returns to
    zero while a run stays in the family and grows when it leaves; the run left where the sum was
    last zero. A fraction `FALSE_ALARM` of pure noise, aligned in the same way, passes the
    threshold. The noise is that of the family, or of the run if that is larger, so that a smaller
    batch does not count as a fault.

    Raises:
      ValueError: as `align_curve`.
    """
    bins, t = len(family.shape), bin_centers(len(family.shape))
    residuals = align_curve(family, curve).residuals
    used = ~np.isnan(residuals)
    r, t = residuals[used], t[used]
    noise = np.sqrt(max(_roughness(r), family.noise) ** 2 + family.noise**2 / family.runs)
    z = r / max(float(noise), _FINEST)
    window = (t > WINDOW[0]) & (t < WINDOW[1])
    threshold = _threshold(len(z), int(np.argmax(window)), int(window.sum()))
    sums = np.stack(_sums(z[None]))[:, 0]
    side = int(np.argmax(sums.max(1)))
    excess = float(r[-_BLOCK:].mean())
    if sums[side].max() <= threshold:
        return CollapseVerdict(None, None, excess, float(sums.max()), threshold)
    alarm = int(np.argmax(sums[side] > threshold))
    before = np.flatnonzero(sums[side][:alarm] == 0)
    start = int(before[-1]) + 1 if len(before) else 0
    left, noticed = t[start] - 0.5 / bins, t[alarm] + 0.5 / bins
    return CollapseVerdict(float(left), float(noticed), excess, float(sums.max()), threshold)


def _sums(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Page's sums upwards and downwards of rows [rows, bins]."""
    up, down = np.zeros_like(z), np.zeros_like(z)
    for i in range(z.shape[1]):
        before_up, before_down = (up[:, i - 1], down[:, i - 1]) if i else (0.0, 0.0)
        up[:, i] = np.maximum(0, before_up + z[:, i] - _SLACK)
        down[:, i] = np.maximum(0, before_down - z[:, i] - _SLACK)
    return up, down


@functools.cache
def _threshold(bins: int, first: int, window: int) -> float:
    """Returns the limit that a fraction `FALSE_ALARM` of pure noise, aligned by window, passes."""
    z = np.random.default_rng(0).standard_normal((20_000, bins))
    z -= z[:, first : first + window].mean(1, keepdims=True)
    up, down = _sums(z)
    largest = np.maximum(up.max(1), down.max(1))
    return float(np.quantile(largest, 1 - FALSE_ALARM))


def backtest_family(curves: Sequence[LossCurve], bins: int) -> np.ndarray:
    """Predicts each finished run from its first half by the other runs.

    Args:
      curves: two or more finished runs.
      bins: from `choose_bins`.

    Returns:
      log(predicted / measured final loss) of each run.

    Raises:
      ValueError: fewer than two curves, or as `fit_family`.
    """
    if len(curves) < 2:
        raise ValueError(f"backtest: found {len(curves)} finished runs, expected 2 or more")
    errors = []
    for i, curve in enumerate(curves):
        others = fit_family([c for j, c in enumerate(curves) if j != i], bins)
        predicted = align_curve(others, curve).final.loss
        errors.append(np.log(predicted / final_loss(curve, bins).loss))
    return np.array(errors)


def family_members(curves: Sequence[LossCurve], bins: int) -> list[int]:
    """Returns the indices of the runs that form a family.

    Runs that leave the rest are removed, the worst first. Two runs always remain, as two runs that
    differ do not show which of them is at fault.
    """
    members = list(range(len(curves)))
    while len(members) > 2:
        scores = {}
        for i in members:
            rest = fit_family([curves[j] for j in members if j != i], bins)
            verdict = monitor_curve(rest, curves[i])
            scores[i] = verdict.statistic / verdict.threshold
        worst = max(scores, key=lambda i: scores[i])
        if scores[worst] <= 1:
            break
        members.remove(worst)
    return members
