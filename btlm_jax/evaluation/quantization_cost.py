"""What quantizing costs: the same text under a model's own weights and under quantized ones."""

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
from btlm_jax.evaluation.windows import Windows
from btlm_jax.model import weights
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params, flatten_tree
from btlm_jax.utils.format import align_columns, format_bytes


class Row(NamedTuple):
    """A model's loss under weights of one kind."""

    kind: str
    nbytes: int  # of all weights, as a checkpoint stores them
    bits: float  # of them for each parameter
    found: CrossEntropy


def compare(
    model: BTLM,
    params: Params,
    windows: Windows,
    kinds: Sequence[Quantization],
    *,
    batch_size: int | None = None,
) -> list[Row]:
    """The loss of the weights as they are, and quantized in memory to each kind.

    On a CPU, products with int8 weights round their other inputs to int8 too
    (`packed.packed_matmul`).

    Args:
      model, params: with float weights, stacked, on one device.
      windows: from `windows.cut`.
      kinds: what to quantize to.
      batch_size: as for `cross_entropy`.

    Raises:
      ValueError, FloatingPointError: as `quantization.quantize_params` and `cross_entropy`.
    """
    config, dtype = model.config, params["wte"].dtype
    rows = []
    for to in (None, *kinds):
        kind = str(dtype) if to is None else f"int{to.bits}" + (f":{to.group}" if to.group else "")
        used = params if to is None else quantization.quantize_params(params, config, to)
        found = cross_entropy(model, used, windows, batch_size=batch_size, title=kind)
        nbytes = _stored_bytes(config, params, to)
        rows.append(Row(kind, nbytes, 8 * nbytes / weights.count_parameters(config), found))
    return rows


def _stored_bytes(config: BTLMConfig, params: Params, to: Quantization | None) -> int:
    own = {path: x.dtype for path, x in flatten_tree(params).items()}
    return sum(
        math.prod(leaf.shape) * jnp.dtype(leaf.dtype or own[leaf.weight.path]).itemsize
        for leaf in quantization.stored_leaves(config, to)
    )


def table(rows: Sequence[Row]) -> list[str]:
    """Lines to print: every kind, and its changes against the first."""
    own = rows[0].found
    cells = [("weights", "bytes", "bits each", "nats/token", "change", "perplexity", "change")]
    for row in rows:
        nats, perplexity = row.found.nats_per_token, row.found.perplexity
        cells.append((
            row.kind, format_bytes(row.nbytes), f"{row.bits:.2f}", f"{nats:.5f}",
            f"{nats - own.nats_per_token:+.5f}", f"{perplexity:.4f}",
            f"{perplexity / own.perplexity - 1:+.3%}",
        ))  # fmt: skip
    lines = align_columns(cells)
    if jax.default_backend() == "cpu" and any(row.kind == "int8" for row in rows):
        lines.append("int8 on a CPU: the inputs of the layers' products are rounded to int8 too")
    return lines


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same as objects, for a file."""
    return [
        {"weights": row.kind, "bytes": row.nbytes, "bits_per_weight": row.bits}
        | row.found.numbers()
        for row in rows
    ]
