"""The meaning of the numbers that the benchmarks share."""

from __future__ import annotations

import pytest

from btlm_jax.train.bench import measure


def test_ratios_are_medians_of_the_ratios_within_rounds():
    seconds = {"ours": [1.0, 10.0, 4.0], "other": [2.0, 20.0, 2.0]}
    report = measure.summarize_rounds(seconds, [3e9, 1e9, 2e9], 1e9, dict.fromkeys(seconds, 0))
    other = report["ways"]["other"]
    assert (other["seconds"], other["best"], other["over_ours"]) == (2.0, 2.0, 2.0)
    assert report["ways"]["ours"]["of_matmul"] == pytest.approx(1 / 8)
    assert report["matmul"] == 2e9


def test_sizes_are_positive():
    with pytest.raises(ValueError, match="rows: found 0, expected at least 1"):
        measure.require_positive(rounds=1, rows=0)
