"""Cross-entropy at every position of long texts, which `btlm eval loss-by-position` measures.

A window of T tokens is read in one forward pass, and position t is the loss of its token t + 1.

Dynamic scaling needs more: its scale follows from the number of keys S, and the original code takes
the S of the whole pass for every row. One pass over all T tokens would therefore apply the fixed
factor T / trained at its early positions too, where a reader of that few tokens would not have it.
So dynamic scaling is measured in passes over the first S tokens, S = trained, twice that, and so on
up to T; a position counts in the shortest pass that reaches it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from btlm_jax.evaluation.batch_shapes import batch_shape
from btlm_jax.evaluation.context_extension import ScalingKind, with_scaling_kind
from btlm_jax.evaluation.long_windows import LongWindow, LongWindows
from btlm_jax.model import forward
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.chunked_loss import token_predictions
from btlm_jax.model.params import Params
from btlm_jax.model.runtime import Runtime
from btlm_jax.utils.progress import Progress

# Bins of the plotted curve per doubling of the position.
_BINS_PER_OCTAVE = 8


@dataclasses.dataclass(frozen=True)
class PositionCurve:
    """Loss by position with one kind of scaling.

    Attributes:
      kind: the kind of scaling.
      passes: tokens read by each forward pass, ascending; the last reads T.
      nll: float64 [T], sums over all windows, in nats.
      squares: float64 [T], sums of squares over all windows.
      group_sums: float64 [groups, bins], sums of each group in the bins of `edges`.
    """

    kind: ScalingKind
    passes: tuple[int, ...]
    nll: np.ndarray
    squares: np.ndarray
    group_sums: np.ndarray


@dataclasses.dataclass(frozen=True)
class LossByPosition:
    """Loss by position, with several kinds of scaling on the same windows.

    Attributes:
      trained: trained length, in tokens.
      length: T.
      edges: int [bins + 1], the starts of the bins, from 0, and T; includes the trained length.
      windows: int [groups], number of windows per group.
      short_documents: number of documents left out because they are shorter than T.
      curves: one curve per kind.
    """

    trained: int
    length: int
    edges: np.ndarray
    windows: np.ndarray
    short_documents: int
    curves: tuple[PositionCurve, ...]

    @property
    def count(self) -> int:
        """Number of windows, and so of tokens at every position."""
        return int(self.windows.sum())


class PositionBin(NamedTuple):
    """The mean over the positions from `start` up to `stop`, exclusive."""

    start: int
    stop: int
    mean: float  # nats per token
    error: float  # standard error of the mean; NaN for a single group


def check_window_length(length: int, trained: int) -> None:
    """Raises ValueError unless windows are longer than the trained length."""
    if length <= trained:
        raise ValueError(
            f"length: found {length}, expected more than the trained length of {trained}"
        )


def pass_lengths(kind: ScalingKind, trained: int, length: int) -> tuple[int, ...]:
    """Returns how many tokens the forward passes for a kind of scaling read, ascending."""
    if kind != "dynamic":
        return (length,)
    doublings = math.ceil(math.log2(max(1.0, length / trained)))
    return (*(trained << n for n in range(doublings)), length)


def bin_edges(trained: int, length: int) -> np.ndarray:
    """Returns edges, int [bins + 1], of bins that grow with the position, eight per doubling."""
    first = -_BINS_PER_OCTAVE * math.ceil(math.log2(trained))
    last = _BINS_PER_OCTAVE * math.ceil(math.log2(length / trained))
    octaves = np.arange(first, last + 1) / _BINS_PER_OCTAVE
    edges = np.rint(trained * 2.0**octaves).astype(int)
    return np.unique([0, *edges[(edges > 0) & (edges < length)], length])


def token_losses(
    runtime: Runtime, params: Params, ids: ArrayLike, targets: ArrayLike, length: ArrayLike
) -> jax.Array:
    """Returns the loss of every target, fp32 [B, W], in one pass.

    Neither [W, W] nor [W, V] arrays are materialized.

    Args:
      runtime, params: `model.runtime(params)`, and the weights.
      ids, targets: int32 [B, W].
      length: number of valid tokens of each row; the rest are padding.
    """
    h_BTD, _ = forward.hidden(runtime, params, ids, length=length)
    return token_predictions(runtime, params, h_BTD, targets).nll


def losses_in_passes(
    model: BTLM, params: Params, inputs: np.ndarray, targets: np.ndarray, ends: Sequence[int]
) -> np.ndarray:
    """Returns the loss of every token, fp32 [B, T], from one forward pass for each of `ends`.

    Args:
      model: the model, with the scaling to measure.
      params: its weights.
      inputs, targets: int32 [B, T].
      ends: as returned by `pass_lengths`.
    """
    runtime, segments, start = model.runtime(params), [], 0
    for end in ends:
        _, width = batch_shape(runtime, end, None, len(inputs))
        ids, labels = (np.pad(x[:, :end], ((0, 0), (0, width - end))) for x in (inputs, targets))
        nll = token_losses(runtime, params, ids, labels, np.int32(end))
        segments.append(np.asarray(nll)[:, start:end])
        start = end
    return np.concatenate(segments, axis=1)


def loss_by_position(
    model: BTLM,
    params: Params,
    windows: LongWindows,
    *,
    trained: int,
    kinds: Sequence[ScalingKind],
    batch_size: int | None = None,
) -> LossByPosition:
    """Measures all kinds of scaling on the same windows, with float64 sums on the host.

    Args:
      model, params: the model and its weights, on a device or a mesh, whose context axis splits
        windows.
      windows: the windows, which are consumed.
      trained: as returned by `context_extension.trained_length`.
      kinds: kinds of scaling (`context_extension.with_scaling_kind`).
      batch_size: windows per batch, over all devices; default about 8192 tokens on each device.

    Raises:
      ValueError: a length that is not above the trained one, a batch that does not divide over the
        mesh, or a kind that the model does not support.
      FloatingPointError: the loss is not finite.
    """
    T = windows.length
    check_window_length(T, trained)
    edges = bin_edges(trained, T)
    models = {kind: with_scaling_kind(model, kind, trained, T) for kind in kinds}
    passes = {kind: pass_lengths(kind, trained, T) for kind in kinds}
    nll, squares = ({kind: np.zeros(T) for kind in kinds} for _ in range(2))
    group_sums: dict[ScalingKind, dict[int, np.ndarray]] = {kind: {} for kind in kinds}
    counts: dict[int, int] = {}
    rows, _ = batch_shape(model.runtime(params), T, windows.max_windows, batch_size)
    # The number of windows is known only when the documents end.
    note = f"at most {windows.max_windows}" if windows.max_windows else ""
    with Progress(None, "window", "evaluate") as progress:
        for batch in iter(lambda: list(itertools.islice(windows, rows)), []):
            inputs, targets = _stack_windows(batch, rows)
            for kind, scaled in models.items():
                losses = losses_in_passes(scaled, params, inputs, targets, passes[kind])
                losses = losses[: len(batch)].astype(np.float64)
                _check_finite(kind, losses)
                nll[kind] += losses.sum(0)
                squares[kind] += np.square(losses).sum(0)
                for window, row in zip(batch, losses, strict=True):
                    sums = np.add.reduceat(row, edges[:-1])
                    group_sums[kind][window.group] = group_sums[kind].get(window.group, 0.0) + sums
            for window in batch:
                counts[window.group] = counts.get(window.group, 0) + 1
            progress.update(len(batch), note)
    curves = (
        PositionCurve(kind, passes[kind], nll[kind], squares[kind],
                      np.stack([*group_sums[kind].values()]))
        for kind in kinds
    )  # fmt: skip
    windows_per_group = np.array([*counts.values()])
    return LossByPosition(
        trained, T, edges, windows_per_group, windows.short_documents, tuple(curves)
    )


def _stack_windows(batch: Sequence[LongWindow], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (inputs, targets), int32 [rows, T]; repeats the last window to fill the rows."""
    filled = [*batch, *[batch[-1]] * (rows - len(batch))]
    return np.stack([w.inputs for w in filled]), np.stack([w.targets for w in filled])


def _check_finite(kind: ScalingKind, losses: np.ndarray) -> None:
    if not np.isfinite(losses).all():
        raise FloatingPointError(
            f"scaling {kind!r}: found a loss of {losses[~np.isfinite(losses)][0]}, expected finite "
            "numbers: check that the weights are finite and the ids within the vocabulary, and try "
            "float32 in case the computation overflows"
        )


def bin_means(
    report: LossByPosition, curve: PositionCurve, edges: Sequence[int] | np.ndarray
) -> list[PositionBin]:
    """Returns means over wider bins, with standard errors over groups.

    Neighboring tokens are correlated, and so are windows of a document or of a stream: only groups
    are independent, and a single group has no error. The mean is a ratio of the groups' sums s and
    counts c, whose variance is, to first order,
    n / (n - 1) * sum((s - mean * c)^2) / sum(c)^2 (Cochran, Sampling Techniques, 1977, ch. 6).

    Args:
      report: the measurement.
      curve: one of its curves, or a difference of two.
      edges: edges of the wider bins, a subset of `report.edges`.
    """
    bins = []
    for a, b in itertools.pairwise(np.searchsorted(report.edges, edges)):
        start, stop = int(report.edges[a]), int(report.edges[b])
        s, c = curve.group_sums[:, a:b].sum(1), report.windows * (stop - start)
        mean, n = s.sum() / c.sum(), len(c)
        error = math.nan
        if n > 1:
            error = math.sqrt(n / (n - 1) * np.square(s - mean * c).sum()) / c.sum()
        bins.append(PositionBin(start, stop, float(mean), error))
    return bins


def curve_difference(curve: PositionCurve, baseline: PositionCurve) -> PositionCurve:
    """Returns `curve` - `baseline`, whose bins are means of differences on the same tokens.

    Documents differ by more than kinds of scaling do, and that cancels.
    """
    return dataclasses.replace(
        curve,
        nll=curve.nll - baseline.nll,
        squares=np.full_like(curve.squares, np.nan),
        group_sums=curve.group_sums - baseline.group_sums,
    )


def summary_edges(report: LossByPosition) -> list[int]:
    """Returns edges of a few bins to print.

    They are octaves down to an eighth of the trained length, and half octaves above it.
    """
    below = (int(np.rint(report.trained / divisor)) for divisor in (8, 4, 2))
    above = report.edges[report.edges >= report.trained][:: _BINS_PER_OCTAVE // 2]
    return sorted({0, *below, *(int(x) for x in above), report.length})
