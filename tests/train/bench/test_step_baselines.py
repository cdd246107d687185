"""PyTorch's train step as a baseline."""

from __future__ import annotations

import importlib.util

import pytest

from btlm_jax.train.bench import measure, step_bench
from btlm_jax.train.bench.step_baselines import check_first_losses


def test_a_baseline_with_other_losses_is_an_error():
    baselines = {"eager": [6.2, 6.1]}
    check_first_losses([6.2001, 6.0999], baselines, "float32")
    message = r"\(eager\) differs from ours: found the first losses \[6\.2, 6"
    with pytest.raises(ValueError, match=message):
        check_first_losses([6.2, 6.11], baselines, "float32")


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_pytorch_takes_the_same_steps(monkeypatch):
    """The benchmark fails if the first two losses differ by more than 2e-4."""
    monkeypatch.setattr(measure, "MATMUL_SIZE", 128)
    report = step_bench.bench_train(
        preset="tiny", length=16, batch_size=2, rounds=1, dtype="float32", torch=True
    )
    assert report["step_over_torch"]["torch eager"] > 0
