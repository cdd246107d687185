"""The attention benchmark: its variants and the meaning of its numbers, but no times."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from btlm_jax import BTLMConfig, cli
from btlm_jax.model import sharding
from btlm_jax.train.bench import attention_bench, measure


def test_the_report_compares_memory_and_rates(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "MATMUL_SIZE", 128)
    file = tmp_path / "report.json"
    options = ["--preset", "tiny", "--length", "600", "--rounds", "1", "--json", str(file)]
    assert cli.main(["bench", "attention", *options]) == 0
    out, report = capsys.readouterr().out, json.loads(file.read_text())
    assert (report["length"], report["heads"], report["head_dim"]) == (600, 4, 16)
    ours, bias = report["ways"].values()
    assert ours["over_ours"] == 1.0 and report["does_not_fit"] == []
    of_limit = 7 * 4 * 16 * 600 * 601 / ours["seconds"] / report["matmul"]
    assert ours["of_matmul"] == pytest.approx(of_limit)
    assert bias["temporary_bytes"] > 4 * 4 * 600 * 600  # the full bias and scores
    assert all(name in out for name in report["ways"])


def test_every_platform_has_its_variants():
    config = BTLMConfig.preset("tiny")
    assert list(attention_bench._variants(config, "gpu")) == [
        "ours: cudnn", "xla", "xla, full bias", "cudnn, full bias",
    ]  # fmt: skip
    assert list(attention_bench._variants(config, "tpu")) == [
        "ours: splash",
        "xla",
        "xla, full bias",
    ]
    assert list(attention_bench._variants(config, "cpu")) == ["ours: xla", "xla, full bias"]


def test_an_unsupported_kernel_is_an_error(monkeypatch):
    """Another implementation must not be measured under its name."""
    monkeypatch.setattr(sharding, "mesh_platform", lambda mesh: "gpu")
    with pytest.raises(ValueError, match="'cudnn': found dtype float32, expected bfloat16"):
        attention_bench.bench_attention(preset="tiny", length=64, rounds=1, dtype="float32")


def test_a_variant_with_other_results_is_an_error():
    expected, results = [jnp.ones(9)], [jnp.ones(9) * 1.01]
    message = r"other differs from ours: found 0\.01, expected < 0\.0001"
    with pytest.raises(ValueError, match=message):
        attention_bench._check_results("other", results, expected, "float32")


def test_a_variant_that_does_not_fit_is_reported(monkeypatch, capsys, caplog):
    def exhausted(q, k, v):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(measure, "MATMUL_SIZE", 128)
    variants = attention_bench._variants(BTLMConfig.preset("tiny"), "cpu")
    variants["xla, full bias"] = exhausted
    monkeypatch.setattr(attention_bench, "_variants", lambda config, platform: variants)
    sizes = dict(preset="tiny", length=64, rounds=1)
    report = attention_bench.bench_attention(**sizes)
    assert report["does_not_fit"] == ["xla, full bias"] and "does not fit" in caplog.text
    assert "xla, full bias           does not fit" in capsys.readouterr().out
    variants["ours: xla"] = exhausted
    with pytest.raises(ValueError, match=r"ours: xla does not fit .*; use a smaller length or"):
        attention_bench.bench_attention(**sizes)
