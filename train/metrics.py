"""What a run reports: a line per step in a file, TensorBoard, and the note of the progress line."""

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

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Writes metrics; process 0 only. TensorBoard if tensorboardX is installed.

    Args:
      directory: of the run.
      step: the step from which it goes on; later lines, of a run that went further and was lost,
        are removed.
      recipe: as plain values, for Weights & Biases.
      wandb_project: its project; empty for none.
    """

    def __init__(
        self, directory: Path, step: int, recipe: Mapping[str, Any], wandb_project: str = ""
    ) -> None:
        self._file = self._board = self._wandb = None
        if jax.process_index() != 0:
            return
        path = directory / METRICS_FILE
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        fresh = path.with_name(f"{METRICS_FILE}.new")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(fresh, path)
        self._file = path.open("a", encoding="utf-8")
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            logger.info("no TensorBoard files: pip install 'btlm-jax[train]' brings tensorboardX")
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
            # Its own step cannot go back to a checkpoint; a metric can.
            self._wandb.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a line, and a point to every curve."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def close(self) -> None:
        """Ends files and reports; nothing can be written after."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def require_wandb() -> Any:
    """The wandb package.

    Raises:
      ValueError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ValueError(
            "run.wandb_project is set and wandb is not installed: pip install wandb, or unset it"
        ) from None


def _wandb_id(directory: Path) -> str:
    """The same for all calls that go on with a run."""
    file = directory / "wandb_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12])
    return file.read_text()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file; one cut short by a kill is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            logger.warning("%s: a line that was cut short is dropped", path)
    return lines


def loss_curves(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """The losses of a run, to draw: label -> (steps, nats per token)."""
    lines, found = read_metrics(run / METRICS_FILE), {}
    for name, label in (("loss", "training"), ("held_out_loss", "held out")):
        steps = [line["step"] for line in lines if name in line]
        if steps:
            found[label] = steps, [line[name] for line in lines if name in line]
    return found
