"""How fast a step could be at best: work from formulas, divided by what a device can do.

All is per device and step (or decoded token). `flops` and `hbm` are formulas of the configuration,
with weights and activations in bf16 (2 bytes) and fp32 masters; what crosses the network is a
formula here (`network`) or counted in the compiled program (`hlo`). N is the number of weights in
the products (layers and head), P all of them, A the microbatches of a step, R the tokens per
device and step.

Every bound is a lower one: work at the data sheet's rates, each kind wholly overlapped with the
others (`Bound.seconds`), or one after another (`Bound.in_turn`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from btlm_jax.config import BTLMConfig
from btlm_jax.model import weights
from btlm_jax.model.remat import Remat
from btlm_jax.perf import accounting
from btlm_jax.perf.chips import Rates

_BF16, _FP32 = 2, 4


class DeviceWork(NamedTuple):
    """What a device does in a step."""

    flops: float
    hbm: float  # bytes read and written
    ici: float  # bytes received within the slice
    dcn: float = 0.0  # bytes received from other slices


class TimeBound(NamedTuple):
    """The least seconds each kind of work takes."""

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        """Of a step in which all overlap: the longest."""
        return max(self)

    @property
    def in_turn(self) -> float:
        """Of a step in which nothing overlaps: the sum."""
        return sum(self)

    @property
    def limit(self) -> str:
        """What the longest is."""
        return self._fields[self.index(max(self))]


def time_bound(work: DeviceWork, rates: Rates) -> TimeBound:
    """Work over rates. Infinite where there is work and no such link."""

    def over(amount: float, rate: float) -> float:
        return amount / rate if rate else math.inf if amount else 0.0

    return TimeBound(
        over(work.flops, rates.flops),
        over(work.hbm, rates.hbm),
        over(work.ici, rates.ici),
        over(work.dcn, rates.dcn),
    )


def recomputed_flops_per_token(config: BTLMConfig, length: int, remat: Remat) -> float:
    """FLOPs per token that the backward pass repeats.

    "full" repeats the layers' forward pass, "attention" that without attention itself (QK^T and
    PV), "dots" and "none" no product. What fused attention and a chunked loss recompute inside
    themselves is not counted: it is their own choice, whatever the policy.
    """
    if remat in ("none", "dots"):
        return 0.0
    head = 2.0 * config.vocab_size * config.n_embd
    layers = accounting.flops_per_token(config, length).forward_causal - head
    attention = 2.0 * config.n_layer * config.n_embd * (length + 1)
    return layers if remat == "full" else layers - attention


def kept_bytes_per_token(config: BTLMConfig, remat: Remat) -> int:
    """Bytes per token and layer that the forward pass keeps for the backward pass.

    In units of bf16 numbers, with M = F (2 F if gated): "full" the layer's input, D; "attention"
    also its result and, in fp32, a log-sum-exp per head, 2 D + 2 H; "dots" the input and the
    results of attention and of every product but the last, which nothing needs again, 6 D + M;
    "none" also what lies between, both LayerNorms' results and the MLP's activations,
    8 D + M + 2 F.
    """
    c = config
    mlp = (2 if c.gated else 1) * c.n_inner
    numbers = {
        "full": c.n_embd,
        "attention": 2 * c.n_embd + 2 * c.n_head,
        "dots": 6 * c.n_embd + mlp,
        "none": 8 * c.n_embd + mlp + 2 * c.n_inner,
    }
    return _BF16 * numbers[remat]


def training_work(
    config: BTLMConfig,
    mesh: Mapping[str, int],
    *,
    length: int,
    tokens: int,
    microbatches: int,
    remat: Remat,
) -> DeviceWork:
    """The work of a training step with AdamW, fp32 masters and bf16 products; network by formula.

    FLOPs: R (3 forward_causal + recomputed), R = tokens / devices whatever the mesh.
    HBM: the gathered weights are written and read once for the forward pass and once for the
    backward pass (and read once more to recompute), A times, 2 bytes of each of P / tensor;
    gradients are written and read in fp32; the update reads p, m, v and writes them, 24 bytes of
    each of P / (fsdp context tensor); what is kept for the backward pass is written and read once.

    Args:
      mesh: sizes of `sharding.AXES`.
      length: T.
      tokens: of the whole step, over all devices.
      microbatches: A.
      remat: policy.
    """
    c = config
    devices = math.prod(mesh.values())
    share = tokens / devices  # heads, MLP and vocabulary are split over "tensor": R in effect
    flops = share * (
        3 * accounting.flops_per_token(c, length).forward_causal
        + recomputed_flops_per_token(c, length, remat)
    )
    P, tensor = weights.count_parameters(c), mesh["tensor"]
    shards = mesh["fsdp"] * mesh["context"] * tensor
    uses = 4 if remat in ("none", "dots") else 5
    gathered = microbatches * uses * _BF16 * P / tensor
    gradients = microbatches * 2 * _FP32 * P / shards
    update = 6 * _FP32 * P / shards
    # The layers' input is whole on every device of a tensor group, the rest is split.
    rows = tokens * tensor / devices
    whole = kept_bytes_per_token(c, "full")
    kept = c.n_layer * rows * (whole + (kept_bytes_per_token(c, remat) - whole) / tensor)
    return DeviceWork(flops, gathered + gradients + update + 2 * kept, network_bytes(
        c, mesh, tokens=tokens, microbatches=microbatches, remat=remat,
    ))  # fmt: skip


def network_bytes(
    config: BTLMConfig,
    mesh: Mapping[str, int],
    *,
    tokens: int,
    microbatches: int,
    remat: Remat,
) -> float:
    """Bytes that a device receives in a training step if all its devices are in one slice.

    Over g devices (g - 1) / g of what is gathered or scattered. Weights are gathered in bf16 for
    the forward and the backward pass and their gradients scattered in fp32, A times, over
    fsdp x context, and gradients summed over data; the residual stream is summed over tensor (as a
    scatter and a gather, 2 bytes each) twice per layer and direction, and once more per product
    that is recomputed; keys and values are gathered over context and their gradients scattered.
    """
    c, devices = config, math.prod(mesh.values())
    P, tensor = weights.count_parameters(c), mesh["tensor"]
    shards = mesh["fsdp"] * mesh["context"]
    rows = tokens * tensor / devices  # a tensor group has these tokens in common

    def ring(nbytes: float, g: int) -> float:
        return nbytes * (g - 1) / g

    again = 0 if remat in ("none", "dots") else 1
    fsdp = microbatches * ring((2 * _BF16 + _FP32) * P / tensor, shards)
    data = microbatches * ring(2 * _FP32 * P / tensor / shards, mesh["data"])
    stream = c.n_layer * (4 + again) * 2 * ring(_BF16 * rows * c.n_embd, tensor)
    keys = (3 + again) * 2 * _BF16 * rows * mesh["context"] * c.n_embd / tensor
    return fsdp + data + stream + c.n_layer * ring(keys, mesh["context"])


def training_memory(
    config: BTLMConfig,
    mesh: Mapping[str, int],
    *,
    length: int,
    microbatch: int,
    microbatches: int,
    remat: Remat,
) -> float:
    """A cheap estimate of a training step's peak bytes per device; the compiler knows better.

    State (p, m, v) and gradients in fp32, twice where microbatches add up; what is kept for the
    backward pass; the embedding gathered in bf16 and its gradient; two layers' gathered weights and
    gradients; three times what one layer keeps under "none", for the layer that is differentiated.
    """
    c, devices = config, math.prod(mesh.values())
    P, tensor = weights.count_parameters(c), mesh["tensor"]
    rows = microbatch * length * tensor / devices
    whole = kept_bytes_per_token(c, "full")

    def kept(policy: Remat) -> float:
        return rows * (whole + (kept_bytes_per_token(c, policy) - whole) / tensor)

    state = (12 + 4 + 4 * (microbatches > 1)) * P / (mesh["fsdp"] * mesh["context"] * tensor)
    embedding = c.vocab_size * c.n_embd
    layer = (P - embedding) / c.n_layer
    gathered = ((_BF16 + _FP32) * embedding + 2 * (_BF16 + _FP32) * layer) / tensor
    return state + c.n_layer * kept(remat) + gathered + 3 * kept("none")


def decoding_work(
    config: BTLMConfig,
    mesh: Mapping[str, int],
    *,
    batch_size: int,
    capacity: int,
    weight_bytes: float | None = None,
    slot_bytes: float | None = None,
) -> DeviceWork:
    """The work of one decoding step: a token for every sequence, against `capacity` slots.

    Every weight (gathered: / tensor) and every slot of the cache is read once. The residual stream
    is summed over tensor twice per layer, and the weights are gathered over fsdp x context, which
    training shards them by: give those axes size 1 to decode fast.

    Args:
      batch_size: sequences, over all devices.
      capacity: slots of the cache.
      weight_bytes: of the whole model; None is bf16.
      slot_bytes: of a slot of the cache, over all layers; None is bf16.
    """
    c = config
    tensor, shards = mesh["tensor"], mesh["fsdp"] * mesh["context"]
    # Sequences are split over data and fsdp; every device of context repeats the same.
    rows = batch_size / (mesh["data"] * mesh["fsdp"])
    flops = rows / tensor * (accounting.flops_per_token(c, 1).forward_full
                             + 4.0 * c.n_layer * c.n_embd * (capacity - 1))  # fmt: skip
    held = (weight_bytes or _BF16 * weights.count_parameters(c)) / tensor
    cache = rows / tensor * capacity * (slot_bytes or accounting.kv_bytes_per_token(c, _BF16))
    written = 2 * held if shards > 1 else 0.0  # as shards are gathered
    stream = 2 * 2 * c.n_layer * _BF16 * rows * c.n_embd * (tensor - 1) / tensor
    return DeviceWork(flops, held + written + cache, held * (shards - 1) / shards + stream)
