"""Reports of the coordinate check: a table with verdicts, JSON and a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from btlm_jax.mup_study.coord_check import FAULTS, LIMITS, CoordCheck
from btlm_jax.utils import plots


def coord_check_table(check: CoordCheck) -> Iterator[str]:
    """Yields lines of text: slopes by parametrization and curve, then the verdicts."""
    curves = list(LIMITS)
    yield f"{'slope of log2 size against log2 width':<40}" + "".join(f"{c:>18}" for c in curves)
    for name, by_curve in check.sizes.items():
        final, initial = ([check.slope(name, c, step) for c in by_curve] for step in (-1, 0))
        yield f"{name + ', change':<40}" + "".join(f"{x:>+18.2f}" for x in final)
        if name == "muP":
            yield f"{name + ', at the start':<40}" + "".join(f"{x:>+18.2f}" for x in initial)
    yield f"{'limit':<40}" + "".join(f"{LIMITS[c]:>18.2f}" for c in curves)
    yield ""
    yield from (line for _, line in coord_check_verdicts(check))


def coord_check_verdicts(check: CoordCheck) -> Iterator[tuple[bool, str]]:
    """Yields (whether the check succeeds, a line that says so) for each parametrization.

    muP must pass, and every broken rule must fail.
    """
    for name in check.sizes:
        steepest = max(LIMITS, key=lambda c: abs(check.slope(name, c)) / LIMITS[c])
        slope = f"steepest {steepest} {check.slope(name, steepest):+.2f}"
        if name == "muP":
            good = check.passes(name)
            verdict = "passes" if good else "FAILS, but should pass"
        else:
            good = check.detects(name)
            least, curves = FAULTS[name]
            verdict = "fails, as it should" if good else (
                f"is NOT DETECTED: expected a change of at least {least} in {', '.join(curves)}"
            )  # fmt: skip
        yield good, f"{name}: {verdict} ({slope})"


def coord_check_numbers(check: CoordCheck) -> dict[str, Any]:
    """Returns all measurements and verdicts as values that JSON can hold."""
    curves = {
        p: {
            c: {"slope": check.slope(p, c), "limit": n, "passes": abs(check.slope(p, c)) <= n}
            for c, n in LIMITS.items()
        }
        for p in check.sizes
    }
    successes = [success for success, _ in coord_check_verdicts(check)]
    return {
        "widths": list(check.widths),
        "verdicts": curves,
        "faults": {p: {"least": n, "in": list(shown)} for p, (n, shown) in FAULTS.items()},
        "slopes_at_start": {p: {c: check.slope(p, c, 0) for c in LIMITS} for p in check.sizes},
        "as_it_must": dict(zip(check.sizes, successes, strict=True)),
        "sizes": {p: {c: x.tolist() for c, x in s.items()} for p, s in check.sizes.items()},
        "losses": {p: x.tolist() for p, x in check.losses.items()},
    }


def draw_coord_check(path: Path, check: CoordCheck) -> None:
    """Draws a row of panels per parametrization: change against width, one line per step."""
    from matplotlib import colormaps

    names, curves = list(check.sizes), list(LIMITS)
    figure, panels = plots.new_figure(len(curves), len(names), size=(2.6, 2.1))
    for row, name in zip(panels, names, strict=True):
        for axes, curve in zip(row, curves, strict=True):
            size = check.sizes[name][curve].mean(0)
            for i in range(1, len(size)):
                color = colormaps["viridis"]((i - 1) / max(len(size) - 2, 1))
                axes.plot(check.widths, size[i], color=color, linewidth=1.2)
            slope = check.slope(name, curve)
            good = abs(slope) <= LIMITS[curve]
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
        "after the last; red: steeper than the limit of muP", fontsize=11,
    )  # fmt: skip
    plots.save_png(path, figure, dpi=90)  # a page of panels would be more than a megabyte
