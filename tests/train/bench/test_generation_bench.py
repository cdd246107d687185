"""The benches of decoding and prefill: what their numbers mean. (None is compared with a clock.)"""

from __future__ import annotations

import importlib.util
import json
import math

import jax
import pytest

from btlm_jax import BTLMConfig, cli
from btlm_jax.model import weights
from btlm_jax.train.bench import generation_bench, measure


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(measure, "MATMUL_SIZE", 128)
    monkeypatch.setattr(generation_bench, "_READ_BYTES", 1 << 20)


def test_decode(small, tmp_path, capsys):
    file = tmp_path / "found.json"
    options = ["--preset", "tiny", "--context", "24", "--steps", "2", "--rounds", "1"]
    options += ["--batch-size", "1", "2", "--weights", "bfloat16", "--torch", "False"]
    assert cli.main(["bench", "decode", *options, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    found = json.loads(file.read_text())
    c = BTLMConfig.preset("tiny")
    assert found["weight_bytes"] == 2 * weights.count_parameters(c)
    # Slots: of the context, and of the new tokens in a bucket of 32; keys and values in bf16.
    slot = 2 * c.n_layer * c.n_embd * 2
    for rows in (1, 2):
        x = found["ways"][str(rows)]
        assert x["cache_bytes"] == rows * slot * (24 + 32)
        read = found["weight_bytes"] + x["cache_bytes"]
        assert math.isclose(x["of_limit"], read / x["seconds"] / x["limit"])
        assert math.isclose(x["tokens_per_second"], rows / x["seconds"])
        assert "over_torch" not in x
    assert "after 24 tokens" in out and "of limit" in out and "peak memory" in out


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_random_weights_of_a_kind(kind):
    """In their packed bytes from the start, and finite in use."""
    model, params = generation_bench._random_model("tiny", 1, kind)
    kernel = params["blocks"]["0"]["mlp"]["c_fc"]["kernel"]
    assert kernel.values.dtype == {"int8": "int8", "int4": "uint8"}[kind]
    logits = model.apply(params, [[1, 2, 3]])
    assert bool(jax.numpy.isfinite(logits).all())


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_decoding_copies_no_weights(kind, rows):
    """XLA's CPU backend takes copies in most formulations: of one matrix, or of all of them.

    There are some copies of the logits of each row; the smallest kernel has D x D entries. int4 is
    unpacked, a matrix at a time, to bf16 by way of int8.
    """
    model, params = generation_bench._random_model("btlm-450m", 2, kind)
    c = model.config
    decoder = generation_bench._decoder(model, params, rows, 16, 1, 1, None)
    logits = 8 * rows * c.vocab_size * 4
    unpacked = 4 * c.n_inner * c.n_embd if kind == "int4" else 0
    assert decoder.temporary_bytes < logits + unpacked + c.n_embd**2 / 2


def test_prefill(small, capsys):
    options = ["--preset", "tiny", "--length", "16", "33", "--rounds", "1", "--torch", "False"]
    assert cli.main(["bench", "prefill", *options]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row and row[0].isdigit()] == ["16", "33"]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_beside_pytorch(small):
    how = dict(preset="tiny", layers=1, weights="bfloat16", rounds=1, torch=True)
    found = generation_bench.bench_prefill(lengths=[8], **how)
    assert found["ways"]["8"]["over_torch"] > 0 and found["torch"]["threads"] >= 1


def test_what_cannot_be(small, monkeypatch):
    how = dict(preset="tiny", layers=1, weights="bfloat16", rounds=1, torch=False)
    with pytest.raises(ValueError, match="size 2: found 0, expected at least 1"):
        generation_bench.bench_prefill(lengths=[8, 0], **how)
    with pytest.raises(ValueError, match="quantize: found 'int3'"):
        generation_bench.bench_prefill(lengths=[8], **how | {"weights": "int3"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="torch: it is not installed"):
        generation_bench.bench_prefill(lengths=[8], **how | {"torch": True})
