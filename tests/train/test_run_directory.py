"""A run directory belongs to one run; several processes: test_processes."""

from __future__ import annotations

import numpy as np
import pytest

from btlm_jax.train.loop import train
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
