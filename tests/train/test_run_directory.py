"""A run directory belongs to one run; several processes: test_processes."""

from __future__ import annotations

import errno
import fcntl
import json
import logging

import numpy as np
import pytest

from btlm_jax.train import run_directory
from btlm_jax.train.feed import open_training_data
from btlm_jax.train.loop import train
from btlm_jax.train.run_directory import RunDirectory
from support.tokens import write_tokens


@pytest.mark.parametrize(
    "override, message",
    [
        ("optimizer.peak_lr=0.02", r"optimizer\.peak_lr \(0\.01 -> 0\.02\)"),
        ("phases.0.steps=9", "phases"),
        ("run.seed=1", r"run\.seed"),
        ("model.fields.n_layer=1", r"model\.fields\.n_layer"),
    ],
)
def test_a_run_is_not_resumed_with_another_recipe(load_tiny, reference, override, message):
    with pytest.raises(ValueError, match=message):
        train(load_tiny(override), reference[0])


def test_a_directory_that_is_not_a_run_is_refused(load_tiny, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="is not a run"):
        train(load_tiny(), tmp_path / "home")


def test_a_run_is_not_resumed_with_other_data(load_tiny, reference, tmp_path):
    write_tokens(tmp_path / "other", np.arange(3000) % 61, vocab_size=61, eos_id=0)
    with pytest.raises(ValueError, match="data_fingerprint"):
        train(load_tiny(f"data.train={tmp_path / 'other'}"), reference[0])


@pytest.fixture
def hold(load_tiny):
    """Returns a function that opens a run directory for the tiny recipe, with a seed."""
    data = open_training_data(load_tiny())

    def open_directory(path, seed=0):
        recipe = {"run": {"seed": seed}, "phases": [], "data": {}}
        return RunDirectory(path, {"recipe": recipe, "data": ["abc"]}, data)

    return open_directory


def test_a_second_run_is_refused_with_the_name_of_the_first(hold, tmp_path):
    """And free again once the first has ended, however it ended."""
    with hold(tmp_path / "run") as first:
        first.claim()
        with pytest.raises(FileExistsError, match=r"in use by process \d+ on .*, started 2") as e:
            hold(tmp_path / "run").__enter__()
        owner = json.loads((tmp_path / "run/run.lock").read_text())
        assert f"process {owner['pid']} on {owner['host']}" in str(e.value)
    with hold(tmp_path / "run") as again:
        again.claim()


def test_a_run_that_is_refused_before_its_claim_leaves_nothing(hold, tmp_path):
    with pytest.raises(ZeroDivisionError), hold(tmp_path / "new/run"):
        (tmp_path / "new/run/checkpoints").mkdir()
        raise ZeroDivisionError
    assert list((tmp_path / "new").iterdir()) == []


def test_a_directory_without_a_step_may_change_its_recipe(hold, tmp_path, caplog):
    """After a kill before the claim, and after one between the claim and the first step."""
    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True)
    (path / "run.lock").write_text("")
    for seed in (1, 2):
        with hold(path, seed) as run:
            run.claim()
    assert "its run took no step, and is replaced" in caplog.text
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ValueError, match=r"differs in run\.seed \(2 -> 3\)"):
        hold(path, 3)


def test_a_damaged_recipe_is_named(hold, tmp_path):
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match=r"recipe\.json is damaged"):
        hold(tmp_path)


def test_a_file_in_the_place_of_the_checkpoints_is_refused_at_once(hold, tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(FileExistsError, match="checkpoints is a file, expected the directory"):
        hold(tmp_path)


def test_a_file_system_without_locks_is_a_warning(hold, tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), hold(tmp_path / "run") as run:
        run.claim()
    assert "has no locks (No locks available)" in caplog.text
    assert (tmp_path / "run" / run_directory.RECIPE_FILE).exists()


def test_a_url_is_not_taken_for_a_local_directory(load_tiny):
    with pytest.raises(ValueError, match=r"directory: found 'gs://.*', expected a local path"):
        train(load_tiny(), "gs://bucket/run")
