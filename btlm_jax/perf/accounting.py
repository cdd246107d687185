"""Counts of parameters, FLOPs and bytes, from the configuration alone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from btlm_jax.config import BTLMConfig
from btlm_jax.model import weights
from btlm_jax.perf import chips
from btlm_jax.utils.format import format_bytes


class Flops(NamedTuple):
    """FLOPs per token; a multiply-add counts as two.

    Only matrix products count (projections, head, QK^T and PV); training takes three times the
    forward pass.

    Attributes:
      forward_full: attention over all T keys for every query, as most papers count it.
      forward_causal: attention over the (T + 1) / 2 keys that a causal query sees on average.
    """

    forward_full: float
    forward_causal: float

    @property
    def training_full(self) -> float:
        """Forward and backward pass, with full attention."""
        return 3 * self.forward_full

    @property
    def training_causal(self) -> float:
        """Forward and backward pass, with causal attention."""
        return 3 * self.forward_causal


def forward_flops(kernels: int, vocab_size: int, n_embd: int, n_layer: int, keys: float) -> float:
    """Returns the FLOPs of the forward pass for one token: 2 (kernels + V D) + 4 L D keys.

    The embedding look-up multiplies nothing and is not counted.

    Args:
      kernels: entries of all projection matrices of all layers.
      vocab_size, n_embd, n_layer: V, D and L.
      keys: number of keys that the token attends to.
    """
    return 2.0 * (kernels + vocab_size * n_embd) + 4.0 * n_layer * n_embd * keys


def flops_per_token(config: BTLMConfig, length: int) -> Flops:
    """Returns the average FLOPs per token of a sequence of T = `length` tokens.

    They are `forward_flops` with L (4 D² + n F D) kernel entries, where n is 3 for SwiGLU and 2
    otherwise, and with T or (T + 1) / 2 keys.

    Raises:
      ValueError: length < 1.
    """
    if length < 1:
        raise ValueError(f"length: found {length}, expected >= 1")
    c = config
    mlp = (3 if c.gated else 2) * c.n_inner * c.n_embd
    sizes = c.n_layer * (4 * c.n_embd**2 + mlp), c.vocab_size, c.n_embd, c.n_layer
    return Flops(forward_flops(*sizes, length), forward_flops(*sizes, (length + 1) / 2))


def model_flops_utilization(
    config: BTLMConfig, length: int, tokens_per_second: float
) -> dict[str, float]:
    """Returns the MFU of one device in both conventions; empty if the device's peak is unknown.

    Args:
      config: the model.
      length: tokens per sequence.
      tokens_per_second: rate of one device in training.

    Returns:
      "mfu" counts full attention, as most papers do; "mfu_causal" only the half that a causal model
      computes.
    """
    peak = chips.peak_flops(jax.devices()[0].device_kind)
    if peak is None:
        return {}
    flops = flops_per_token(config, length)
    return {
        "mfu": flops.training_full * tokens_per_second / peak,
        "mfu_causal": flops.training_causal * tokens_per_second / peak,
    }


def kv_bytes_per_token(config: BTLMConfig, itemsize: int = 2) -> int:
    """Returns the bytes of the KV cache per token and sequence: 2 L D * itemsize."""
    return 2 * config.n_layer * config.n_embd * itemsize


def array_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Returns the bytes of an array on a device, with two int4 per byte (NumPy counts one)."""
    n = math.prod(shape)
    return -(-n // 2) if dtype == jnp.int4 else n * dtype.itemsize


def describe_config(config: BTLMConfig, length: int) -> list[tuple[str, str]]:
    """Returns the rows that `btlm info` prints: (label, value)."""
    c, n = config, weights.count_parameters(config)
    flops = flops_per_token(c, length)
    table = weights.weight_table(c)
    by_role = {
        role: sum(_size(w, c) for w in table if w.role == role)
        for role in ("embedding", "hidden", "vector")
    }
    mup = f"width_scale {c.mup_width_scale:g}, embeddings_scale {c.mup_embeddings_scale:g}, "
    mup += f"output_alpha {c.mup_output_alpha:g}, q·k / {'K' if c.mup_scale_qk_dot_by_d else '√K'}"
    depth = f"tuned at depth {c.completep_base_layers}, alpha {c.completep_alpha:g}, residual "
    depth += f"branches times {c.residual_scale:.6g}"
    scaling = c.alibi_scaling.to_hf() if c.alibi_scaling else "none"
    return [
        (
            "shape",
            f"{c.n_layer} layers, n_embd {c.n_embd}, {c.n_head} heads of {c.head_dim}, "
            f"n_inner {c.n_inner} ({c.activation_function}), vocab {c.vocab_size}",
        ),
        ("positions", f"{c.position_embedding_type}, {c.n_positions} trained, scaling {scaling}"),
        ("muP", mup),
        *([("CompleteP", depth)] if c.completep_base_layers else []),
        ("parameters", f"{n:,} ({', '.join(f'{k} {v:,}' for k, v in by_role.items())})"),
        ("weights", f"fp32 {format_bytes(4 * n)}, bf16 {format_bytes(2 * n)}"),
        (
            "KV cache",
            f"{kv_bytes_per_token(c):,} B per token in bf16, "
            f"{format_bytes(kv_bytes_per_token(c) * length)} at {length} tokens",
        ),
        (
            f"forward FLOPs per token at {length}",
            f"{flops.forward_full:.4e} full attention, {flops.forward_causal:.4e} causal",
        ),
        (
            f"training FLOPs per token at {length}",
            f"{flops.training_full:.4e} full attention, {flops.training_causal:.4e} causal",
        ),
    ]


def _size(w: weights.Weight, c: BTLMConfig) -> int:
    n = c.n_layer if w.stacked else 1
    for size in w.shape:
        n *= size
    return n
