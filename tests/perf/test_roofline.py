"""Lower bounds against sums by hand."""

from __future__ import annotations

import math

import pytest

from btlm_jax import BTLMConfig
from btlm_jax.model import weights
from btlm_jax.perf import accounting, roofline
from btlm_jax.perf.chips import CHIPS, Rates
from btlm_jax.perf.roofline import DeviceWork, TimeBound

B3 = BTLMConfig.preset("btlm-3b-8k")
P, D, F, L, V = 2_646_255_744, 2560, 6826, 32, 50257
ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}


def test_time_bound_is_work_over_rates():
    rates = Rates(flops=100.0, hbm=10.0, ici=5.0, dcn=0.0, memory=1)
    b = roofline.time_bound(DeviceWork(flops=200.0, hbm=30.0, ici=5.0), rates)
    assert b == TimeBound(2.0, 3.0, 1.0, 0.0)
    assert (b.seconds, b.in_turn, b.limit) == (3.0, 6.0, "hbm")
    across = roofline.time_bound(DeviceWork(1.0, 1.0, 1.0, 1.0), rates)
    assert across.seconds == math.inf and across.limit == "dcn"


def test_training_step_on_sixteen_v5e():
    """One 8k sequence per chip with full recomputation."""
    mesh = ONE | {"fsdp": 16}
    tokens = 16 * 8192
    work = roofline.training_work(
        B3, mesh, length=8192, tokens=tokens, microbatches=1, remat="full"
    )
    products = 2 * L * (4 * D * D + 3 * F * D)
    attention = 2 * L * D * 8193  # (T + 1) / 2 keys, QK^T and PV, two FLOPs each
    head = 2 * V * D
    assert work.flops == pytest.approx(8192 * (4 * (products + attention) + 3 * head), rel=1e-12)
    # Gathered weights: written and read twice, and read again; gradients; p, m, v; layer inputs.
    hbm = 5 * 2 * P + 8 * P / 16 + 24 * P / 16 + 2 * L * 8192 * 2 * D
    assert work.hbm == pytest.approx(hbm, rel=1e-12)
    assert work.ici == pytest.approx(15 / 16 * 8 * P, rel=1e-12)
    b = roofline.time_bound(work, CHIPS["v5e"].per_device((4, 4)))
    assert b.limit == "compute" and b.compute == pytest.approx(work.flops / 197e12)
    assert b.ici == pytest.approx(work.ici / 90e9)


def test_recomputed_flops_and_saved_bytes_by_policy():
    full, attention, dots, none = (
        roofline.recomputed_flops_per_token(B3, 8192, r)
        for r in ("full", "attention", "dots", "none")
    )
    layers = accounting.flops_per_token(B3, 8192).forward_causal - 2 * V * D
    assert full == layers and dots == none == 0
    assert full - attention == 2 * L * D * 8193
    saved = [roofline.saved_bytes_per_token(B3, r) for r in ("full", "attention", "dots", "none")]
    assert saved == [2 * D, 2 * (2 * D + 64), 2 * (6 * D + 2 * F), 2 * (8 * D + 4 * F)]


def test_network_over_every_axis():
    def received(**mesh):
        return roofline.network_bytes(B3, ONE | mesh, tokens=8192, microbatches=2, remat="dots")

    assert received() == 0
    assert received(fsdp=4) == pytest.approx(2 * 3 / 4 * 8 * P)
    # Sums over data: a scatter and a gather of each device's shard of the fp32 gradients.
    assert received(data=4) == pytest.approx(2 * 3 / 4 * 8 * P)
    assert received(data=2, fsdp=2) == pytest.approx(2 * (1 / 2 * 8 * P + 1 / 2 * 8 * P / 2))
    # Four sums of the residual stream per layer, each a scatter and a gather in bf16.
    assert received(tensor=2) == pytest.approx(L * 4 * 2 * 1 / 2 * 2 * 8192 * D)
    # Keys and values of the sequence gathered twice, and their gradients scattered once.
    context = received(context=2) - 2 * 1 / 2 * 8 * P
    assert context == pytest.approx(L * 3 * 2 * 1 / 2 * 2 * 8192 * D)


def test_memory_estimate_follows_policy_and_mesh():
    def needed(remat="full", micro=16, **mesh):
        return roofline.training_memory(
            B3, ONE | {"fsdp": 16} | mesh, length=8192, microbatch=micro, microbatches=1,
            remat=remat,
        )  # fmt: skip

    policies = [needed(r) for r in ("full", "attention", "dots", "none")]
    assert policies == sorted(policies)
    assert needed(micro=32) > needed() > needed(fsdp=32, micro=16)
    assert needed("dots", tensor=2) < needed(
        "dots", micro=32
    )  # the same number of tokens per device
    assert needed() > 16 * P / 16  # the state and gradients alone


def test_decoding_reads_weights_and_cache_once():
    work = roofline.decoding_work(B3, ONE, batch_size=4, capacity=2048)
    assert work.hbm == 2 * weights.count_parameters(B3) + 4 * 2048 * 327_680
    assert work.flops == 4 * (2 * (L * (4 * D * D + 3 * F * D) + V * D) + 4 * L * D * 2048)
    assert work.ici == 0
    split = roofline.decoding_work(B3, ONE | {"tensor": 4}, batch_size=4, capacity=2048)
    assert split.hbm == work.hbm / 4 and split.flops == work.flops / 4
    assert split.ici == 4 * L * 2 * 4 * D * 3 / 4
    sharded = roofline.decoding_work(B3, ONE | {"fsdp": 4}, batch_size=4, capacity=2048)
    assert sharded.ici == 2 * P * 3 / 4
