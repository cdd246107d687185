"""Cross-entropy at every position of long texts: what `btlm eval loss-by-position` measures.

A window of T tokens is read in one forward pass, and position t is the loss of its token t + 1.
Dynamic scaling makes that depend on the pass: its scale follows from the number of keys S, and the
original takes the S of the whole pass for every row of it. A pass over all T tokens would thus be
the fixed factor T / trained, at its early positions too, where nobody who reads that much would
have it. So dynamic scaling is measured in passes over the first S tokens, S = trained, twice that,
and so on up to T; a position counts in the shortest pass that reaches it.
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

from btlm_jax.evaluation import context_extension
from btlm_jax.evaluation.batch_shapes import batch_shape
from btlm_jax.evaluation.context_extension import Kind
from btlm_jax.evaluation.long_windows import LongWindows
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.loss import token_predictions
from btlm_jax.model.params import Params
from btlm_jax.utils.progress import Progress

# Of the curve that is drawn: bins for each doubling of the position.
_PER_OCTAVE = 8


@dataclasses.dataclass(frozen=True)
class Curve:
    """Loss by position with one kind of scaling.

    Attributes:
      kind: of the scaling.
      passes: how many tokens the forward passes read, ascending; the last reads T.
      nll: float64 [T], the sums over all windows, in nats.
      squares: float64 [T], those of the squares.
      of_groups: float64 [groups, bins], the sums of each group in the bins of `edges`.
    """

    kind: Kind
    passes: tuple[int, ...]
    nll: np.ndarray
    squares: np.ndarray
    of_groups: np.ndarray


@dataclasses.dataclass(frozen=True)
class ByPosition:
    """Loss by position, with several kinds of scaling on the same windows.

    Attributes:
      trained: the trained length, in tokens.
      length: T.
      edges: int [bins + 1], where bins begin, from 0, and T; the trained length is one of them.
      windows: int [groups], how many windows are of each group.
      short: documents left out as shorter than T.
      curves: of each kind.
    """

    trained: int
    length: int
    edges: np.ndarray
    windows: np.ndarray
    short: int
    curves: tuple[Curve, ...]

    @property
    def count(self) -> int:
        """Windows, and so tokens at every position."""
        return int(self.windows.sum())


class Bin(NamedTuple):
    """The mean over the positions from `start` to before `stop`."""

    start: int
    stop: int
    mean: float  # nats per token
    error: float  # its standard error; NaN of a single group


def check_length(length: int, trained: int) -> None:
    """Raises ValueError if windows are no longer than what the model was trained on."""
    if length <= trained:
        raise ValueError(
            f"length: found {length}, expected more than the trained length of {trained}"
        )


def passes(kind: Kind, trained: int, length: int) -> tuple[int, ...]:
    """How many tokens the forward passes of a kind of scaling read, ascending."""
    if kind != "dynamic":
        return (length,)
    doublings = math.ceil(math.log2(max(1.0, length / trained)))
    return (*(trained << n for n in range(doublings)), length)


def bin_edges(trained: int, length: int) -> np.ndarray:
    """Bins that grow with the position, eight to a doubling. Returns ints [bins + 1]."""
    first = -_PER_OCTAVE * math.ceil(math.log2(trained))
    last = _PER_OCTAVE * math.ceil(math.log2(length / trained))
    found = np.rint(trained * 2.0 ** (np.arange(first, last + 1) / _PER_OCTAVE)).astype(int)
    return np.unique([0, *found[(found > 0) & (found < length)], length])


def read(
    model: BTLM, params: Params, ids: ArrayLike, targets: ArrayLike, length: ArrayLike
) -> jax.Array:
    """The loss of every target, fp32 [B, W], in one pass; neither [W, W] nor [W, V] is ever held.

    Args:
      ids, targets: int32 [B, W], of which only `length` are meant.
    """
    h, _ = model.hidden(params, ids, length=length)
    return token_predictions(model.runtime(params), params, h, targets).nll


def losses(
    model: BTLM, params: Params, inputs: np.ndarray, targets: np.ndarray, ends: Sequence[int]
) -> np.ndarray:
    """The loss of every token, fp32 [B, T], in a forward pass for each of `ends` (`passes`).

    Args:
      model: with the scaling that is measured.
      inputs, targets: int32 [B, T].
    """
    runtime, found, done = model.runtime(params), [], 0
    for end in ends:
        _, width = batch_shape(runtime, end, None, len(inputs))
        ids, labels = (np.pad(x[:, :end], ((0, 0), (0, width - end))) for x in (inputs, targets))
        nll = read(model, params, ids, labels, np.int32(end))
        found.append(np.asarray(nll)[:, done:end])
        done = end
    return np.concatenate(found, axis=1)


def loss_by_position(
    model: BTLM,
    params: Params,
    windows: LongWindows,
    *,
    trained: int,
    kinds: Sequence[Kind],
    batch_size: int | None = None,
) -> ByPosition:
    """Measures all kinds of scaling on the same windows; sums are of float64, on the host.

    Args:
      model, params: the model and its weights, on a device or a mesh, whose context axis splits
        windows.
      windows: are used up.
      trained: as from `extension.trained_length`.
      kinds: of scaling (`extension.scaled`).
      batch_size: windows at a time, over all devices; default about 8192 tokens on each.

    Raises:
      ValueError: a length that is not above the trained one, a batch that does not divide over the
        mesh, or a kind that the model cannot have.
      FloatingPointError: a loss that is not finite.
    """
    T = windows.length
    check_length(T, trained)
    edges = bin_edges(trained, T)
    models = {kind: context_extension.scaled(model, kind, trained, T) for kind in kinds}
    rows, _ = batch_shape(model.runtime(params), T, windows.most, batch_size)
    nll, squares = ({kind: np.zeros(T) for kind in kinds} for _ in range(2))
    of_groups: dict[Kind, dict[int, np.ndarray]] = {kind: {} for kind in kinds}
    seen: dict[int, int] = {}
    # How many there are shows when the documents end.
    note = f"at most {windows.most}" if windows.most else ""
    with Progress(None, "window", "evaluate") as progress:
        for some in iter(lambda: list(itertools.islice(windows, rows)), []):
            filled = some + some[-1:] * (rows - len(some))
            inputs, targets = (np.stack([w[i] for w in filled]) for i in range(2))
            for kind, used in models.items():
                found = losses(used, params, inputs, targets, passes(kind, trained, T))
                found = found[: len(some)].astype(np.float64)
                if not np.isfinite(found).all():
                    raise FloatingPointError(
                        f"scaling {kind!r}: found a loss of {found[~np.isfinite(found)][0]}, "
                        "expected numbers: are the weights finite, and the ids of the vocabulary? "
                        "float32 rules out that the computation overflows"
                    )
                nll[kind] += found.sum(0)
                squares[kind] += np.square(found).sum(0)
                for window, row in zip(some, found, strict=True):
                    sums = np.add.reduceat(row, edges[:-1])
                    of_groups[kind][window.group] = of_groups[kind].get(window.group, 0.0) + sums
            for window in some:
                seen[window.group] = seen.get(window.group, 0) + 1
            progress.update(len(some), note)
    curves = (
        Curve(kind, passes(kind, trained, T), nll[kind], squares[kind],
              np.stack([*of_groups[kind].values()]))
        for kind in kinds
    )  # fmt: skip
    counts = np.array([*seen.values()])
    return ByPosition(trained, T, edges, counts, windows.short, tuple(curves))


def binned(report: ByPosition, curve: Curve, edges: Sequence[int] | np.ndarray) -> list[Bin]:
    """Means over wider bins, with standard errors over groups.

    Neighbouring tokens are alike, and so are windows of a document or of a stream: what is
    independent is the groups, and of a single one there is no error. The mean is a ratio of their
    sums s and counts c, whose variance is, to first order,
    n / (n - 1) * sum((s - mean * c)^2) / sum(c)^2 (Cochran, Sampling Techniques, 1977, ch. 6).

    Args:
      edges: of the bins, some of `report.edges`.
    """
    at = np.searchsorted(report.edges, edges)
    found = []
    for a, b in itertools.pairwise(at):
        start, stop = int(report.edges[a]), int(report.edges[b])
        s, c = curve.of_groups[:, a:b].sum(1), report.windows * (stop - start)
        mean, n = s.sum() / c.sum(), len(c)
        error = math.nan
        if n > 1:
            error = math.sqrt(n / (n - 1) * np.square(s - mean * c).sum()) / c.sum()
        found.append(Bin(start, stop, float(mean), error))
    return found


def difference(curve: Curve, other: Curve) -> Curve:
    """`curve` - `other`, whose bins are means of differences on the same tokens.

    Documents differ by more than kinds of scaling do, and that cancels.
    """
    sums = {name: getattr(curve, name) - getattr(other, name) for name in ("nll", "of_groups")}
    return dataclasses.replace(curve, **sums, squares=np.full_like(curve.squares, np.nan))


def summary_edges(report: ByPosition) -> list[int]:
    """A few bins to print: octaves down to an eighth of the trained length, half octaves above."""
    below = (int(np.rint(report.trained / parts)) for parts in (8, 4, 2))
    above = report.edges[report.edges >= report.trained][:: _PER_OCTAVE // 2]
    return sorted({0, *below, *(int(x) for x in above), report.length})
