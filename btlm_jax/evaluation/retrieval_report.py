"""Reports of `btlm eval retrieval`: lines, JSON and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from btlm_jax.evaluation.retrieval import RetrievalOutcome
from btlm_jax.evaluation.retrieval_texts import RetrievalTask
from btlm_jax.utils import plots


def format_retrieval(task: RetrievalTask, outcome: RetrievalOutcome) -> str:
    """Returns one line about an outcome."""
    sizes = sorted({p.size for p in outcome.prompts})
    tokens = max(len(p.ids) for p in outcome.prompts)
    size_range = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"
    low, high = outcome.interval
    return (
        f"{outcome.scaling:<8} {outcome.length:>7,} tokens ({size_range} {task}, up to "
        f"{tokens:,}): {sum(outcome.correct)} of {len(outcome.correct)} right, "
        f"{outcome.accuracy:.0%} ({low:.0%} to {high:.0%})"
    )


def retrieval_json(outcomes: Sequence[RetrievalOutcome]) -> list[dict[str, Any]]:
    """Returns outcomes as JSON objects, with every answer."""
    return [
        {
            "scaling": x.scaling, "length": x.length, "samples": len(x.correct),
            "right": sum(x.correct), "accuracy": x.accuracy, "interval": list(x.interval),
            "answers": [
                {"tokens": len(p.ids), "size": p.size, "expected": p.text.answer, "found": a,
                 "right": correct}
                for p, a, correct in zip(x.prompts, x.answers, x.correct, strict=True)
            ],
        }
        for x in outcomes
    ]  # fmt: skip


def plot_retrieval(
    path: Path, outcomes: Sequence[RetrievalOutcome], trained: int, title: str
) -> None:
    """Plots accuracy against length, with Wilson intervals."""
    figure, panels = plots.new_figure()
    axes = panels[0, 0]
    kinds = list(dict.fromkeys(x.scaling for x in outcomes))
    for i, kind in enumerate(kinds):
        curve = sorted((x for x in outcomes if x.scaling == kind), key=lambda x: x.length)
        # Shifted by 2 %, because equal points would cover each other.
        lengths = [x.length * 1.02 ** (i - (len(kinds) - 1) / 2) for x in curve]
        below = [x.accuracy - x.interval[0] for x in curve]
        above = [x.interval[1] - x.accuracy for x in curve]
        mean = [x.accuracy for x in curve]
        label = f"scaling: {kind}"
        axes.errorbar(lengths, mean, [below, above], marker="o", capsize=3, label=label)
    axes.axvline(trained, color="gray", linestyle=":", linewidth=1.2, label="trained length")
    axes.set(
        xlabel="tokens of the prompt",
        ylabel="accuracy (95 % intervals)",
        title=title,
        ylim=(-0.03, 1.03),
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    plots.save_png(path, figure)
