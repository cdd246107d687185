"""Reports come one step late, and show the rate of the update that was made."""

from __future__ import annotations

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


def lines_of(directory) -> list[dict]:
    return read_metrics(directory / "metrics.jsonl")


def test_a_step_is_reported_after_the_next_one_or_before_a_pause(load_tiny, tmp_path):
    recipe = load_tiny()
    with Reporter(recipe, build_config(recipe), tmp_path, 0, lambda: "none") as reporter:
        reporter.record(1, recipe.phases[0], metrics())
        assert lines_of(tmp_path) == []
        reporter.record(2, recipe.phases[0], metrics())
        assert [x["step"] for x in lines_of(tmp_path)] == [1]
        with reporter.pause():
            assert [x["step"] for x in lines_of(tmp_path)] == [1, 2]
        reporter.record(3, recipe.phases[0], metrics())
        assert [x["step"] for x in lines_of(tmp_path)] == [1, 2]


@pytest.mark.parametrize("skipped, bad, updates", [(0, 0, 5), (2, 0, 3), (2, 1, 4), (2, 2, 4)])
def test_the_logged_learning_rate_is_that_of_the_update(load_tiny, tmp_path, skipped, bad, updates):
    """After 2 of 6 steps were skipped, the sixth is the fourth update (with the rate of step 3)."""
    recipe = load_tiny()
    with (
        Reporter(recipe, build_config(recipe), tmp_path, 5, lambda: "none") as reporter,
    ):
        reporter.record(6, recipe.phases[0], metrics(skipped, bad))
        with reporter.pause():
            (line,) = lines_of(tmp_path)
    assert line["learning_rate"] == pytest.approx(float(build_schedule(recipe)(updates)))


def test_too_many_steps_with_gradients_that_are_not_finite_end_the_run(load_tiny, tmp_path):
    recipe = load_tiny(
        "run.max_bad_steps=2", "run.checkpoint_every=0", "optimizer.peak_lr=1e30",
        "optimizer.warmup_tokens=0",
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"2 steps in a row .* there is no checkpoint"):
        train(recipe, tmp_path / "run")
