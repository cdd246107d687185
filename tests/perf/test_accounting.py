"""Counts against closed forms and the published figures."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from btlm_jax import BTLM, BTLMConfig
from btlm_jax.perf import accounting, chips

B3 = BTLMConfig.preset("btlm-3b-8k")


def test_kv_cache_of_the_released_model():
    assert accounting.kv_bytes_per_token(B3) == 327_680
    assert accounting.kv_bytes_per_token(B3) * 8192 == 2.5 * 2**30


def test_flops_of_the_released_model():
    matmul = 32 * 78_638_080 + 50257 * 2560  # reference: parameters in matrix products
    at_zero = 2 * matmul
    f = accounting.flops_per_token(B3, 8192)
    assert f.forward_full == at_zero + 4 * 32 * 2560 * 8192
    assert f.forward_causal == at_zero + 2 * 32 * 2560 * 8193
    assert f.training_full == 3 * f.forward_full
    # Both phases of the published run: 1.217e22 by the same counting (full attention).
    phase1 = accounting.flops_per_token(B3, 2048).training_full * 119_727 * 1920 * 2048
    phase2 = f.training_full * (159_636 - 119_727) * 480 * 8192
    assert phase1 + phase2 == pytest.approx(1.217e22, rel=1e-3)


def test_flops_equal_those_of_the_compiler():
    """XLA counts the same products and also elementwise work, so its count is a little higher.

    The first 128 of 256 queries visit 128 keys, the others all keys: 192 on average.
    """
    config = dataclasses.replace(BTLMConfig.preset("tiny"), n_layer=1, n_embd=256, n_inner=1024)
    model, T = BTLM(config), 256
    params = model.init(jax.random.key(0))
    ids = jax.numpy.zeros((1, T), int)
    compiled = jax.jit(lambda p: model.apply(p, ids)).lower(params).compile()
    counted = compiled.cost_analysis()["flops"]
    ours = accounting.flops_per_token(config, 192).forward_full * T
    assert 1.0 <= counted / ours < 1.1


def test_length_below_one_is_refused():
    with pytest.raises(ValueError, match="length: found 0"):
        accounting.flops_per_token(B3, 0)


def test_description_of_the_released_model():
    rows = dict(accounting.describe_config(B3, 8192))
    assert "2,646,255,744" in rows["parameters"]
    assert rows["weights"] == "fp32 9.9 GiB, bf16 4.9 GiB"
    assert rows["KV cache"] == "327,680 B per token in bf16, 2.5 GiB at 8192 tokens"
    assert "CompleteP" not in rows
    deep = dataclasses.replace(B3, completep_base_layers=4)
    said = dict(accounting.describe_config(deep, 8192))["CompleteP"]
    assert said == "tuned at depth 4, alpha 1, residual branches times 0.125"


def test_array_bytes_count_two_int4_per_byte():
    assert accounting.array_bytes((3, 5), jnp.dtype("bfloat16")) == 30
    assert accounting.array_bytes((3, 5), jnp.dtype("int4")) == 8


def test_model_flops_utilization_is_reported_in_both_conventions(monkeypatch):
    """PaLM's convention: 6 N + 12 L T D per token; half of the second term where it is causal."""
    assert accounting.model_flops_utilization(B3, 2048, 1000.0) == {}  # a CPU's peak is unknown
    monkeypatch.setattr(chips, "peak_flops", lambda kind: 1e15)
    got = accounting.model_flops_utilization(B3, 2048, 1000.0)
    flops = accounting.flops_per_token(B3, 2048)
    attention = 12 * 32 * 2048 * 2560
    assert flops.training_full - flops.training_causal == pytest.approx(attention / 2, rel=1e-3)
    assert got["mfu"] == pytest.approx(flops.training_full * 1e-12)
    assert got["mfu_causal"] == pytest.approx(flops.training_causal * 1e-12)
    assert 0.0159 < got["mfu"] < 0.0179  # 6 * 2.646e9 + attention, at 1000 tokens/s of 1e15
