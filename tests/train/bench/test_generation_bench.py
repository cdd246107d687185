"""The benchmarks of decoding and prefill: the meaning of their numbers, but no times."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest

from btlm_jax import BTLMConfig, cli
from btlm_jax.model import weights
from btlm_jax.train.bench import generation_bench, measure


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """Makes the measurements of the limits quick."""
    monkeypatch.setattr(measure, "MATMUL_SIZE", 128)
    monkeypatch.setattr(generation_bench, "_READ_BYTES", 1 << 20)


def test_a_decode_report_counts_the_bytes_that_a_step_reads(tmp_path, capsys):
    file = tmp_path / "report.json"
    options = ["--preset", "tiny", "--context", "24", "--steps", "2", "--rounds", "1"]
    options += ["--batch-size", "1", "2", "--weights", "bfloat16", "--torch", "False"]
    assert cli.main(["bench", "decode", *options, "--json", str(file)]) == 0
    out, report = capsys.readouterr().out, json.loads(file.read_text())
    config = BTLMConfig.preset("tiny")
    assert report["weight_bytes"] == 2 * weights.count_parameters(config)
    # The cache has slots for the context and for a bucket of 32 new tokens, in bf16.
    slot_bytes = 2 * config.n_layer * config.n_embd * 2
    for batch_size in (1, 2):
        row = report["ways"][str(batch_size)]
        assert row["cache_bytes"] == batch_size * slot_bytes * (24 + 32)
        nbytes = report["weight_bytes"] + row["cache_bytes"]
        assert math.isclose(row["of_limit"], nbytes / row["seconds"] / row["limit"])
        assert math.isclose(row["tokens_per_second"], batch_size / row["seconds"])
        assert "over_torch" not in row
    assert "after 24 tokens" in out and "of limit" in out and "peak memory" in out


def test_a_prefill_report_has_a_row_per_length(capsys):
    options = ["--preset", "tiny", "--length", "16", "33", "--rounds", "1", "--torch", "False"]
    assert cli.main(["bench", "prefill", *options]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row and row[0].isdigit()] == ["16", "33"]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_pytorch_is_measured_in_turn():
    report = generation_bench.bench_prefill(
        preset="tiny", layers=1, length=(8,), rounds=1, torch=True
    )
    assert report["ways"]["8"]["over_torch"] > 0 and report["torch"]["threads"] >= 1


def test_bad_arguments_are_refused(monkeypatch):
    options = dict(preset="tiny", layers=1, rounds=1, torch=False)
    with pytest.raises(ValueError, match="size 2: found 0, expected at least 1"):
        generation_bench.bench_prefill(**options, length=(8, 0))
    with pytest.raises(ValueError, match="quantize: found 'int3'"):
        generation_bench.bench_prefill(**options, length=(8,), weights="int3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="torch: it is not installed"):
        generation_bench.bench_prefill(**options | {"torch": True}, length=(8,))
