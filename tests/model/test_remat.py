"""What the forward pass saves for the backward pass, and what it recomputes."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from btlm_jax import BTLM, BTLMConfig, next_token_loss
from btlm_jax.model import sharding
from support.golden import max_error


def test_remat_policies_trade_memory_for_work():
    """Gradients agree, and each layer saves the multiples of [B, T, D] that `remat` promises."""
    base = dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=32)
    ids = np.random.default_rng(0).integers(0, 32, (4, 128))
    layers = 24  # so many that what every program needs once counts little
    saved, grads = {}, {}
    for remat in ("none", "dots", "attention", "full"):
        model = BTLM(dataclasses.replace(base, n_layer=layers), remat=remat)
        params = model.init(jax.random.key(0))
        fn = jax.jit(jax.grad(lambda p, m=model: next_token_loss(m, p, ids).mean))
        compiled = fn.lower(params).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        saved[remat] = memory / layers / (ids.size * base.n_embd * 4)
        grads[remat] = compiled(params)
    dots = 5 + 2 * base.n_inner / base.n_embd
    assert abs(saved["attention"] - saved["full"] - 1) < 0.2, saved
    assert abs(saved["dots"] - saved["full"] - dots) < 0.2, saved
    assert saved["none"] > saved["dots"] + 1, saved
    for remat in ("none", "attention", "full"):
        for a, b in zip(*map(jax.tree.leaves, (grads["dots"], grads[remat])), strict=True):
            assert max_error(a, b) < 1e-6 * max(1e-2, float(np.abs(b).max()))
    with pytest.raises(ValueError, match="remat: found 'some', expected one of none, dots, att"):
        BTLM(base, remat="some")


def lowered(platform, remat, monkeypatch) -> str:
    """Returns the program of the gradient for a platform that is not attached."""
    monkeypatch.setattr(sharding, "mesh_platform", lambda mesh: platform)
    # A separate configuration, so that no program traced here serves another platform.
    config = dataclasses.replace(
        BTLMConfig.preset("tiny"), n_positions={"tpu": 129, "gpu": 130}[platform]
    )
    model = BTLM(config, remat=remat)
    params, ids = model.init(jax.random.key(0)), np.zeros((1, 128), np.int32)
    grad = jax.jit(jax.grad(lambda p: next_token_loss(model, p, ids).nll))
    names = {"gpu": "cuda"}
    return grad.trace(params).lower(lowering_platforms=(names.get(platform, platform),)).as_text()


@pytest.mark.parametrize("remat, kernels", [("full", 4), ("attention", 3), ("dots", 3)])
def test_saved_splash_attention_is_not_recomputed(remat, kernels, monkeypatch):
    """There are one forward and two backward kernels; without residuals, another forward."""
    program = lowered("tpu", remat, monkeypatch)
    assert program.count('kernel_name = "splash_mha') == kernels


@pytest.mark.parametrize("remat, forwards", [("full", 2), ("attention", 1)])
def test_saved_cudnn_attention_is_not_recomputed(remat, forwards, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    program = lowered("gpu", remat, monkeypatch)
    assert program.count("@__cudnn$fmhaSoftmax(") == forwards
    assert program.count("@__cudnn$fmhaSoftmaxBackward(") == 1
