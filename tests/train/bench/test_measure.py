"""What the numbers of the benches mean."""

from __future__ import annotations

import pytest

from btlm_jax.train.bench import measure


def test_medians_are_of_the_rounds():
    """Ratios are taken within a round: a machine that slows down for a while does not bias them."""
    found = {"ours": [1.0, 10.0, 4.0], "theirs": [2.0, 20.0, 2.0]}
    r = measure.summarize_rounds(found, [3e9, 1e9, 2e9], 1e9, dict.fromkeys(found, 0))
    theirs = r["ways"]["theirs"]
    assert (theirs["seconds"], theirs["best"], theirs["over_ours"]) == (2.0, 2.0, 2.0)
    assert r["ways"]["ours"]["of_matmul"] == pytest.approx(1 / 8) and r["matmul"] == 2e9
