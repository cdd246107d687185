"""Baselines in subprocesses."""

from __future__ import annotations

import pytest

from btlm_jax.train.bench.baseline import Baseline


def test_a_failed_baseline_raises_the_end_of_its_errors(tmp_path):
    (tmp_path / "problem.npz").write_text("nonsense")
    with pytest.raises(ValueError, match=r"PyTorch's step failed:\n[\s\S]*Error"):
        Baseline("torch_step", str(tmp_path / "problem.npz"), "PyTorch's step")
