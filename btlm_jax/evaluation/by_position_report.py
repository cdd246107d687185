"""What `btlm eval loss-by-position` tells: a table, JSON, a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btlm_jax.evaluation.by_position import ByPosition, Curve, binned, difference, summary_edges
from btlm_jax.utils import plots

# Standard errors on either side of a mean that cover 95 % of a normal distribution.
_Z = 1.96
_STYLES = {"none": ("C0", "-"), "fixed": ("C1", "--"), "dynamic": ("C2", "-.")}
_LABELS = {"none": "plain ALiBi", "fixed": "fixed, distances / {factor:g}", "dynamic": "dynamic"}


def labels(report: ByPosition) -> list[str]:
    """What the curves are called."""
    factor = report.length / report.trained
    return [_LABELS[curve.kind].format(factor=factor) for curve in report.curves]


def table(report: ByPosition) -> list[str]:
    """Lines to print: nats per token in a few bins of positions, +- 1.96 standard errors; of all
    curves but the first their difference from it."""
    edges, (first, *others) = summary_edges(report), report.curves
    names = labels(report)
    heads = [names[0], *(f"{name} - {names[0]}" for name in names[1:])]
    columns = [binned(report, x, edges) for x in (first, *(difference(y, first) for y in others))]
    lines = [" ".join([f"{'positions':>13}", *(f"{head:>36}" for head in heads)])]
    for row in zip(*columns, strict=True):
        shown = [f"{row[0].mean:.4f}", *(f"{x.mean:+.4f}" for x in row[1:])]
        errors = ("" if math.isnan(x.error) else f" ± {_Z * x.error:.4f}" for x in row)
        cells = (f"{x + error:>36}" for x, error in zip(shown, errors, strict=True))
        lines.append(" ".join([f"{f'{row[0].start}-{row[0].stop - 1}':>13}", *cells]))
    return lines


def to_json(report: ByPosition) -> dict[str, Any]:
    """The same, the bins that are drawn, and every position, as objects for a file."""
    curves = []
    for curve, label in zip(report.curves, labels(report), strict=True):
        mean = curve.nll / report.count
        deviation = np.sqrt(np.maximum(curve.squares / report.count - mean**2, 0.0))
        curves.append({
            "scaling": curve.kind, "label": label, "passes": curve.passes,
            "nats_per_token": float(mean.mean()),
            "summary": _bins(report, curve, summary_edges(report)),
            "summary_of_difference": _bins(
                report, difference(curve, report.curves[0]), summary_edges(report)
            ),
            "bins": _bins(report, curve, report.edges),
            "mean": np.round(mean, 6).tolist(), "deviation": np.round(deviation, 6).tolist(),
        })  # fmt: skip
    return {
        "trained": report.trained, "length": report.length, "windows": report.count,
        "groups": len(report.windows), "short_documents": report.short,
        "curves": curves,
    }  # fmt: skip


def _bins(report: ByPosition, curve: Curve, edges: Sequence[int] | np.ndarray) -> list[dict]:
    return [
        x._asdict() | {"error": None if math.isnan(x.error) else x.error}
        for x in binned(report, curve, edges)
    ]


def draw(path: Path, report: ByPosition, title: str) -> None:
    """Draws the curves, and of all but the first the difference from it, from a sixteenth of the
    trained length on.

    Means of bins, eight to a doubling of the position, in bands of 1.96 standard errors over
    groups (`by_position.binned`); of a single group, without.
    """
    first, *others = report.curves
    made, panels = plots.new_figure(2 if others else 1, 1, (6, 4.2))
    names = dict(zip((curve.kind for curve in report.curves), labels(report), strict=True))
    drawn = [report.curves, [difference(curve, first) for curve in others]]
    for axes, curves in zip(panels[0], drawn, strict=False):
        for curve in curves:
            bins = [x for x in binned(report, curve, report.edges) if 16 * x.stop > report.trained]
            x = [(x.start + x.stop + 1) / 2 for x in bins]  # counted from 1, for the logarithm
            mean, error = (np.array([getattr(b, name) for b in bins]) for name in ("mean", "error"))
            color, style = _STYLES[curve.kind]
            axes.plot(x, mean, style, color=color, label=names[curve.kind])
            axes.fill_between(x, mean - _Z * error, mean + _Z * error, alpha=0.15, linewidth=0,
                              color=color)  # fmt: skip
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
        axes.axhline(0, color=_STYLES[first.kind][0], linewidth=1, label=names[first.kind])
        axes.legend()
        axes.set(ylabel=f"loss - that of {names[first.kind]} (nats per token)")
    made.suptitle(title, fontsize="medium")
    plots.save_png(path, made)
