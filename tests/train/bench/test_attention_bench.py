"""The bench of attention: what it compares. (Nothing is compared with a clock.)"""

from __future__ import annotations

import json

import jax.numpy as jnp
import pytest

from btlm_jax import cli
from btlm_jax.model import sharding
from btlm_jax.train.bench import attention_bench, measure


def test_report(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "MATMUL_SIZE", 128)
    file = tmp_path / "found.json"
    options = ["--preset", "tiny", "--length", "600", "--rounds", "1", "--json", str(file)]
    assert cli.main(["bench", "attention", *options]) == 0
    out, found = capsys.readouterr().out, json.loads(file.read_text())
    assert (found["length"], found["heads"], found["head_dim"]) == (600, 4, 16)
    ours, bias = found["ways"].values()
    assert ours["over_ours"] == 1.0 and found["does_not_fit"] == []
    used = 7 * 4 * 16 * 600 * 601 / ours["seconds"] / found["matmul"]
    assert ours["of_matmul"] == pytest.approx(used)
    assert bias["temporary_bytes"] > 4 * 4 * 600 * 600  # the bias and the scores exist whole
    assert all(way in out for way in found["ways"])


def test_ways_of_other_platforms():
    config = attention_bench.BTLMConfig.preset("tiny")
    assert list(attention_bench._ways(config, "gpu")) == [
        "ours: cudnn", "xla", "xla, full bias", "cudnn, full bias",
    ]  # fmt: skip
    assert list(attention_bench._ways(config, "tpu")) == ["ours: splash", "xla", "xla, full bias"]
    assert list(attention_bench._ways(config, "cpu")) == ["ours: xla", "xla, full bias"]


def test_a_kernel_that_cannot_serve_is_an_error(monkeypatch):
    """It must not be measured under the name of another."""
    monkeypatch.setattr(sharding, "mesh_platform", lambda mesh: "gpu")
    sizes = dict(preset="tiny", length=64, batch_size=1, rounds=1)
    with pytest.raises(ValueError, match="'cudnn': found dtype float32, expected bfloat16"):
        attention_bench.bench_attention(**sizes, dtype="float32")


def test_other_results_are_no_peers():
    ours, theirs = [jnp.ones(9)], [jnp.ones(9) * 1.01]
    with pytest.raises(
        ValueError, match=r"theirs differs from ours: found 0\.01, expected < 0\.0001"
    ):
        attention_bench._check_equal("theirs", theirs, ours, "float32")


def test_a_way_that_does_not_fit_is_told(monkeypatch, capsys, caplog):
    import jax

    def exhausted(q, k, v):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(measure, "MATMUL_SIZE", 128)
    real = attention_bench._ways
    monkeypatch.setattr(
        attention_bench, "_ways", lambda *a: {**real(*a), "xla, full bias": exhausted}
    )
    sizes = dict(preset="tiny", length=64, batch_size=1, rounds=1, dtype=None)
    found = attention_bench.bench_attention(**sizes)
    assert found["does_not_fit"] == ["xla, full bias"] and "does not fit" in caplog.text
    assert "xla, full bias           does not fit" in capsys.readouterr().out
    monkeypatch.setattr(attention_bench, "_ways", lambda *a: {"ours: xla": exhausted})
    with pytest.raises(ValueError, match=r"ours: xla does not fit .*; use a smaller length or"):
        attention_bench.bench_attention(**sizes)
