"""Pictures of training, as PNG (needs matplotlib, extra `plot`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path


def require_matplotlib() -> None:
    """Raises ValueError if matplotlib is missing; call it before long work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the loss curve needs matplotlib: pip install 'btlm-jax[plot]'")


def loss_curve(
    path: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    levels: Mapping[str, float],
    title: str,
) -> None:
    """Draws loss against step.

    Args:
      path: the PNG to write.
      curves: label -> (steps, nats per token).
      levels: label -> a constant to compare with.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title=title)
    for label, (steps, losses) in curves.items():
        few = len(steps) < 40
        axes.plot(steps, losses, marker="o" if few else None, markersize=4, label=label)
    for label, value in levels.items():
        axes.axhline(value, color="gray", linestyle="--", linewidth=1)
        axes.annotate(
            f"{label} {value:.2f}", (1, value), (-4, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", color="gray",
        )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
