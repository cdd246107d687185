"""Measure the loss with its head beside the same loss of whole, and of rematerialized, logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.config import BTLMConfig
from btlm_jax.model import chunked_loss, sharding
from btlm_jax.model.head import project_logits
from btlm_jax.model.runtime import Runtime
from btlm_jax.train.bench import measure

OURS, WHOLE, REMAT = "chunked, one pass", "whole logits", "chunked, rematerialized"


def bench_loss(
    *,
    preset: str | None,
    rows: int | None,
    rounds: int,
    dtype: str | None,
    show: Callable[[object], None] = print,
) -> dict[str, Any]:
    """Times the loss and its gradients by states and head, three ways in turn, on one device.

    Ours (`chunked_loss.head_loss`), that of full logits, and a scan over chunks under
    `jax.checkpoint`, beside a large matrix product. The limit is three products of rows x V x D at
    its rate.

    Args:
      preset: of the model, for V and D. None is btlm-3b-8k on accelerators, btlm-40m on CPU.
      rows: tokens. None is 8192 on accelerators, 2048 on CPU.
      rounds: how often everything is measured.
      dtype: of the computation; None is bfloat16 on accelerators, float32 on CPU.
      show: takes each line of the report.

    Returns:
      The measurements and their conditions, as JSON can hold them: medians of seconds, and bytes
      that the compiled programs take for temporary arrays.

    Raises:
      ValueError: an unknown preset, a size below 1, or losses that differ.
    """
    cpu = jax.default_backend() == "cpu"
    config = BTLMConfig.preset(preset or ("btlm-40m" if cpu else "btlm-3b-8k"))
    rows = (2048 if cpu else 8192) if rows is None else rows
    dtype = dtype or ("float32" if cpu else "bfloat16")
    measure.check_sizes(rows=rows, rounds=rounds)
    V, D = config.vocab_size, config.n_embd
    name = "wte" if config.tie_word_embeddings else "lm_head"
    params = {name: jax.random.normal(jax.random.key(0), (V, D)) * config.initializer_range}
    h = jax.random.normal(jax.random.key(1), (1, rows, D), dtype)
    targets = jax.random.randint(jax.random.key(2), (1, rows), 0, V)
    runtime = Runtime(config, jnp.dtype(dtype), sharding.RULES, (), None, None, "none")

    compiled, losses = {}, {}
    for way, fn in _ways(runtime, rows).items():
        both: Any = jax.jit(jax.value_and_grad(fn, (0, 1)))
        compiled[way] = both.lower(params, h, targets).compile()
        losses[way] = float(compiled[way](params, h, targets)[0]) / rows
    _check_losses(losses, dtype)
    report = measure.measure_in_turn(
        compiled, (params, h, targets), rounds=rounds, dtype=dtype, flops=6.0 * rows * V * D
    )
    sizes = {"rows": rows, "vocab_size": V, "n_embd": D, "dtype": dtype}
    report |= sizes | measure.measurement_conditions()
    what = f"loss and gradients of {rows:,} rows, V {V:,}, D {D:,}"
    for line in measure.format_measurements(what, report):
        show(line)
    return report


def _ways(runtime: Runtime, rows: int) -> dict[str, Callable[..., jax.Array]]:
    """The summed loss of (params, h [1, rows, D], targets [1, rows])."""

    def ours(params, h, targets):
        return chunked_loss.head_loss(runtime, params, h, targets)[0]

    def whole(params, h, targets):
        return chunked_loss.cross_entropy(project_logits(runtime, params, h), targets).sum()

    def rematerialized(params, h, targets):
        size = next(n for n in range(min(rows, chunked_loss.ROWS), 0, -1) if rows % n == 0)
        one = jax.checkpoint(whole)
        chunks = h.reshape(-1, 1, size, h.shape[-1]), targets.reshape(-1, 1, size)
        zero = jnp.zeros((), jnp.float32)
        return jax.lax.scan(lambda sum, x: (sum + one(params, *x), None), zero, chunks)[0]

    return {OURS: ours, WHOLE: whole, REMAT: rematerialized}


def _check_losses(losses: Mapping[str, float], dtype: str) -> None:
    """Raises ValueError if the losses differ: then the ways are not the same work."""
    # Nats per token, about 11: each sums in fp32, in another order.
    tolerance = 1e-4 if dtype == "float32" else 1e-3
    if np.ptp(list(losses.values())) > tolerance:
        raise ValueError(f"the losses differ: found {losses}, expected equal ones to {tolerance}")
