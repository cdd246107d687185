"""Metrics are written to a file, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
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
    assert "truncated" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == [METRICS_FILE, "tensorboard"]
    assert read_metrics(tmp_path / "none") == []


def test_tensorboard_shows_every_metric(tmp_path, monkeypatch):
    added = []

    class Board:
        def __init__(self, folder, purge_step):
            assert folder == str(tmp_path / "tensorboard") and purge_step == 7

        def add_scalar(self, *point):
            added.append(point)

        def close(self):
            added.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Board))
    write(tmp_path, 7, [(8, {"loss": 2.0, "grad_norm/hidden": 0.5})])
    assert added == [("loss", 2.0, 8), ("grad_norm/hidden", 0.5, 8), "closed"]


def test_without_tensorboard_the_file_is_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with caplog.at_level("INFO"):
        write(tmp_path, 0, [(1, {"loss": 2.0})])
    assert read_metrics(tmp_path / METRICS_FILE) == [{"step": 1, "loss": 2.0}]
    assert "pip install" in caplog.text


def test_a_resumed_run_is_the_same_run_in_wandb(tmp_path, monkeypatch):
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
    assert logged[:3] == [("*", "step"), {"step": 3, "loss": 1.0}, "finished"]
    first, second = started
    assert first == second and first["id"] and first["resume"] == "allow"
    assert first["project"] == "btlm" and first["config"] == {"run": {"seed": 1}}


def test_a_missing_wandb_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"run\.wandb_project .* pip install wandb"):
        require_wandb()


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
