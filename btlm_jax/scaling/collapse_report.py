"""Report and figure of runs compared with their family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from btlm_jax.scaling import collapse
from btlm_jax.scaling.collapse import CollapseVerdict, CurveFamily, LossCurve, LossEstimate
from btlm_jax.utils import plots

_SMOOTH = 5  # bins in the moving average of the residuals in the figure


class JudgedRun(NamedTuple):
    """A run compared with its family.

    Attributes:
      final: the final loss, measured for a finished run and predicted for a running one. The
        standard deviation is that of noise; for a prediction, that of `backtest_family` if larger.
      predicted: the prediction of the family from the run's first half; None without other runs.
      verdict: whether the run stays in the family; None without other runs.
      residuals: float64 [bins], log(loss / loss of the family); NaN where unknown.
      finished: whether the run has ended.
      member: whether the run belongs to the family.
    """

    final: LossEstimate | None
    predicted: LossEstimate | None
    verdict: CollapseVerdict | None
    residuals: np.ndarray
    finished: bool
    member: bool


class CollapseReport(NamedTuple):
    """The comparison of several runs.

    Attributes:
      family: the family, fitted to all members.
      backtest: root mean square of the relative errors of predictions from first halves; None for
        a family of one.
      runs: every run by name.
    """

    family: CurveFamily
    backtest: float | None
    runs: dict[str, JudgedRun]


def judge_runs(
    finished: Mapping[str, LossCurve], running: Mapping[str, LossCurve]
) -> CollapseReport:
    """Compares every run with the family of the finished ones, finished runs with the others.

    Args:
      finished: curves of finished runs, by name.
      running: curves of running runs, by name. Runs that are too short to be compared get neither
        a prediction nor a verdict.

    Raises:
      ValueError: no finished run, or losses that are logged too rarely.
    """
    if not finished:
        raise ValueError("runs: found no finished one, expected one or more to compare with")
    bins = collapse.choose_bins([*finished.values(), *running.values()])
    names, curves = list(finished), list(finished.values())
    indices = collapse.family_members(curves, bins)
    members = [curves[i] for i in indices]
    family = collapse.fit_family(members, bins)
    backtest = None
    if len(members) > 1:
        backtest = float(np.sqrt(np.mean(np.square(collapse.backtest_family(members, bins)))))
    judged = {}
    for i, (name, curve) in enumerate(zip(names, curves, strict=True)):
        others = [curves[j] for j in indices if j != i]
        final = collapse.final_loss(curve, bins)
        residuals = np.full(bins, np.nan)
        predicted = verdict = None
        if others:
            rest = collapse.fit_family(others, bins)
            predicted, residuals = collapse.align_curve(rest, curve)
            verdict = collapse.monitor_curve(rest, curve)
        judged[name] = JudgedRun(final, predicted, verdict, residuals, True, i in indices)
    for name, curve in running.items():
        try:
            predicted, residuals = collapse.align_curve(family, curve)
        except collapse.TooEarlyError:
            judged[name] = JudgedRun(None, None, None, np.full(bins, np.nan), False, False)
            continue
        std = max(predicted.std, (backtest or 0.0) * predicted.loss)
        predicted = LossEstimate(predicted.loss, std)
        verdict = collapse.monitor_curve(family, curve)
        judged[name] = JudgedRun(predicted, predicted, verdict, residuals, False, False)
    return CollapseReport(family, backtest, judged)


def collapse_numbers(report: CollapseReport) -> dict[str, Any]:
    """Returns the report as plain values, for a JSON file."""
    return {
        "family": {
            "runs": report.family.runs,
            "noise_of_a_bin": report.family.noise,
            "shape": report.family.shape.tolist(),
            "backtest": report.backtest,
        },
        "runs": {
            name: {
                "finished": j.finished,
                "member": j.member,
                "final": j.final and j.final._asdict(),
                "predicted_from_first_half": j.predicted and j.predicted._asdict(),
                "verdict": j.verdict and j.verdict._asdict(),
                "residuals": [None if np.isnan(r) else float(r) for r in j.residuals],
            }
            for name, j in report.runs.items()
        },
    }


def draw_collapse(path: Path, report: CollapseReport, curves: Mapping[str, LossCurve]) -> None:
    """Draws the aligned curves, and their residuals from the family, as a PNG file."""
    bins = len(report.family.shape)
    t = 100 * collapse.bin_centers(bins)
    shown = t > 100 * collapse.IGNORED
    figure, panels = plots.new_figure(columns=2)
    left, right = panels[0]
    left.set(
        xlabel="% of training", ylabel="loss / final loss", title="Aligned curves",
        xlim=(100 * collapse.IGNORED, 100),
    )  # fmt: skip
    right.set(
        xlabel="% of training", ylabel="loss relative to the family (%)", title="Residuals",
        xlim=(100 * collapse.IGNORED, 100),
    )  # fmt: skip
    left.plot(
        t[shown], np.exp(report.family.shape[shown]), color="black", linewidth=3, alpha=0.25,
        label=f"family of {report.family.runs}",
    )  # fmt: skip
    band = 200 * report.family.noise * np.sqrt((1 + 1 / report.family.runs) / _SMOOTH)
    right.axhspan(-band, band, color="gray", alpha=0.2, label="noise, two standard deviations")
    for i, (name, judged) in enumerate(report.runs.items()):
        level = judged.predicted or judged.final
        if level is None:
            continue
        style: dict[str, Any] = {"color": f"C{i % 10}", "linewidth": 1 if judged.finished else 2}
        y = collapse.bin_curve(curves[name], bins)
        ratio = np.exp(y - np.log(level.loss))
        label = name if judged.finished else f"{name} (running)"
        left.plot(t[shown], ratio[shown], label=label, **style)
        right.plot(t, 100 * _smoothed(judged.residuals), label=label, **style)
        if judged.verdict and judged.verdict.left_at is not None:
            for axes in (left, right):
                axes.axvline(100 * judged.verdict.left_at, color=style["color"], linestyle=":")
            right.annotate(
                f"leaves at {judged.verdict.left_at:.0%}", (100 * judged.verdict.left_at, 0.02),
                (3, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                color=style["color"],
            )  # fmt: skip
    for axes in (left, right):
        axes.axvspan(*(100 * np.array(collapse.WINDOW)), color="C0", alpha=0.06, zorder=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    left.annotate(
        "aligned\nin this part", (100 * sum(collapse.WINDOW) / 2, 0.03), color="gray",
        xycoords=("data", "axes fraction"), ha="center", fontsize="small",
    )  # fmt: skip
    plots.save_png(path, figure)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Returns the moving average over `_SMOOTH` values; NaN where some are missing."""
    wide = np.pad(values, _SMOOTH // 2, constant_values=np.nan)
    return np.lib.stride_tricks.sliding_window_view(wide, _SMOOTH).mean(-1)
