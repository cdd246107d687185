"""Training-curve collapse (arXiv 2509.25087).

Runs of different sizes with the same schedule, tokens per parameter and AdamW timescale have one
curve, once time is a fraction of the training and losses are divided by the final one.
So finished runs, a family, predict how a running one ends, and what leaves the family has a fault.
All is computed on logarithms of losses, where dividing is subtracting, and on averages over bins of
the training, which are comparable between runs logged at different intervals.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

IGNORED = 0.2
"""The first fraction of training, which does not collapse (warmup, and the fall from ln V)."""
WINDOW = (0.25, 0.5)
"""The fractions between which runs are laid over each other; the paper's early-align."""
BINS = 100
"""Of a training, at most; a bin needs two logged losses."""
FALSE_ALARM = 0.01
"""The chance, at most, that a run of the family is said to leave it."""

_FEWEST_BINS = 20
_BLOCK = 5  # bins over which a family's slow wandering is looked for
_END = 0.2  # of training, over which the final loss is a parabola's end
_SLACK = 0.75  # in standard deviations: what the monitor lets pass
_FINEST = 1e-4  # of a loss: what is finer than 0.01 % is nobody's fault


class LossCurve(NamedTuple):
    """A training curve.

    Attributes:
      done: float64 [points], tokens seen as a fraction of all that the run will see; rising, in
        (0, 1].
      loss: float64 [points], nats per token.
    """

    done: np.ndarray
    loss: np.ndarray

    @classmethod
    def of(cls, done: ArrayLike, loss: ArrayLike) -> LossCurve:
        """A checked curve.

        Raises:
          ValueError: different lengths, too few points, fractions that do not rise in (0, 1], or
            losses that are not positive and finite.
        """
        t, y = np.asarray(done, np.float64), np.asarray(loss, np.float64)
        if t.ndim != 1 or t.shape != y.shape or len(t) < 2:
            raise ValueError(
                f"curve: found {t.shape} fractions and {y.shape} losses, expected as many, 2 or "
                "more of each"
            )
        if not (np.all(np.diff(t) > 0) and t[0] > 0 and t[-1] <= 1 + 1e-9):
            raise ValueError("curve.done: expected rising fractions in (0, 1]")
        if not (np.isfinite(y).all() and (y > 0).all()):
            bad = int(np.flatnonzero(~(np.isfinite(y) & (y > 0)))[0])
            raise ValueError(
                f"curve.loss: found {y[bad]} at {t[bad]:.1%} of training, expected positive, "
                "finite losses"
            )
        return cls(t, y)


def choose_bins(curves: Sequence[LossCurve]) -> int:
    """Bins that every curve fills with two points at least, `BINS` at most.

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
    """The middles of the bins, as fractions of training: [bins]."""
    return (np.arange(bins) + 0.5) / bins


def bin_curve(curve: LossCurve, bins: int) -> np.ndarray:
    """log(loss) averaged over bins of training: float64 [bins], NaN where the run is not yet.

    The average is of the line through the points, so that a bin in which points lie early and late
    is not taken for lower or higher.
    """
    t, y = curve.done, np.log(curve.loss)
    edges = np.linspace(0, 1, bins + 1)
    t = np.concatenate([[0.0], t, [max(1.0, t[-1])]])
    y = np.concatenate([y[:1], y, y[-1:]])
    area = np.concatenate([[0.0], np.cumsum(np.diff(t) * (y[1:] + y[:-1]) / 2)])
    at = np.clip(np.searchsorted(t, edges, side="right") - 1, 0, len(t) - 2)
    integral = area[at] + (edges - t[at]) * (y[at] + np.interp(edges, t, y)) / 2
    found = np.diff(integral) * bins
    # The last logged loss may come before the end of its bin, the first one after its beginning.
    spacing = 1.5 * (curve.done[-1] - curve.done[0]) / (len(curve.done) - 1)
    missing = (edges[1:] > curve.done[-1] + spacing) | (edges[:-1] < curve.done[0] - spacing)
    return np.where(missing, np.nan, found)


@functools.cache
def _end_weights(bins: int) -> np.ndarray:
    """[bins]: their product with a curve's bins is its value at the end of training."""
    t = bin_centers(bins) - 1
    last = t > -_END
    weights = np.zeros(bins)
    weights[last] = np.linalg.pinv(np.vander(t[last], 3))[-1]
    return weights


class LossEstimate(NamedTuple):
    """A loss in nats, and one standard deviation of it."""

    loss: float
    std: float


@dataclasses.dataclass(frozen=True)
class CurveFamily:
    """Finished runs of one shape.

    Attributes:
      shape: float64 [bins], log(loss / final loss), the mean of the runs.
      runs: how many.
      noise: standard deviation of one bin of one run, of log(loss); with what runs wander from
        each other over `_BLOCK` bins, if that is more.
    """

    shape: np.ndarray
    runs: int
    noise: float


def fit_family(curves: Sequence[LossCurve], bins: int) -> CurveFamily:
    """The family of finished runs.

    Runs are laid over each other by all of their curves after `IGNORED`, not by their last, noisy
    losses.

    Args:
      curves: whole trainings, one or more.
      bins: from `bins_for`, of these and all that will be compared with them.

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
    wandering = (y - levels - mean)[:, used]
    noise = max(_roughness(row) for row in y[:, used])
    if len(y) > 1:
        blocks = wandering[:, : wandering.shape[1] // _BLOCK * _BLOCK]
        blocks = blocks.reshape(len(y), -1, _BLOCK).mean(-1)
        for size, values in ((1, wandering), (_BLOCK, blocks)):
            degrees = (len(y) - 1) * (values.shape[1] - 1)
            noise = max(noise, float(np.sqrt(size * np.square(values).sum() / degrees)))
    return CurveFamily(mean - _end_weights(bins)[used] @ mean[used], len(y), noise)


def _roughness(y: np.ndarray) -> float:
    """Standard deviation of independent noise on a smooth curve, from second differences."""
    return float(np.sqrt(np.mean(np.square(np.diff(y, 2))) / 6))


def final_loss(curve: LossCurve, bins: int) -> LossEstimate:
    """What a finished run ends at: the end of a parabola through the last fifth of its training."""
    y, weights = bin_curve(curve, bins), _end_weights(bins)
    used = bin_centers(bins) > IGNORED
    loss = float(np.exp(weights[used] @ y[used]))
    return LossEstimate(loss, loss * _roughness(y[used]) * float(np.linalg.norm(weights)))


class AlignedCurve(NamedTuple):
    """A run laid over its family.

    Attributes:
      final: the final loss that the family predicts for it, from `WINDOW` alone. The standard
        deviation is of noise; that runs may not collapse, `backtest` shows.
      residuals: float64 [bins], log(loss / what the family has there); NaN where nothing is, and
        before `IGNORED`.
    """

    final: LossEstimate
    residuals: np.ndarray


class TooEarlyError(ValueError):
    """A run that has not come far enough to be compared."""


def align_curve(of: CurveFamily, curve: LossCurve) -> AlignedCurve:
    """Lays a run, finished or not, over the family.

    Raises:
      TooEarlyError: it has not come far enough into `WINDOW`.
    """
    bins, y = len(of.shape), bin_curve(curve, len(of.shape))
    t = bin_centers(bins)
    window = (t > WINDOW[0]) & (t < WINDOW[1]) & ~np.isnan(y)
    if window.sum() < 0.05 * bins:
        raise TooEarlyError(
            f"curve: found {curve.done[-1]:.1%} of the training, expected "
            f"{WINDOW[0] + 0.05:.0%} or more: too early to compare it with a family"
        )
    level = float((y - of.shape)[window].mean())
    own = _roughness(y[(t > IGNORED) & ~np.isnan(y)])
    each = max(own, of.noise) ** 2 + of.noise**2 / of.runs
    end = of.noise**2 / of.runs * float(np.square(_end_weights(bins)).sum())
    std = float(np.sqrt(each / window.sum() + end))
    residuals = np.where(t > IGNORED, y - of.shape - level, np.nan)
    return AlignedCurve(LossEstimate(float(np.exp(level)), float(np.exp(level)) * std), residuals)


class CollapseVerdict(NamedTuple):
    """Whether a run stays in its family.

    Attributes:
      left_at: the fraction of training at which it began to leave; None if it stays.
      noticed_at: the fraction after which that was certain enough.
      excess: log(loss / the family's), averaged over the last bins of the run: by how much.
      statistic, threshold: largest cumulative sum, and what it must pass (see `monitor`).
    """

    left_at: float | None
    noticed_at: float | None
    excess: float
    statistic: float
    threshold: float


def monitor_curve(of: CurveFamily, curve: LossCurve) -> CollapseVerdict:
    """Whether and where a run leaves the family, above or below.

    Page's cumulative sum of the residuals in units of their noise, less a slack: it returns to zero
    in a run of the family and grows in one that leaves; the run left where it was last zero. The
    threshold is what `FALSE_ALARM` of runs pass that are nothing but noise, laid over the family in
    the same way. The noise is the family's, or the run's own if that is more, so that a smaller
    batch is no fault.

    Raises:
      ValueError: as `align`.
    """
    bins, t = len(of.shape), bin_centers(len(of.shape))
    residuals = align_curve(of, curve).residuals
    used = ~np.isnan(residuals)
    r, t = residuals[used], t[used]
    noise = np.sqrt(max(_roughness(r), of.noise) ** 2 + of.noise**2 / of.runs)
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
    """What the sums of noise, its mean over the window taken off, pass in `FALSE_ALARM` of runs."""
    z = np.random.default_rng(0).standard_normal((20_000, bins))
    z -= z[:, first : first + window].mean(1, keepdims=True)
    up, down = _sums(z)
    largest = np.maximum(up.max(1), down.max(1))
    return float(np.quantile(largest, 1 - FALSE_ALARM))


def backtest_family(curves: Sequence[LossCurve], bins: int) -> np.ndarray:
    """log(predicted / own final loss) of each finished run, from its first half, by the others.

    Args:
      curves: two or more whole trainings.
      bins: from `bins_for`.

    Raises:
      ValueError: fewer than two, or as `family`.
    """
    if len(curves) < 2:
        raise ValueError(f"backtest: found {len(curves)} finished runs, expected 2 or more")
    found = []
    for i, curve in enumerate(curves):
        others = fit_family([c for j, c in enumerate(curves) if j != i], bins)
        predicted = align_curve(others, curve).final.loss
        found.append(np.log(predicted / final_loss(curve, bins).loss))
    return np.array(found)


def family_members(curves: Sequence[LossCurve], bins: int) -> list[int]:
    """The runs that are a family: without those that leave the rest, the worst first.

    Two runs that differ do not say which of them is at fault, so two are always left.
    """
    kept = list(range(len(curves)))
    while len(kept) > 2:
        scores = {}
        for i in kept:
            rest = fit_family([curves[j] for j in kept if j != i], bins)
            verdict = monitor_curve(rest, curves[i])
            scores[i] = verdict.statistic / verdict.threshold
        worst = max(scores, key=lambda i: scores[i])
        if scores[worst] <= 1:
            break
        kept.remove(worst)
    return kept
