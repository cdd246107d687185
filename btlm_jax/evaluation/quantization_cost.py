"""Cost of quantization: the loss of one text under the original and under quantized weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from btlm_jax.checkpoint import quantization
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.config import BTLMConfig
from btlm_jax.evaluation.perplexity import CrossEntropy, cross_entropy
from btlm_jax.evaluation.rolling_windows import RollingWindows
from btlm_jax.model import weights
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params, flatten_tree
from btlm_jax.utils.format import align_columns, format_bytes


class QuantizationCost(NamedTuple):
    """A model's loss under weights of one kind."""

    kind: str
    nbytes: int  # of all weights, as a checkpoint stores them
    bits: float  # per parameter
    loss: CrossEntropy


def compare_quantizations(
    model: BTLM,
    params: Params,
    windows: RollingWindows,
    quantizations: Sequence[Quantization],
    *,
    batch_size: int | None = None,
) -> list[QuantizationCost]:
    """Computes the loss of the original weights, then of each quantization, made in memory.

    On a CPU, products with int8 weights round their other inputs to int8 too
    (`packed.packed_matmul`).

    Args:
      model, params: the model with float weights, stacked, on one device.
      windows: from `cut_rolling_windows`.
      quantizations: the quantizations to compare.
      batch_size: as in `cross_entropy`.

    Raises:
      ValueError, FloatingPointError: as in `quantization.quantize_params` and `cross_entropy`.
    """
    config, dtype = model.config, params["wte"].dtype
    costs = []
    for scheme in (None, *quantizations):
        if scheme is None:
            kind, tested_params = str(dtype), params
        else:
            kind = f"int{scheme.bits}" + (f":{scheme.group}" if scheme.group else "")
            tested_params = quantization.quantize_params(params, config, scheme)
        loss = cross_entropy(model, tested_params, windows, batch_size=batch_size, title=kind)
        nbytes = _stored_bytes(config, params, scheme)
        bits = 8 * nbytes / weights.count_parameters(config)
        costs.append(QuantizationCost(kind, nbytes, bits, loss))
    return costs


def _stored_bytes(config: BTLMConfig, params: Params, scheme: Quantization | None) -> int:
    dtypes = {path: x.dtype for path, x in flatten_tree(params).items()}
    return sum(
        math.prod(leaf.shape) * jnp.dtype(leaf.dtype or dtypes[leaf.weight.path]).itemsize
        for leaf in quantization.stored_leaves(config, scheme)
    )


def format_quantization_costs(costs: Sequence[QuantizationCost]) -> list[str]:
    """Returns a table, as lines: every kind of weights, and its change against the first."""
    baseline = costs[0].loss
    cells = [("weights", "bytes", "bits each", "nats/token", "change", "perplexity", "change")]
    for cost in costs:
        nats, perplexity = cost.loss.nats_per_token, cost.loss.perplexity
        cells.append((
            cost.kind, format_bytes(cost.nbytes), f"{cost.bits:.2f}", f"{nats:.5f}",
            f"{nats - baseline.nats_per_token:+.5f}", f"{perplexity:.4f}",
            f"{perplexity / baseline.perplexity - 1:+.3%}",
        ))  # fmt: skip
    lines = align_columns(cells)
    if jax.default_backend() == "cpu" and any(cost.kind == "int8" for cost in costs):
        lines.append("int8 on a CPU: the inputs of the layers' products are rounded to int8 too")
    return lines


def quantization_costs_json(costs: Sequence[QuantizationCost]) -> list[dict[str, Any]]:
    """Returns the costs as JSON objects."""
    return [
        {"weights": cost.kind, "bytes": cost.nbytes, "bits_per_weight": cost.bits}
        | cost.loss.metrics()
        for cost in costs
    ]
