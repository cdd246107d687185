"""The benchmark of the engine runs and reports rates beside those of one stream."""

from __future__ import annotations

import pytest

from btlm_jax.train.bench.serve_bench import bench_serve


def test_streams_are_measured_beside_one_at_a_time(capsys):
    sizes = dict(preset="tiny", weights="float32", prompt=9, tokens=6)
    report = bench_serve(streams=(2,), **sizes)
    assert list(report["streams"]) == ["1", "2"]
    for row in report["streams"].values():
        assert row["tokens_per_second"] > 0 and row["compilations"] == 0
        assert 0 < row["first_token_seconds"]["p50"] <= row["first_token_seconds"]["p99"]
    assert report["streams"]["1"]["speedup"] == 1
    assert "speedup" in capsys.readouterr().out


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="tokens"):
        bench_serve(preset="tiny", tokens=0)
