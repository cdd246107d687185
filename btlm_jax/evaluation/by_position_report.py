"""Reports of `btlm eval loss-by-position`: a table, JSON and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btlm_jax.evaluation.by_position import (
    LossByPosition,
    PositionCurve,
    bin_means,
    curve_difference,
    summary_edges,
)
from btlm_jax.utils import plots

# Standard errors on either side of a mean that cover 95 % of a normal distribution.
_Z = 1.96
_STYLES = {"none": ("C0", "-"), "fixed": ("C1", "--"), "dynamic": ("C2", "-.")}
_LABELS = {"none": "plain ALiBi", "fixed": "fixed, distances / {factor:g}", "dynamic": "dynamic"}


def curve_labels(report: LossByPosition) -> list[str]:
    """Returns the label of each curve."""
    factor = report.length / report.trained
    return [_LABELS[curve.kind].format(factor=factor) for curve in report.curves]


def format_loss_by_position(report: LossByPosition) -> list[str]:
    """Returns a table, as lines: nats per token in a few bins, ± 1.96 standard errors.

    All curves but the first are shown as their difference from the first.
    """
    edges, (first, *others) = summary_edges(report), report.curves
    labels = curve_labels(report)
    headers = [labels[0], *(f"{label} - {labels[0]}" for label in labels[1:])]
    shown_curves = (first, *(curve_difference(curve, first) for curve in others))
    columns = [bin_means(report, curve, edges) for curve in shown_curves]
    lines = [" ".join([f"{'positions':>13}", *(f"{header:>36}" for header in headers)])]
    for row in zip(*columns, strict=True):
        means = [f"{row[0].mean:.4f}", *(f"{x.mean:+.4f}" for x in row[1:])]
        errors = ("" if math.isnan(x.error) else f" ± {_Z * x.error:.4f}" for x in row)
        cells = (f"{mean + error:>36}" for mean, error in zip(means, errors, strict=True))
        lines.append(" ".join([f"{f'{row[0].start}-{row[0].stop - 1}':>13}", *cells]))
    return lines


def loss_by_position_json(report: LossByPosition) -> dict[str, Any]:
    """Returns the table, the plotted bins and every position as JSON objects."""
    curves = []
    for curve, label in zip(report.curves, curve_labels(report), strict=True):
        mean = curve.nll / report.count
        deviation = np.sqrt(np.maximum(curve.squares / report.count - mean**2, 0.0))
        difference = curve_difference(curve, report.curves[0])
        curves.append({
            "scaling": curve.kind, "label": label, "passes": curve.passes,
            "nats_per_token": float(mean.mean()),
            "summary": _bins_json(report, curve, summary_edges(report)),
            "summary_of_difference": _bins_json(report, difference, summary_edges(report)),
            "bins": _bins_json(report, curve, report.edges),
            "mean": np.round(mean, 6).tolist(), "deviation": np.round(deviation, 6).tolist(),
        })  # fmt: skip
    return {
        "trained": report.trained, "length": report.length, "windows": report.count,
        "groups": len(report.windows), "short_documents": report.short_documents,
        "curves": curves,
    }  # fmt: skip


def _bins_json(
    report: LossByPosition, curve: PositionCurve, edges: Sequence[int] | np.ndarray
) -> list[dict]:
    return [
        x._asdict() | {"error": None if math.isnan(x.error) else x.error}
        for x in bin_means(report, curve, edges)
    ]


def plot_loss_by_position(path: Path, report: LossByPosition, title: str) -> None:
    """Plots the curves, and the difference of all but the first from the first.

    Shows means of bins, eight per doubling of the position, from a sixteenth of the trained length
    on, in bands of 1.96 standard errors over groups (`bin_means`); without bands if there is a
    single group.
    """
    first, *others = report.curves
    figure, panels = plots.new_figure(2 if others else 1, 1, (6, 4.2))
    labels = dict(zip((curve.kind for curve in report.curves), curve_labels(report), strict=True))
    panel_curves = [report.curves, [curve_difference(curve, first) for curve in others]]
    for axes, curves in zip(panels[0], panel_curves, strict=False):
        for curve in curves:
            _plot_curve(axes, report, curve, labels[curve.kind])
        axes.axvline(report.trained, color="gray", linestyle=":", linewidth=1.2)
        axes.annotate("trained length", (report.trained, 0.97), (-4, 0), rotation=90, va="top",
                      ha="right", xycoords=("data", "axes fraction"), textcoords="offset points",
                      color="gray")  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.set(xlabel="position (tokens read)", ylabel="loss (nats per token)")
    panels[0, 0].legend()
    if others:
        axes = panels[0, 1]
        axes.axhline(0, color=_STYLES[first.kind][0], linewidth=1, label=labels[first.kind])
        axes.legend()
        axes.set(ylabel=f"loss - that of {labels[first.kind]} (nats per token)")
    figure.suptitle(title, fontsize="medium")
    plots.save_png(path, figure)


def _plot_curve(axes: Any, report: LossByPosition, curve: PositionCurve, label: str) -> None:
    bins = [x for x in bin_means(report, curve, report.edges) if 16 * x.stop > report.trained]
    x = [(b.start + b.stop + 1) / 2 for b in bins]  # counted from 1, for the logarithm
    mean, error = (np.array([getattr(b, name) for b in bins]) for name in ("mean", "error"))
    color, style = _STYLES[curve.kind]
    axes.plot(x, mean, style, color=color, label=label)
    axes.fill_between(x, mean - _Z * error, mean + _Z * error, alpha=0.15, linewidth=0, color=color)
