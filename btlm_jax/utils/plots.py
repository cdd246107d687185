"""Plots as PNG files (requires matplotlib, extra `plot`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from btlm_jax.utils.local_paths import local_path


def require_matplotlib() -> None:
    """Raises ValueError if matplotlib is not installed; call it before long work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install 'btlm-jax[plot]'")


def new_figure(columns: int = 1, rows: int = 1, size: tuple[float, float] = (7, 4.2)) -> Any:
    """Creates a figure of rows x columns panels, each of `size` inches, without opening a window.

    Returns:
      The matplotlib figure and its axes, [rows, columns].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_png(path: Path, figure: Any, dpi: int = 150) -> None:
    """Writes a figure as PNG with `dpi` pixels per inch; creates the directory if needed."""
    path = local_path(path, "path")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)


def draw_level(axes: Any, value: float, label: str) -> None:
    """Draws a dashed horizontal line at `value` as a baseline."""
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
    """Draws loss against step and writes the plot.

    Args:
      path: the PNG file to write.
      curves: label -> (steps, nats per token).
      levels: label -> constant loss of a baseline.
      title: shown above the plot.
    """
    figure, panels = new_figure()
    axes = panels[0, 0]
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    for label, (steps, losses) in curves.items():
        marker = "o" if len(steps) < 40 else None
        axes.plot(steps, losses, marker=marker, markersize=4, label=label)
    for label, value in levels.items():
        draw_level(axes, value, label)
    axes.grid(alpha=0.3)
    axes.legend()
    save_png(path, figure)
