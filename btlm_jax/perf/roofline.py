"""Lower bounds on the time of a step: work from formulas, divided by the rates of a device.

All amounts are per device and step (or decoded token). `flops` and `hbm` are formulas of the
configuration, with weights and activations in bf16 (2 bytes) and fp32 masters; network bytes are a
formula (`network_bytes`) or counted in the compiled program (`hlo`). P is the number of parameters,
A the number of microbatches in a step, R the number of tokens per device and step.

Rates are those of the data sheets. The kinds of work either overlap fully (`TimeBound.seconds`) or
not at all (`TimeBound.in_turn`).
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
    """The work of one device in a step."""

    flops: float
    hbm: float  # bytes read and written
    ici: float  # bytes received within the slice
    dcn: float = 0.0  # bytes received from other slices


class TimeBound(NamedTuple):
    """Lower bounds in seconds, one for each kind of work."""

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        """The time of a step in which all work overlaps: the longest."""
        return max(self)

    @property
    def in_turn(self) -> float:
        """The time of a step in which nothing overlaps: the sum."""
        return sum(self)

    @property
    def limit(self) -> str:
        """The name of the kind of work that takes longest."""
        return self._fields[self.index(max(self))]


def time_bound(work: DeviceWork, rates: Rates) -> TimeBound:
    """Divides work by rates; infinite for work on a link that does not exist."""

    def seconds(amount: float, rate: float) -> float:
        return amount / rate if rate else math.inf if amount else 0.0

    return TimeBound(
        seconds(work.flops, rates.flops),
        seconds(work.hbm, rates.hbm),
        seconds(work.ici, rates.ici),
        seconds(work.dcn, rates.dcn),
    )


def recomputed_flops_per_token(config: BTLMConfig, length: int, remat: Remat) -> float:
    """Returns the FLOPs per token that the backward pass recomputes.

    "full" repeats the forward pass of the layers, "attention" the same without QK^T and PV, "dots"
    and "none" no product. Recomputation inside fused attention and the chunked loss does not depend
    on the policy and is not counted.
    """
    if remat in ("none", "dots"):
        return 0.0
    head = 2.0 * config.vocab_size * config.n_embd
    layers = accounting.flops_per_token(config, length).forward_causal - head
    attention = 2.0 * config.n_layer * config.n_embd * (length + 1)
    return layers if remat == "full" else layers - attention


def saved_bytes_per_token(config: BTLMConfig, remat: Remat) -> int:
    """Returns the bytes per token and layer that the forward pass saves for the backward pass.

    In units of bf16 numbers, with M = F (2 F if gated): "full" saves the input of the layer, D;
    "attention" also the result of attention and a log-sum-exp per head in fp32, 2 D + 2 H; "dots"
    the input and the results of attention and of every product but the last, which is not needed,
    6 D + M; "none" also the results of both LayerNorms and the activations of the MLP,
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
    """Returns the work of a training step with AdamW, fp32 masters and bf16 products.

    FLOPs: R (3 forward_causal + recomputed), where R = tokens / devices for every mesh.
    HBM: the gathered weights are written and read once for the forward pass and once for the
    backward pass (and read once more for recomputation), A times, 2 bytes for each of P / tensor;
    gradients are written and read in fp32; the update reads and writes p, m and v, 24 bytes for
    each of P / (fsdp context tensor); saved activations are written and read once.
    Network: `network_bytes`, all of it within one slice.

    Args:
      config: configuration of the model.
      mesh: sizes of `sharding.AXES`.
      length: T, tokens per sequence.
      tokens: tokens of the whole step, over all devices.
      microbatches: A, microbatches in a step.
      remat: rematerialization policy.
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
    # Every device of a tensor group holds the full input of a layer; the rest is sharded.
    rows = tokens * tensor / devices
    full_input = saved_bytes_per_token(c, "full")
    saved = (
        c.n_layer * rows * (full_input + (saved_bytes_per_token(c, remat) - full_input) / tensor)
    )
    return DeviceWork(flops, gathered + gradients + update + 2 * saved, network_bytes(
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
    """Returns the bytes that a device receives in a training step within one slice.

    A gather or scatter over g devices moves (g - 1) / g of an array. Weights are gathered in bf16
    for the forward and the backward pass and their gradients scattered in fp32, A times, over
    fsdp x context; gradients are summed over data. The residual stream is summed over tensor (as a
    scatter and a gather, 2 bytes each) twice per layer and direction, and once more for each
    recomputed product. Keys and values are gathered over context and their gradients scattered.
    """
    c, devices = config, math.prod(mesh.values())
    P, tensor = weights.count_parameters(c), mesh["tensor"]
    shards = mesh["fsdp"] * mesh["context"]
    rows = tokens * tensor / devices  # tokens that a tensor group shares

    def ring(nbytes: float, g: int) -> float:
        return nbytes * (g - 1) / g

    recomputed = 0 if remat in ("none", "dots") else 1
    fsdp = microbatches * ring((2 * _BF16 + _FP32) * P / tensor, shards)
    data = microbatches * ring(2 * _FP32 * P / tensor / shards, mesh["data"])
    stream = c.n_layer * (4 + recomputed) * 2 * ring(_BF16 * rows * c.n_embd, tensor)
    keys = (3 + recomputed) * 2 * _BF16 * rows * mesh["context"] * c.n_embd / tensor
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
    """Returns a cheap estimate of a training step's peak bytes per device; the compiler is exact.

    It counts the state (p, m, v) and gradients in fp32, gradients twice if microbatches accumulate;
    saved activations; the gathered embedding in bf16 and its gradient; the gathered weights and
    gradients of two layers; and, for the layer that is being differentiated, three times the
    activations that one layer saves under "none".
    """
    c, devices = config, math.prod(mesh.values())
    P, tensor = weights.count_parameters(c), mesh["tensor"]
    rows = microbatch * length * tensor / devices
    full_input = saved_bytes_per_token(c, "full")

    def saved(policy: Remat) -> float:
        return rows * (full_input + (saved_bytes_per_token(c, policy) - full_input) / tensor)

    state = (12 + 4 + 4 * (microbatches > 1)) * P / (mesh["fsdp"] * mesh["context"] * tensor)
    embedding = c.vocab_size * c.n_embd
    layer = (P - embedding) / c.n_layer
    gathered = ((_BF16 + _FP32) * embedding + 2 * (_BF16 + _FP32) * layer) / tensor
    return state + c.n_layer * saved(remat) + gathered + 3 * saved("none")


def decoding_work(
    config: BTLMConfig,
    mesh: Mapping[str, int],
    *,
    batch_size: int,
    capacity: int,
    weight_bytes: float | None = None,
    slot_bytes: float | None = None,
) -> DeviceWork:
    """Returns the work of one decoding step: a token per sequence, against `capacity` slots.

    Every weight (1 / tensor of the model) and every slot of the cache is read once. The residual
    stream is summed over tensor twice per layer, and weights are gathered over fsdp x context: give
    these axes size 1 for fast decoding.

    Args:
      config: configuration of the model.
      mesh: sizes of `sharding.AXES`.
      batch_size: sequences, over all devices.
      capacity: slots of the cache.
      weight_bytes: bytes of all weights; None counts bf16.
      slot_bytes: bytes of one slot of the cache, over all layers; None counts bf16.
    """
    c = config
    tensor, shards = mesh["tensor"], mesh["fsdp"] * mesh["context"]
    # Sequences are sharded over data and fsdp; the devices of context repeat the same work.
    rows = batch_size / (mesh["data"] * mesh["fsdp"])
    flops = rows / tensor * (accounting.flops_per_token(c, 1).forward_full
                             + 4.0 * c.n_layer * c.n_embd * (capacity - 1))  # fmt: skip
    local_weights = (weight_bytes or _BF16 * weights.count_parameters(c)) / tensor
    cache = rows / tensor * capacity * (slot_bytes or accounting.kv_bytes_per_token(c, _BF16))
    written = 2 * local_weights if shards > 1 else 0.0  # when shards are gathered
    stream = 2 * 2 * c.n_layer * _BF16 * rows * c.n_embd * (tensor - 1) / tensor
    received = local_weights * (shards - 1) / shards + stream
    return DeviceWork(flops, local_weights + written + cache, received)
