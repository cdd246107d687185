"""The bench of the training step: what its numbers mean. (None is compared with a clock.)"""

from __future__ import annotations

import importlib.util
import json

import pytest

from btlm_jax import BTLMConfig, cli
from btlm_jax.perf import accounting
from btlm_jax.train.bench import measure, step_bench
from btlm_jax.train.bench.baseline import Baseline


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(measure, "MATMUL_SIZE", 128)


def test_report(small, tmp_path, capsys):
    file = tmp_path / "found.json"
    options = ["--preset", "tiny", "--length", "16", "--batch-size", "2", "--rounds", "1"]
    assert cli.main(["bench", "train", *options, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    found = json.loads(file.read_text())
    rates = found["rates"]
    assert found["devices"] == 8 and found["dtype"] == "float32" and found["rounds"] == 1
    flops = accounting.flops_per_token(BTLMConfig.preset("tiny"), 16)
    used = rates["step"] * flops.training_full / rates["matmul"]
    assert found["mfu"] == pytest.approx(used) and found["mfu_causal"] < found["mfu"]
    # The loader serves all devices.
    assert found["loader_over_step"] == pytest.approx(rates["loader"] / rates["step"] / 8)
    assert f"step: {rates['step']:,.0f} tokens/s" in out and "loader: " in out


def test_medians_are_of_the_rounds():
    """Ratios are taken within a round: a machine that slows down for a while does not bias them."""
    found = {
        "step": [1.0, 10.0, 4.0],  # seconds
        "torch eager": [2.0, 20.0, 2.0],
        "matmul": [3e9, 1e9, 2e9],
        "loader": [8.0, 8.0, 8.0],
    }
    r = step_bench._report(BTLMConfig.preset("tiny"), 16, 2, found)
    assert r["rates"]["step"] == 8.0 and r["best"]["step"] == 32.0
    assert r["step_over_torch"] == {"torch eager": 2.0}
    assert r["rates"]["matmul"] == 2e9


def test_another_step_is_no_peer():
    peer = {"eager": [6.2, 6.1]}
    step_bench._check_losses([6.2001, 6.0999], peer, "float32")
    with pytest.raises(ValueError, match=r"\(eager\) is not ours: its first losses are \[6\.2, 6"):
        step_bench._check_losses([6.2, 6.11], peer, "float32")


@pytest.mark.parametrize("name", ["length", "batch_size", "rounds"])
def test_bad_sizes(name):
    sizes = dict(length=16, batch_size=2, rounds=1) | {name: 0}
    with pytest.raises(ValueError, match=f"{name}: found 0, expected at least 1"):
        step_bench.bench_train(preset="tiny", dtype=None, **sizes)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_pytorch_takes_the_same_steps(small):
    """The losses of two steps agree to 2e-4, or it is an error."""
    found = step_bench.bench_train(
        preset="tiny", length=16, batch_size=2, rounds=1, dtype="float32", torch=True
    )
    assert found["step_over_torch"]["torch eager"] > 0


def test_a_peer_that_fails_says_why(tmp_path):
    (tmp_path / "problem.npz").write_text("nonsense")
    with pytest.raises(ValueError, match=r"PyTorch's step failed:\n[\s\S]*Error"):
        Baseline("torch_step", str(tmp_path / "problem.npz"), "PyTorch's step")
