"""The bench of the loss: what its numbers mean. (None is compared with a clock.)"""

from __future__ import annotations

import json

import pytest

from btlm_jax import cli
from btlm_jax.model import loss
from btlm_jax.train.bench import loss_bench, measure


def test_report(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "MATMUL_SIZE", 128)
    monkeypatch.setattr(loss, "ROWS", 64)
    file = tmp_path / "found.json"
    options = ["--preset", "tiny", "--rows", "2048", "--rounds", "1", "--json", str(file)]
    assert cli.main(["bench", "loss", *options]) == 0
    out, found = capsys.readouterr().out, json.loads(file.read_text())
    assert (found["rows"], found["vocab_size"], found["n_embd"]) == (2048, 512, 64)
    assert found["dtype"] == "float32"
    ours, whole, remat = found["ways"].values()
    assert ours["over_ours"] == 1.0
    assert whole["over_ours"] == pytest.approx(whole["seconds"] / ours["seconds"])
    used = 6 * 2048 * 512 * 64 / ours["seconds"] / found["matmul"]
    assert ours["of_matmul"] == pytest.approx(used)
    logits = 4 * 2048 * 512
    assert whole["temporary_bytes"] >= logits > 2 * remat["temporary_bytes"]
    assert logits > 2 * ours["temporary_bytes"]
    assert all(way in out for way in found["ways"])


def test_other_losses_are_no_peers():
    loss_bench._check_losses({"a": 11.00001, "b": 11.0}, "float32")
    with pytest.raises(ValueError, match=r"the losses differ: found \{'a': 11.001, 'b': 11.0\}"):
        loss_bench._check_losses({"a": 11.001, "b": 11.0}, "float32")


@pytest.mark.parametrize("name", ["rows", "rounds"])
def test_bad_sizes(name):
    sizes = dict(rows=16, rounds=1) | {name: 0}
    with pytest.raises(ValueError, match=f"{name}: found 0, expected at least 1"):
        loss_bench.bench_loss(preset="tiny", dtype=None, **sizes)
