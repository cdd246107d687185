"""Pictures as PNG (needs matplotlib, extra `plot`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def require_matplotlib() -> None:
    """Raises ValueError if matplotlib is missing; call it before long work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib: pip install 'btlm-jax[plot]'")


def new_figure(columns: int = 1, rows: int = 1, size: tuple[float, float] = (7, 4.2)) -> Any:
    """An empty figure of rows x columns panels, each of `size` inches; never a window.

    Returns:
      The matplotlib figure and its axes, [rows, columns].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, squeeze=False)


def save_png(path: Path, figure: Any, dpi: int = 150) -> None:
    """Writes a figure as PNG, with so many pixels for each inch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)


def draw_level(axes: Any, value: float, label: str) -> None:
    """A dashed line across, to compare with."""
    axes.axhline(value, color="gray", linestyle="--", linewidth=1)
    axes.annotate(
        f"{label} {value:.2f}", (1, value), (-4, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", color="gray",
    )  # fmt: skip


def draw_loss_curve(
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
    made, panels = new_figure()
    axes = panels[0, 0]
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    for label, (steps, losses) in curves.items():
        few = len(steps) < 40
        axes.plot(steps, losses, marker="o" if few else None, markersize=4, label=label)
    for label, value in levels.items():
        draw_level(axes, value, label)
    axes.grid(alpha=0.3)
    axes.legend()
    save_png(path, made)
