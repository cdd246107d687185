"""Metrics of a run on disk: a line of JSON per step, TensorBoard, and Weights & Biases."""

from __future__ import annotations

import importlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from btlm_jax.utils import plots

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Writes metrics, in process 0 only. TensorBoard files need tensorboardX.

    Args:
      directory: the run directory.
      step: step at which the run starts or resumes. Later lines, of a run that went further but
        lost its checkpoint, are removed.
      recipe: the recipe as plain values, for Weights & Biases.
      wandb_project: project of Weights & Biases; empty for none.
    """

    def __init__(
        self, directory: Path, step: int, recipe: Mapping[str, Any], wandb_project: str = ""
    ) -> None:
        self._file = self._board = self._wandb = None
        if jax.process_index() != 0:
            return
        path = directory / METRICS_FILE
        valid = [line for line in read_metrics(path) if line["step"] <= step]
        rewritten = path.with_name(f"{METRICS_FILE}.new")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in valid))
        os.replace(rewritten, path)
        self._file = path.open("a", encoding="utf-8")
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            logger.info("no TensorBoard files: pip install 'btlm-jax[train]' installs tensorboardX")
        else:
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step)
        if wandb_project:
            self._wandb = require_wandb().init(
                project=wandb_project,
                name=directory.name,
                id=_wandb_id(directory),
                resume="allow",
                dir=str(directory),
                config=dict(recipe),
            )
            # wandb's own step cannot return to that of a checkpoint; a metric can.
            self._wandb.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a line, and a point on every curve."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def close(self) -> None:
        """Closes files and the wandb run; nothing can be written afterwards."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def require_wandb() -> Any:
    """Returns the wandb package.

    Raises:
      ValueError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ValueError(
            "run.wandb_project is set and wandb is not installed: pip install wandb, or unset it"
        ) from None


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Returns the lines of a metrics file, without a line that a kill truncated."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            logger.warning("%s: dropped a truncated line", path)
    return lines


def latest_metrics(path: Path) -> dict[str, float]:
    """Returns the newest value of every metric in a metrics file."""
    latest: dict[str, float] = {}
    for line in read_metrics(path):
        latest |= line
    return latest


def loss_curves(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Returns the losses of a run, to plot: label -> (steps, nats per token)."""
    lines, curves = read_metrics(run / METRICS_FILE), {}
    for name, label in (("loss", "training"), ("held_out_loss", "held out")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            steps, losses = zip(*points, strict=True)
            curves[label] = list(steps), list(losses)
    return curves


def draw_loss_curves(run: Path) -> None:
    """Draws the losses of a run into its `loss.png`; warns if matplotlib is not installed."""
    try:
        plots.require_matplotlib()
    except ValueError as e:
        logger.warning("%s", e)
        return
    if curves := loss_curves(run):
        plots.draw_loss_curve(run / "loss.png", curves, {}, run.name)


def _wandb_id(directory: Path) -> str:
    """Returns the id of the run, the same whenever the run is resumed."""
    file = directory / "wandb_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12])
    return file.read_text()
