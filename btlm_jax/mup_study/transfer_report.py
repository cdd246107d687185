"""Reports of a learning-rate transfer: a table with verdicts, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from btlm_jax.mup_study.slope_test import ERROR_RATE, SlopeFit
from btlm_jax.mup_study.transfer_result import (
    COMPARED,
    MUP_REGRET,
    OCTAVES,
    SP_REGRET,
    SP_WIDTH,
    Transfer,
)
from btlm_jax.utils import atomic, plots
from btlm_jax.utils.format import finite_json


def transfer_table(sweep: Transfer) -> Iterator[str]:
    """Yields lines of text: optima, best losses and regrets, then the verdicts."""
    yield f"{'':<16}" + "".join(f"{w:>10}" for w in sweep.widths)
    for name in COMPARED:
        optima, best = zip(*(sweep.optimum(name, w) for w in sweep.widths), strict=True)
        regrets = [sweep.regret(name, w) for w in sweep.widths]
        yield f"{name + ': log2 rate':<16}" + "".join(f"{x:>10.2f}" for x in optima)
        yield f"{'  best loss':<16}" + "".join(f"{x:>10.3f}" for x in best)
        yield f"{'  regret':<16}" + "".join(f"{x:>10.3f}" for x in regrets)
    yield ""
    yield from transfer_verdicts(sweep)


def transfer_verdicts(sweep: Transfer) -> Iterator[str]:
    """Yields a line with the verdict on muP, one on SP, and what to do if nothing is decided.

    The learning rate must transfer under muP and must not transfer under SP.
    """
    wide, base = sweep.widths[1:], sweep.widths[0]
    regret = max(sweep.regret("muP", w) for w in wide)
    said = {
        "passes": "transfers", "fails": "DOES NOT TRANSFER", "undecided": "is UNDECIDED",
    }[sweep.verdict()]  # fmt: skip
    yield (
        f"muP {said}: the optimum moves by {_octaves(sweep.octaves('muP'))} octaves per doubling "
        f"(at most {OCTAVES}), the base's costs {regret:.3f} nats (at most {MUP_REGRET})"
    )
    differs = sweep.sp_differs()
    if differs is None:
        yield f"SP: not judged, which needs {SP_WIDTH} times the base width ({SP_WIDTH * base})"
    else:
        far = next(w for w in wide if w >= SP_WIDTH * base)
        said = "does not transfer, as expected" if differs else "IS TOO CLOSE TO MUP to distinguish"
        yield (
            f"SP {said}: {_octaves(sweep.octaves('SP'))} octaves per doubling (more than {OCTAVES} "
            f"downwards), {sweep.regret('SP', far):.3f} nats at {far / base:.3g} times the width "
            f"(at least {SP_REGRET})"
        )
    if sweep.outcome() == "undecided":
        yield (
            "undecided: the noise is too large, or SP does not differ. In a new directory, measure "
            f"more: --seeds {2 * len(sweep.seeds)} or more, further --widths, more --steps"
        )


def _octaves(fit: SlopeFit) -> str:
    margin = f"± {fit.margin(ERROR_RATE):.2f}" if fit.degrees else "(one measurement)"
    return f"{fit.slope:+.2f} {margin}"


def transfer_numbers(sweep: Transfer) -> dict[str, Any]:
    """Returns the results as values that JSON can hold."""
    return {
        name: {
            "octaves_per_doubling": sweep.octaves(name).slope,
            "standard_error": sweep.octaves(name).error,
            "widths": {
                str(w): {
                    "log2_optimum": sweep.optimum(name, w)[0],
                    "best_loss": sweep.optimum(name, w)[1],
                    "regret": sweep.regret(name, w),
                    "loss": {str(e): x for e, x in sweep.curve(name, w).items()},
                }
                for w in sweep.widths
            },
        }
        for name in COMPARED
    }


def write_transfer(directory: Path, settings: dict[str, Any], sweep: Transfer) -> None:
    """Writes `transfer.json` and `transfer.png` into the directory of a sweep."""
    report = finite_json(
        {"settings": settings, "outcome": sweep.outcome(), **transfer_numbers(sweep)}
    )
    atomic.write_text(epath.Path(directory / "transfer.json"), json.dumps(report, indent=2) + "\n")
    draw_transfer(directory / "transfer.png", sweep)


def draw_transfer(path: Path, sweep: Transfer) -> None:
    """Draws loss against learning rate, a line per width, and the optimum against the width."""
    from matplotlib import colormaps

    figure, panels = plots.new_figure(3, 1, size=(4.6, 3.8))
    count = len(sweep.widths)
    for axes, name in zip(panels[0], COMPARED, strict=False):
        for i, width in enumerate(sweep.widths):
            curve, color = sweep.curve(name, width), colormaps["viridis"](i / count)
            rates = [2.0**e for e in curve]
            axes.plot(rates, [*curve.values()], "o-", color=color, markersize=3, label=f"{width}")
            axes.axvline(2.0 ** sweep.optimum(name, width)[0], color=color, alpha=0.5, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="learning rate", ylabel="held-out loss (nats per token)", title=name)
        axes.grid(alpha=0.3)
        axes.legend(title="width", fontsize=8)
    for limits in ("xlim", "ylim"):
        both = [getattr(axes, f"get_{limits}")() for axes in panels[0][:2]]
        for axes in panels[0][:2]:
            getattr(axes, f"set_{limits}")(min(x[0] for x in both), max(x[1] for x in both))
    axes = panels[0][2]
    for name in COMPARED:
        optima = [2.0 ** sweep.optimum(name, w)[0] for w in sweep.widths]
        label = f"{name}: {sweep.octaves(name).slope:+.2f} octaves per doubling"
        axes.plot(sweep.widths, optima, "o-", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sweep.widths, [str(w) for w in sweep.widths])
    axes.set(xlabel="width", ylabel="best learning rate", title="optimum against width")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    plots.save_png(path, figure)
