"""Metrics of a run: a line of JSON per step, TensorBoard, Weights & Biases, and the loss curve.

All of them are side outputs: a full disk or an unreachable server costs curves, not the run.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import math
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from btlm_jax.utils import plots, side_output
from btlm_jax.utils.format import join_first
from btlm_jax.utils.local_paths import local_path
from btlm_jax.utils.side_output import SideOutput

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"

_MOST_WAITING = 16 << 20  # bytes of lines that wait in memory for room on the disk
_CLOSE_SECONDS = 30.0
_FLUSH_SECONDS = 5.0  # between flushes of TensorBoard's file, which each wait for the disk
_OTHERS_CONTINUE = f"training continues, and {METRICS_FILE} has every value"

# Writes the values of a step.
_Write = Callable[[int, Mapping[str, float]], Any]


class MetricsLog:
    """Writes metrics, in process 0 only. TensorBoard files need tensorboardX.

    Args:
      directory: the run directory.
      step: step at which the run starts or resumes. Later lines, of a run that went further but
        lost its checkpoint, are removed.
      recipe: the recipe as plain values, for Weights & Biases.
      wandb_project: project of Weights & Biases; empty for none.

    Raises:
      OSError: `metrics.jsonl` cannot be opened or rewritten.
    """

    def __init__(
        self, directory: Path, step: int, recipe: Mapping[str, Any], wandb_project: str = ""
    ) -> None:
        self._outputs: list[tuple[SideOutput, _Write]] = []
        if jax.process_index() != 0:
            return
        path = directory / METRICS_FILE
        _remove_lines_after(path, step)
        lines = _LinesFile(path)
        self._add(str(path), "checkpoints are not affected", lines)
        if importlib.util.find_spec("tensorboardX") is None:
            logger.info("no TensorBoard files: pip install 'btlm-jax[train]' installs tensorboardX")
        else:
            folder = directory / "tensorboard"
            self._add(f"TensorBoard's files in {folder}", _OTHERS_CONTINUE, _Board(folder, step))
        if wandb_project:
            run = _WandbRun(directory, recipe, wandb_project)
            self._add("Weights & Biases (run.wandb_project)", _OTHERS_CONTINUE, run)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hands over a line, and a point of every curve; they are written soon after."""
        for output, write in self._outputs:
            output.put(write, step, dict(values))

    def close(self) -> None:
        """Completes what can be completed within 30 s; nothing can be written afterwards."""
        side_output.close_all((output for output, _ in self._outputs), _CLOSE_SECONDS)

    def _add(self, name: str, cost: str, sink: _LinesFile | _Board | _WandbRun) -> None:
        output = SideOutput(name, cost, sink.close)
        output.put(sink.open)
        self._outputs.append((output, sink.write))


class _LinesFile:
    """A file of JSON lines that loses none while its disk is full: they wait until it has room."""

    def __init__(self, path: Path) -> None:
        self._path, self._waiting, self._failing = path, bytearray(), False
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def open(self) -> None:
        """Does nothing: a file that cannot be opened stops the run at its start."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._waiting += (json.dumps({"step": step, **values}) + "\n").encode()
        try:
            self._write_waiting()
        except OSError as e:
            if len(self._waiting) > _MOST_WAITING:
                raise
            if not self._failing:
                logger.warning(
                    "%s cannot be written (%s): training continues, and the lines wait in memory "
                    "until it can", self._path, e.strerror,
                )  # fmt: skip
            self._failing = True
        else:
            if self._failing:
                logger.info("%s is written again, without a gap", self._path)
            self._failing = False

    def close(self) -> None:
        try:
            self._write_waiting()
        except OSError as e:
            lines = self._waiting.count(b"\n")
            raise OSError(e.errno, f"{e.strerror}: its last {lines} lines are lost") from e
        finally:
            os.close(self._file)

    def _write_waiting(self) -> None:
        while self._waiting:
            written = os.write(self._file, self._waiting)  # a full disk may take a part
            del self._waiting[:written]


class _Board:
    """TensorBoard's event file, without the thread of tensorboardX, whose death blocks callers."""

    def __init__(self, folder: Path, step: int) -> None:
        self._folder, self._first = folder, step
        self._file: Any = None
        self._flushed = -math.inf

    def open(self) -> None:
        # protobuf makes the classes when the module is imported
        from tensorboardX.proto.event_pb2 import SessionLog  # pyrefly: ignore
        from tensorboardX.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._file = RecordWriter(str(self._folder / name))
        self._add(file_version="brain.Event:2")
        # Has TensorBoard drop the points of a run that went further.
        self._add(step=self._first, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._add(step=step, summary=scalar(name, value))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _add(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyrefly: ignore

        self._file.write(Event(wall_time=time.time(), **fields).SerializeToString())


class _WandbRun:
    """A run of Weights & Biases, the same one whenever the run is resumed."""

    def __init__(self, directory: Path, recipe: Mapping[str, Any], project: str) -> None:
        self._directory, self._recipe, self._project = directory, recipe, project
        self._run: Any = None

    def open(self) -> None:
        self._run = require_wandb().init(
            project=self._project,
            name=self._directory.name,
            id=_wandb_id(self._directory),
            resume="allow",
            dir=str(self._directory),
            config=dict(self._recipe),
        )
        # wandb's own step cannot return to that of a checkpoint; a metric can.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # wandb drops what does not fit on its disk, without a word.
        files = self._directory / "wandb"
        place = files if files.is_dir() else self._directory
        if not shutil.disk_usage(place).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))
        self._run.log({"step": step, **values})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def require_wandb() -> Any:
    """Returns the wandb package.

    Raises:
      ValueError: it is not installed, or nobody is logged in.
    """
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise ValueError(
            "run.wandb_project is set and wandb is not installed: pip install wandb, or unset it "
            "(--set run.wandb_project=)"
        ) from None
    offline = os.environ.get("WANDB_MODE", "online") != "online"
    if not offline and getattr(getattr(wandb, "api", None), "api_key", "unknown") is None:
        raise ValueError(
            "run.wandb_project is set and nobody is logged in to Weights & Biases: run `wandb "
            "login`, set WANDB_MODE=offline, or unset it (--set run.wandb_project=)"
        )
    return wandb


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Returns the lines of a metrics file, without those that a kill or a full disk damaged."""
    path = local_path(path, "path")
    lines, damaged = [], []
    texts = path.read_bytes().splitlines() if path.exists() else []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged.append(number)
        else:
            lines.append(line)
    if damaged:
        lost = join_first(damaged)
        logger.warning("%s: line %s damaged, and left out", path,
                       f"{lost} is" if len(damaged) == 1 else f"s {lost} are")  # fmt: skip
    return lines


def latest_metrics(path: Path) -> dict[str, float]:
    """Returns the newest value of every metric in a metrics file."""
    latest: dict[str, float] = {}
    for line in read_metrics(path):
        latest |= line
    return latest


def loss_curves(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Returns the losses of a run, to plot: label -> (steps, nats per token)."""
    lines, curves = read_metrics(local_path(run, "run") / METRICS_FILE), {}
    for name, label in (("loss", "training"), ("held_out_loss", "held out")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            steps, losses = zip(*points, strict=True)
            curves[label] = list(steps), list(losses)
    return curves


def draw_loss_curves(run: Path) -> None:
    """Draws the losses of a run into its `loss.png`; a failure is a warning."""
    try:
        plots.require_matplotlib()
    except ValueError as e:
        logger.warning("%s", e)
        return

    def draw() -> None:
        if curves := loss_curves(run):
            plots.draw_loss_curve(run / "loss.png", curves, {}, run.name)

    side_output.attempt(
        str(run / "loss.png"), f"the picture is missing, and {METRICS_FILE} has its values", draw
    )


def _remove_lines_after(path: Path, step: int) -> None:
    """Removes the lines after a step, and damaged ones.

    Raises:
      OSError: the file cannot be rewritten.
    """
    lines = read_metrics(path)
    valid = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step).encode()
    if not path.exists() or path.read_bytes() == valid:
        return
    rewritten = path.with_name(f"{METRICS_FILE}.new")
    try:
        rewritten.write_bytes(valid)
        os.replace(rewritten, path)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            e.errno, f"{path}: {e.strerror}; free space, then run the same command again"
        ) from e


def _wandb_id(directory: Path) -> str:
    """Returns the id of the run, the same whenever the run is resumed."""
    file = directory / "wandb_id"
    if not (file.exists() and file.read_text()):  # a full disk leaves an empty file
        file.write_text(uuid.uuid4().hex[:12])
    return file.read_text()
