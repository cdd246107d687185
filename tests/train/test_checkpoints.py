"""Checkpoints of a run: damage is noticed and set aside, and only what may go is removed."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import types

import jax
import jax.numpy as jnp
import pytest
from orbax.checkpoint import v1 as ocp

import btlm_jax as btlm
from btlm_jax.checkpoint import metadata
from btlm_jax.checkpoint.assets import asset_hashes, changed_assets
from btlm_jax.train import checkpoints as checkpoints_module
from btlm_jax.train.checkpoints import Checkpoints
from btlm_jax.train.loop import train
from btlm_jax.train.metrics import read_metrics
from btlm_jax.train.recipe_build import build_config, build_optimizer
from btlm_jax.utils import deadline
from support.runs import assert_same_run, copy_run


def test_a_damaged_newest_checkpoint_is_reported_and_set_aside(
    load_tiny, reference, tmp_path, caplog
):
    run = copy_run(reference[0], tmp_path / "run")
    newest = run / "checkpoints/12/state/d"
    largest = max(newest.iterdir(), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    assert train(load_tiny(), run).finished
    assert "checkpoint" in caplog.text and "cannot be used" in caplog.text
    assert (run / "checkpoints/damaged-12").is_dir()
    assert_same_run(run, reference[0])


def test_a_tokenizer_that_changed_since_the_first_save_is_noticed(reference, tmp_path):
    run = copy_run(reference[0], tmp_path / "run")
    meta = metadata.read_metadata(run)
    assert meta.asset_sha256 == asset_hashes(run) and not changed_assets(meta)
    (run / "tokenizer/tokenizer.json").write_text("{}")
    assert changed_assets(metadata.read_metadata(run)) == {"tokenizer.json": "changed"}


@pytest.mark.parametrize("part", ["state", "optimizer", "_CHECKPOINT_METADATA"])
def test_a_checkpoint_with_a_missing_part_is_set_aside(load_tiny, reference, tmp_path, part):
    run = copy_run(reference[0], tmp_path / "run")
    missing = run / "checkpoints/12" / part
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    recipe = load_tiny()
    model = btlm.BTLM(build_config(recipe))
    checkpoints = Checkpoints(run / "checkpoints", keep_last=2, keep_every=0)
    state = checkpoints.restore_newest(
        model, build_optimizer(recipe, model.config), btlm.make_mesh()
    )
    checkpoints.close()
    assert state is not None and int(state.step) == 9
    assert (run / "checkpoints/damaged-12").is_dir()


def test_when_no_checkpoint_can_be_read_nothing_is_changed(load_tiny, reference, tmp_path):
    """And the next call does not start from scratch in the same directory either."""
    run = copy_run(reference[0], tmp_path / "run")
    for step in (9, 12):
        shutil.rmtree(run / f"checkpoints/{step}/optimizer")
    before = sorted(p.relative_to(run) for p in run.rglob("*"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none of its checkpoints \[9, 12\] can be used"):
            train(load_tiny(), run)
        assert sorted(p.relative_to(run) for p in run.rglob("*")) == before


def test_a_checkpoint_of_another_optimizer_is_not_damaged(load_tiny, reference, tmp_path):
    run = copy_run(reference[0], tmp_path / "run")
    checkpoints = Checkpoints(run / "checkpoints", keep_last=2, keep_every=0)
    recipe = load_tiny("optimizer.name=lion")
    model = btlm.BTLM(build_config(recipe))
    tx = build_optimizer(recipe, model.config)
    with pytest.raises(ValueError, match=r"does not fit the recipe's optimizer"):
        checkpoints.restore_newest(model, tx, btlm.make_mesh())
    checkpoints.close()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["12", "9"]


def test_a_disk_that_is_too_small_is_noticed_before_the_first_step(
    load_tiny, tmp_path, monkeypatch
):
    """Steps 3, 6, 9 and 12 are saved, two of them kept: three must fit at once."""
    recipe = load_tiny()
    model = btlm.BTLM(build_config(recipe))
    params = model.init(jax.random.key(0), mesh=btlm.make_mesh())
    size = 3 * sum(x.nbytes for x in jax.tree.leaves(params))  # with Adam's moments, and counters
    usage = types.SimpleNamespace(free=3 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"no space for .*checkpoints: .* are to be written"):
        train(recipe, tmp_path / "run")
    assert not read_metrics(tmp_path / "run/metrics.jsonl")
    usage.free = 3 * size + 1000
    assert train(recipe, tmp_path / "run").finished


def test_multiples_of_keep_every_are_kept(tmp_path, load_tiny):
    train(load_tiny("run.checkpoint_every=2", "run.keep_every=4", "run.keep_last=1"),
          tmp_path / "run")  # fmt: skip
    checkpoints = Checkpoints(tmp_path / "run/checkpoints", keep_last=1, keep_every=4)
    assert checkpoints.steps() == [4, 8, 12]
    checkpoints.close()


@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_a_state_that_is_not_finite_is_neither_saved_nor_resumed(
    load_tiny, reference, tmp_path, monkeypatch, caplog, part
):
    """Finite weights with moments that are not, too; the older checkpoint stays and is read."""
    recipe, run = load_tiny(), copy_run(reference[0], tmp_path / "run")
    model = btlm.BTLM(build_config(recipe))
    tx, mesh = build_optimizer(recipe, model.config), btlm.make_mesh()
    checkpoints = Checkpoints(run / "checkpoints", keep_last=2, keep_every=0)
    state = checkpoints.restore_newest(model, tx, mesh)
    assert state is not None
    bad = jax.tree.map(
        lambda x: x * jnp.float32(jnp.nan) if x.ndim > 1 else x, getattr(state, part)
    )
    bad = state._replace(**{part: bad})
    with pytest.raises(FloatingPointError, match=r"step 15: not saved, .*checkpoints/12"):
        checkpoints.save(model.config, bad, 15, {})
    with monkeypatch.context() as unchecked:
        unchecked.setattr("btlm_jax.train.checkpoints.nonfinite_in_state", lambda state: {})
        checkpoints.save(model.config, bad, 15, {})
    checkpoints.wait()
    assert checkpoints.steps() == [12, 15]
    newest = checkpoints.restore_newest(model, tx, mesh)
    checkpoints.close()
    assert newest is not None and int(newest.step) == 12
    assert "checkpoints/15 cannot be used: it holds NaN or Inf in" in caplog.text
    assert (run / "checkpoints/damaged-15").is_dir()


def test_a_checkpoint_that_cannot_be_written_stops_the_run_with_path_and_fix(
    load_tiny, tmp_path, monkeypatch
):
    def fail(self, *args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device")

    monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", fail)
    with pytest.raises(
        OSError, match=r"could not be written to .*/run/checkpoints .*No space"
    ) as e:
        train(load_tiny(), tmp_path / "run")
    assert "none is. Free space" in str(e.value) and "run the same command again" in str(e.value)


@pytest.mark.parametrize("signaled", [False, True])
def test_a_checkpoint_whose_disk_hangs_is_announced_and_ends_the_run(
    load_tiny, tmp_path, monkeypatch, caplog, signaled
):
    """A request to stop shortens the wait; nothing then waits for the thread that hangs."""
    answer, bounded = threading.Event(), []
    monkeypatch.setattr(
        ocp.training.Checkpointer,
        "wait",
        lambda self: answer.wait(60) if self.checkpoints else None,
    )
    monkeypatch.setattr(deadline, "_WARN_EVERY_SECONDS", 60 if signaled else 0.3)
    monkeypatch.setattr(deadline, "bound_exit", lambda: bounded.append(None))
    monkeypatch.setattr(checkpoints_module, "_STOP_SECONDS", 0.5)
    monkeypatch.setattr(checkpoints_module, "_PATIENCE", 100 if signaled else 2)
    if signaled:
        saves = ocp.training.Checkpointer.save_checkpointables_async

        def save(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return saves(self, *args, **kwargs)

        monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", save)
    before = time.monotonic()
    with pytest.raises(
        OSError, match=r"could not be written to .*still writing .*/checkpoints/3 after .*none is"
    ):
        train(load_tiny(), tmp_path / "run")
    answer.set()
    assert time.monotonic() - before < 30 and bounded
    assert "its file system is slow or hangs; waiting at most" in caplog.text
