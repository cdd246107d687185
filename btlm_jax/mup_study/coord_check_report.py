"""Reports of the coordinate check: a table with verdicts, JSON and a plot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from btlm_jax.mup_study.coord_check import CURVES, CoordCheck, allowed_slopes
from btlm_jax.mup_study.slope_test import ERROR_RATE
from btlm_jax.utils import plots
from btlm_jax.utils.format import finite_json


def coord_check_table(check: CoordCheck) -> Iterator[str]:
    """Yields lines of text: slopes by parametrization and curve, then the verdicts."""
    yield f"{'slope of log2 size against log2 width':<40}" + "".join(f"{c:>18}" for c in CURVES)
    for step, said in ((0, "at the start"), (-1, "change")):
        for name in check.sizes:
            slopes = (check.fit(name, c, step).slope for c in CURVES)
            yield f"{f'{name}, {said}':<40}" + "".join(f"{x:>+18.2f}" for x in slopes)
        allowed = (allowed_slopes(c, step) for c in CURVES)
        limits = (f"{low:+.2f} to {high:+.2f}" for low, high in allowed)
        yield f"{f'allowed, {said}':<40}" + "".join(f"{x:>18}" for x in limits)
    yield ""
    yield from coord_check_verdicts(check)


def coord_check_verdicts(check: CoordCheck) -> Iterator[str]:
    """Yields a line with the verdict on each parametrization, and one on the check as a whole."""
    for name in check.sizes:
        verdict = check.verdict(name)
        if name == "muP":
            said = {"passes": "passes", "fails": "FAILS", "undecided": "UNDECIDED"}[verdict]
        else:
            said = "fails, as it should" if verdict == "fails" else "is NOT DETECTED"
        yield f"{name}: {said} ({_decisive(check, name)})"
    outcome = check.outcome()
    if outcome == "undecided":
        yield (
            "undecided: the noise is too large, or a broken rule does not show. Measure more: "
            f"--seeds {2 * check.seeds} or more, a further width after {check.widths[-1]}; or "
            "make the slopes clearer: fewer tokens (--batch-size, --length), --learning-rate near "
            "the best one"
        )


def _decisive(check: CoordCheck, name: str) -> str:
    """Describes the slope that decides the verdict: the furthest from its limits."""
    verdict = check.verdict(name)

    def outside(key):
        fit, (low, high) = check.fit(name, *key), allowed_slopes(*key)
        if not math.isfinite(fit.slope):
            return math.inf
        if verdict == "undecided":
            return min(fit.margin(ERROR_RATE), 1e9) + max(fit.slope - high, low - fit.slope)
        return max(fit.slope - high, low - fit.slope)

    candidates = [key for key, found in check.verdicts(name).items() if found == verdict]
    curve, step = max(candidates, key=outside)
    fit, (low, high) = check.fit(name, curve, step), allowed_slopes(curve, step)
    when = "change of " if step else "initial "
    if fit.slope == math.inf:
        return f"{when}{curve}: a wider model diverged"
    if math.isnan(fit.slope):
        return f"{when}{curve}: it did not change, or diverged at the base width"
    error = f"± {fit.margin(ERROR_RATE):.2f}" if fit.degrees else "from one measurement"
    return f"{when}{curve} {fit.slope:+.2f} {error}, allowed {low:+.2f} to {high:+.2f}"


def coord_check_numbers(check: CoordCheck) -> dict[str, Any]:
    """Returns all measurements and verdicts as values that JSON can hold."""

    def slopes(name: str, step: int) -> dict[str, Any]:
        verdicts = check.verdicts(name)
        return {
            curve: {
                **check.fit(name, curve, step)._asdict(),
                "allowed": list(allowed_slopes(curve, step)),
                "verdict": verdicts[curve, step],
            }
            for curve in CURVES
        }

    return finite_json({
        "widths": list(check.widths),
        "outcome": check.outcome(),
        "verdicts": {p: check.verdict(p) for p in check.sizes},
        "at_start": {p: slopes(p, 0) for p in check.sizes},
        "change": {p: slopes(p, -1) for p in check.sizes},
        "sizes": {p: {c: x.tolist() for c, x in s.items()} for p, s in check.sizes.items()},
        "losses": {p: x.tolist() for p, x in check.losses.items()},
    })  # fmt: skip


def draw_coord_check(path: Path, check: CoordCheck) -> None:
    """Draws a row of panels per parametrization: change against width, one line per step."""
    from matplotlib import colormaps

    names, curves = list(check.sizes), CURVES
    figure, panels = plots.new_figure(len(curves), len(names), size=(2.6, 2.1))
    for row, name in zip(panels, names, strict=True):
        verdicts = check.verdicts(name)
        for axes, curve in zip(row, curves, strict=True):
            size = check.sizes[name][curve].mean(0)
            for i in range(1, len(size)):
                color = colormaps["viridis"]((i - 1) / max(len(size) - 2, 1))
                axes.plot(check.widths, size[i], color=color, linewidth=1.2)
            slope, good = check.fit(name, curve).slope, verdicts[curve, -1] != "fails"
            axes.set_title(f"{curve} {slope:+.2f}", fontsize=9, color="black" if good else "C3")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(check.widths, [str(w) for w in check.widths], fontsize=7)
            axes.tick_params(axis="y", labelsize=7)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"{name}\nmean |change|", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("width", fontsize=8)
    steps = len(next(iter(check.sizes[names[0]].values()))[0]) - 1
    figure.suptitle(
        f"Coordinate check: mean |change| after steps 1 (dark) to {steps} (light), and its slope "
        "after the last; red: outside what muP predicts", fontsize=11,
    )  # fmt: skip
    plots.save_png(path, figure, dpi=90)  # a page of panels would be more than a megabyte
