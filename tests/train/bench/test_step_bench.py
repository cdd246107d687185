"""The benchmark of the train step: the meaning of its numbers, but no times."""

from __future__ import annotations

import json

import pytest

from btlm_jax import BTLMConfig, cli
from btlm_jax.perf import accounting, chips
from btlm_jax.train.bench import measure, step_bench


def test_the_report_compares_rates_per_device(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "MATMUL_SIZE", 128)
    file = tmp_path / "report.json"
    options = ["--preset", "tiny", "--length", "16", "--batch-size", "2", "--rounds", "1"]
    assert cli.main(["bench", "train", *options, "--json", str(file)]) == 0
    out, report = capsys.readouterr().out, json.loads(file.read_text())
    rates = report["rates"]
    assert report["devices"] == 8 and report["dtype"] == "float32" and report["rounds"] == 1
    flops = accounting.flops_per_token(BTLMConfig.preset("tiny"), 16)
    mfu = rates["step"] * flops.training_full / rates["matmul"]
    assert report["mfu"] == pytest.approx(mfu) and report["mfu_causal"] < report["mfu"]
    # The loader serves all devices.
    assert report["loader_over_step"] == pytest.approx(rates["loader"] / rates["step"] / 8)
    assert f"step: {rates['step']:,.0f} tokens/s" in out and "loader: " in out


def test_ratios_are_medians_of_the_ratios_within_rounds():
    measurements = {
        "step": [1.0, 10.0, 4.0],  # seconds
        "torch eager": [2.0, 20.0, 2.0],
        "matmul": [3e9, 1e9, 2e9],
        "loader": [8.0, 8.0, 8.0],
    }
    report = step_bench._summarize_steps(BTLMConfig.preset("tiny"), 16, 2, measurements)
    assert report["rates"]["step"] == 8.0 and report["best"]["step"] == 32.0
    assert report["step_over_torch"] == {"torch eager": 2.0}
    assert report["rates"]["matmul"] == 2e9


@pytest.mark.parametrize("name", ["length", "batch_size", "rounds"])
def test_sizes_must_be_positive(name):
    sizes = dict(length=16, batch_size=2, rounds=1) | {name: 0}
    with pytest.raises(ValueError, match=f"{name}: found 0, expected at least 1"):
        step_bench.bench_train(preset="tiny", **sizes)


def test_the_3b_model_is_compared_with_mpt(monkeypatch):
    """At 48,200 tokens/s, MFU by hand: 6 N and full attention, over the 989 TFLOP/s of an H200."""
    report = {"preset": "btlm-3b-8k", "length": 2048, "rates": {"step": 48_200.0}}
    (line,) = step_bench._compare_with_mpt(report)
    assert "24,100 tokens/s/GPU, MFU 43.7 % of the data sheet's peak; " in line
    assert line.endswith("here 2.00 x its tokens/s")
    monkeypatch.setattr(chips, "peak_flops", lambda kind: 989e12)
    c = BTLMConfig.preset("btlm-3b-8k")
    kernels = c.n_layer * (4 * c.n_embd**2 + 3 * c.n_embd * c.n_inner) + c.vocab_size * c.n_embd
    per_token = 6 * kernels + 12 * c.n_layer * 2048 * c.n_embd
    (line,) = step_bench._compare_with_mpt(report)
    assert line.endswith(f"x its tokens/s, MFU {per_token * 48_200 / 989e12:.1%}")
    assert not list(step_bench._compare_with_mpt(report | {"length": 512}))
    assert not list(step_bench._compare_with_mpt(report | {"preset": "tiny"}))
