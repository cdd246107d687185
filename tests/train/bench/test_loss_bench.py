"""The loss benchmark: the meaning of its numbers, but no times."""

from __future__ import annotations

import json

import pytest

from btlm_jax import cli
from btlm_jax.train.bench import loss_bench, measure


def test_the_report_compares_memory_and_rates(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "MATMUL_SIZE", 128)
    monkeypatch.setattr(loss_bench, "CHUNK_ROWS", 64)
    file = tmp_path / "report.json"
    options = ["--preset", "tiny", "--rows", "2048", "--rounds", "1", "--json", str(file)]
    assert cli.main(["bench", "loss", *options]) == 0
    out, report = capsys.readouterr().out, json.loads(file.read_text())
    assert (report["rows"], report["vocab_size"], report["n_embd"]) == (2048, 512, 64)
    assert report["dtype"] == "float32"
    ours, full, remat = report["ways"].values()
    assert ours["over_ours"] == 1.0
    assert full["over_ours"] == pytest.approx(full["seconds"] / ours["seconds"])
    of_limit = 6 * 2048 * 512 * 64 / ours["seconds"] / report["matmul"]
    assert ours["of_matmul"] == pytest.approx(of_limit)
    logits = 4 * 2048 * 512
    assert full["temporary_bytes"] >= logits > 2 * remat["temporary_bytes"]
    assert logits > 2 * ours["temporary_bytes"]
    assert all(name in out for name in report["ways"])


def test_variants_with_other_losses_are_an_error():
    loss_bench._check_losses({"a": 11.00001, "b": 11.0}, "float32")
    with pytest.raises(ValueError, match=r"the losses differ: found \{'a': 11.001, 'b': 11.0\}"):
        loss_bench._check_losses({"a": 11.001, "b": 11.0}, "float32")


@pytest.mark.parametrize("name", ["rows", "rounds"])
def test_sizes_must_be_positive(name):
    sizes = dict(rows=16, rounds=1) | {name: 0}
    with pytest.raises(ValueError, match=f"{name}: found 0, expected at least 1"):
        loss_bench.bench_loss(preset="tiny", **sizes)
