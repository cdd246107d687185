"""Measures the loss with its output head beside losses of full and of rematerialized logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.config import BTLMConfig
from btlm_jax.model import chunked_loss, sharding
from btlm_jax.model.head import project_logits
from btlm_jax.model.runtime import Runtime
from btlm_jax.train.bench import measure

CHUNK_ROWS = chunked_loss.ROWS
OURS, FULL, REMAT = "chunked, one pass", "whole logits", "chunked, rematerialized"


def bench_loss(
    *,
    preset: str | None = None,
    rows: int | None = None,
    rounds: int = 5,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> dict[str, Any]:
    """Times the loss with its output head, and its gradients, in three variants in turn.

    The variants are our loss, which never materializes the full logits; the loss of full logits;
    and a scan over chunks whose logits are recomputed in the backward pass. The limit is the rate
    of a large matrix product for the three products with the head. The compiled memory of each
    variant is reported too.

    Args:
      preset: preset of the model, for the sizes of the head; by default btlm-3b-8k on accelerators,
        btlm-40m on CPU.
      rows: tokens; by default 8192 on accelerators, 2048 on CPU.
      rounds: rounds of measurements; medians are reported.
      dtype: compute dtype; by default bfloat16 on accelerators, float32 on CPU.

    Returns:
      The measurements and their conditions, for JSON.

    Raises:
      ValueError: the preset is unknown, a size is below 1, or the losses differ.
    """
    cpu = jax.default_backend() == "cpu"
    config = BTLMConfig.preset(preset or ("btlm-40m" if cpu else "btlm-3b-8k"))
    rows = (2048 if cpu else 8192) if rows is None else rows
    compute_dtype = measure.benchmark_dtype(dtype)
    measure.require_positive(rows=rows, rounds=rounds)
    V, D = config.vocab_size, config.n_embd
    head = "wte" if config.tie_word_embeddings else "lm_head"
    params = {head: jax.random.normal(jax.random.key(0), (V, D)) * config.initializer_range}
    h = jax.random.normal(jax.random.key(1), (1, rows, D), compute_dtype)
    targets = jax.random.randint(jax.random.key(2), (1, rows), 0, V)
    runtime = Runtime(config, jnp.dtype(compute_dtype), sharding.RULES, (), None, None, "none")

    programs, losses = {}, {}
    for name, loss in _variants(runtime, rows).items():
        step: Any = jax.jit(jax.value_and_grad(loss, (0, 1)))
        programs[name] = step.lower(params, h, targets).compile()
        losses[name] = float(programs[name](params, h, targets)[0]) / rows
    _check_losses(losses, compute_dtype)
    report = measure.measure_in_turn(
        programs,
        (params, h, targets),
        rounds=rounds,
        dtype=compute_dtype,
        flops=6.0 * rows * V * D,
    )
    report |= {"rows": rows, "vocab_size": V, "n_embd": D, "dtype": compute_dtype}
    report |= measure.measurement_conditions()
    title = f"loss and gradients of {rows:,} rows, V {V:,}, D {D:,}"
    for line in measure.format_measurements(title, report):
        print(line)
    return report


def _variants(runtime: Runtime, rows: int) -> dict[str, Callable[..., jax.Array]]:
    """Returns functions of (params, h [1, rows, D], targets [1, rows]) that sum the loss."""

    def ours(params, h, targets):
        return chunked_loss.head_loss(runtime, params, h, targets, rows=CHUNK_ROWS)[0]

    def full(params, h, targets):
        return chunked_loss.cross_entropy(project_logits(runtime, params, h), targets).sum()

    def rematerialized(params, h, targets):
        size = next(n for n in range(min(rows, CHUNK_ROWS), 0, -1) if rows % n == 0)
        chunk_loss = jax.checkpoint(full)
        chunks = h.reshape(-1, 1, size, h.shape[-1]), targets.reshape(-1, 1, size)
        zero = jnp.zeros((), jnp.float32)
        return jax.lax.scan(lambda sum, x: (sum + chunk_loss(params, *x), None), zero, chunks)[0]

    return {OURS: ours, FULL: full, REMAT: rematerialized}


def _check_losses(losses: Mapping[str, float], dtype: str) -> None:
    """Raises ValueError if the losses of the variants differ."""
    # Nats per token, about 11. Every variant sums in fp32, but in another order.
    tolerance = 1e-4 if dtype == "float32" else 1e-3
    if np.ptp(list(losses.values())) > tolerance:
        raise ValueError(f"the losses differ: found {losses}, expected equal ones to {tolerance}")
