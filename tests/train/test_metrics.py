"""Metrics are written to a file, TensorBoard and Weights & Biases."""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
import types

import jax
import numpy as np
import pytest

from btlm_jax.train import metrics
from btlm_jax.train.metrics import METRICS_FILE, MetricsLog, read_metrics, require_wandb


def write(directory, step, lines):
    log = MetricsLog(directory, step, {})
    for at, values in lines:
        log.write(at, values)
    log.close()


def test_lines_after_the_checkpoint_are_removed(tmp_path, caplog):
    """A run that reached step 3, lost it and was resumed at step 2 has step 3 once."""
    write(tmp_path, 0, [(1, {"loss": 3.0}), (2, {"loss": 2.0}), (3, {"loss": 1.0})])
    with (tmp_path / METRICS_FILE).open("a") as f:
        f.write('{"step": 4, "lo')  # a kill
    write(tmp_path, 2, [(3, {"loss": 1.5})])
    assert [(x["step"], x["loss"]) for x in read_metrics(tmp_path / METRICS_FILE)] == [
        (1, 3.0), (2, 2.0), (3, 1.5),
    ]  # fmt: skip
    assert "line 4 is damaged, and left out" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == [METRICS_FILE, "tensorboard"]
    assert read_metrics(tmp_path / "none") == []


def read_board(folder):
    """Returns the events of TensorBoard's files: (length, checksum, event, checksum) each."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("Q", data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_tensorboard_shows_every_metric_and_drops_the_points_of_a_lost_run(tmp_path):
    write(tmp_path, 7, [(8, {"loss": 2.0, "grad_norm/hidden": 0.5})])
    version, start, *points = read_board(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2"
    assert start.step == 7 and start.session_log.status == start.session_log.START
    values = [(p.step, p.summary.value[0].tag, p.summary.value[0].simple_value) for p in points]
    assert values == [(8, "loss", 2.0), (8, "grad_norm/hidden", 0.5)]


@pytest.mark.parametrize("method", ["open", "write", "close"])
def test_a_full_disk_under_tensorboard_costs_only_its_curves(tmp_path, monkeypatch, caplog, method):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics._Board, method, fail)
    write(tmp_path, 0, [(step, {"loss": 2.0}) for step in range(1, 9)])
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 8
    (message,) = [r.getMessage() for r in caplog.records]
    assert f"TensorBoard's files in {tmp_path}/tensorboard: [Errno 28] No space left" in message
    assert message.endswith("training continues, and metrics.jsonl has every value")


def test_lines_wait_for_room_on_a_full_disk_and_none_is_lost(tmp_path, monkeypatch, caplog):
    """The disk first takes a part of a line, then nothing, then everything."""
    real, full = os.write, [5, 0, 0]

    def write_some(file, data):
        if not full:
            return real(file, data)
        if (room := full.pop(0)) == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data[:room])

    lines = metrics._LinesFile(tmp_path / METRICS_FILE)
    monkeypatch.setattr(os, "write", write_some)
    with caplog.at_level("INFO"):
        for step in range(1, 5):
            lines.write(step, {"loss": 2.0})
    full.append(0)
    lines.write(5, {"loss": 2.0})
    full.append(0)
    with pytest.raises(OSError, match="its last 1 lines are lost"):
        lines.close()
    assert [x["step"] for x in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3, 4]
    texts = [r.getMessage() for r in caplog.records]
    assert [("lines wait in memory" in t, "without a gap" in t) for t in texts] == [
        (True, False), (False, True), (True, False),
    ]  # fmt: skip


def test_lines_that_a_full_disk_damaged_are_dropped(tmp_path, caplog):
    good = '{"step": 1, "loss": 2.0}'
    data = f"{good}\n[3]\n7\n{{}}\n".encode() + b"\x00\x00\xff\n"
    (tmp_path / METRICS_FILE).write_bytes(data)
    assert read_metrics(tmp_path / METRICS_FILE) == [json.loads(good)]


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, monkeypatch, caplog):
    write(tmp_path, 0, [(1, {"loss": 2.0})])

    def fail(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(metrics.plots, "draw_loss_curve", fail)
    metrics.draw_loss_curves(tmp_path)
    assert "loss.png: [Errno 30] Read-only file system; the picture is missing" in caplog.text


def test_without_tensorboard_the_file_is_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with caplog.at_level("INFO"):
        write(tmp_path, 0, [(1, {"loss": 2.0})])
    assert read_metrics(tmp_path / METRICS_FILE) == [{"step": 1, "loss": 2.0}]
    assert "pip install" in caplog.text


def test_a_resumed_run_is_the_same_run_in_wandb(tmp_path, monkeypatch, caplog):
    started, logged = [], []
    run = types.SimpleNamespace(
        define_metric=lambda name, step_metric: logged.append((name, step_metric)),
        log=logged.append,
        finish=lambda: logged.append("finished"),
    )

    def init(**options):
        started.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        log = MetricsLog(tmp_path / "..", 0, {"run": {"seed": 1}}, "btlm")
        log.write(3, {"loss": 1.0})
        log.close()
    assert not caplog.records
    assert logged[:3] == [("*", "step"), {"step": 3, "loss": 1.0}, "finished"]
    first, second = started
    assert first == second and first["id"] and first["resume"] == "allow"
    assert first["project"] == "btlm" and first["config"] == {"run": {"seed": 1}}


def test_a_full_disk_of_wandb_is_a_warning(tmp_path, monkeypatch, caplog):
    """wandb itself says nothing."""
    run = types.SimpleNamespace(define_metric=lambda *_, **__: 0, log=print, finish=print)
    wandb = types.SimpleNamespace(init=lambda **_: run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = MetricsLog(tmp_path, 0, {}, "btlm")
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=0))
    log.write(1, {"loss": 2.0})
    log.write(2, {"loss": 1.0})
    log.close()
    (warning,) = [r.getMessage() for r in caplog.records]
    assert "Weights & Biases" in warning and "No space left" in warning
    assert [line["step"] for line in read_metrics(tmp_path / METRICS_FILE)] == [1, 2]


def test_a_missing_wandb_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"run\.wandb_project .* pip install wandb"):
        require_wandb()
    api = types.SimpleNamespace(api_key=None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(api=api))
    with pytest.raises(ValueError, match=r"nobody is logged in .*`wandb login`"):
        require_wandb()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert require_wandb().api is api


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write(tmp_path, 0, [(1, {"loss": 2.0})])
    assert not list(tmp_path.iterdir())


def test_values_are_plain_numbers(tmp_path):
    write(tmp_path, 0, [(1, {"loss": float(np.float32(0.1)), "nan": float("nan")})])
    text = (tmp_path / METRICS_FILE).read_text()
    assert (
        json.loads(text)["loss"] == pytest.approx(0.1) and metrics.METRICS_FILE == "metrics.jsonl"
    )
