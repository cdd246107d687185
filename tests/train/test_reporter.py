"""Reports come one step late, and show the rate of the update that was made."""

from __future__ import annotations

import time

import numpy as np
import pytest

from btlm_jax.train.loop import train
from btlm_jax.train.metrics import read_metrics
from btlm_jax.train.recipe_build import build_config, build_schedule
from btlm_jax.train.reporter import Reporter


def metrics(skipped: int = 0, bad: int = 0) -> dict:
    zero = np.float32(0)
    return {
        "loss": zero,
        "tokens": np.float32(64),
        "grad_norm": zero,
        "skipped": np.int32(skipped),
        "bad_in_a_row": np.int32(bad),
    }


def steps_of(directory, expected: list[int]) -> list[dict]:
    """Waits until the thread that writes the metrics has written these steps; returns the lines."""
    deadline = time.monotonic() + 10
    while True:
        lines = read_metrics(directory / "metrics.jsonl")
        if [x["step"] for x in lines] == expected:
            return lines
        assert time.monotonic() < deadline, lines
        time.sleep(0.01)


def test_a_step_is_reported_after_the_next_one_or_before_a_pause(load_tiny, tmp_path):
    recipe = load_tiny()
    with Reporter(recipe, build_config(recipe), tmp_path, 0, lambda: "none") as reporter:
        reporter.record(1, recipe.phases[0], metrics())
        steps_of(tmp_path, [])
        reporter.record(2, recipe.phases[0], metrics())
        steps_of(tmp_path, [1])
        with reporter.pause():
            steps_of(tmp_path, [1, 2])
        reporter.record(3, recipe.phases[0], metrics())
        time.sleep(0.05)
        steps_of(tmp_path, [1, 2])


@pytest.mark.parametrize("skipped, bad, updates", [(0, 0, 5), (2, 0, 3), (2, 1, 4), (2, 2, 4)])
def test_the_logged_learning_rate_is_that_of_the_update(load_tiny, tmp_path, skipped, bad, updates):
    """After 2 of 6 steps were skipped, the sixth is the fourth update (with the rate of step 3)."""
    recipe = load_tiny()
    with (
        Reporter(recipe, build_config(recipe), tmp_path, 5, lambda: "none") as reporter,
    ):
        reporter.record(6, recipe.phases[0], metrics(skipped, bad))
        with reporter.pause():
            (line,) = steps_of(tmp_path, [6])
    assert line["learning_rate"] == pytest.approx(float(build_schedule(recipe)(updates)))


@pytest.mark.parametrize("rate", ["1e30", "1e15"])
def test_steps_that_are_not_finite_are_never_saved_and_end_the_run(
    load_tiny, tmp_path, caplog, rate
):
    """At 1e30 the first update is too large; at 1e15 it is finite, and the next loss is not."""
    recipe = load_tiny(
        "run.max_bad_steps=4", "run.checkpoint_every=1", f"optimizer.peak_lr={rate}",
        "optimizer.warmup_tokens=0", "run.eval_every=0",
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"of 4 steps in a row were not finite; ") as e:
        train(recipe, tmp_path / "run")
    assert "there is no checkpoint from before" in str(e.value)
    saved = [p.name for p in (tmp_path / "run/checkpoints").iterdir()]
    if rate == "1e30":
        assert saved == []
    else:
        assert saved == ["1"] and "checkpoints/1 may hold the cause: delete it" in str(e.value)
    assert "no checkpoint, because it was not finite" in caplog.text
