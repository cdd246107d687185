"""Measure attention, forward and backward, beside plain XLA and beside a full bias."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.config import BTLMConfig
from btlm_jax.model import alibi, attention, sharding
from btlm_jax.train.bench import measure

logger = logging.getLogger(__name__)


def bench_attention(
    *,
    preset: str,
    length: int | None,
    batch_size: int,
    rounds: int,
    dtype: str | None,
    show: Callable[[object], None] = print,
) -> dict[str, Any]:
    """Times causal ALiBi attention and its gradients, several ways in turn, on one device.

    Ours, by the kernel of the platform (`attention.FUSED`) whatever else could serve; plain XLA,
    where that is another; and what ALiBi takes elsewhere: a bias [H, T, T], in XLA and, on a GPU,
    in cuDNN. The limit is seven products of T x T x K per head
    (two forward, five backward), of which causality leaves half, at the rate of a large matrix
    product.

    Args:
      preset: of the model, for heads and their size.
      length: tokens per sequence. None is 8192 on accelerators, 1024 on CPU.
      batch_size: sequences.
      rounds: how often everything is measured.
      dtype: of the computation; None is bfloat16 on accelerators, float32 on CPU.
      show: takes each line of the report.

    Returns:
      The measurements and their conditions, as JSON can hold them; `does_not_fit` names the peers
      that the device has no memory for.

    Raises:
      ValueError: an unknown preset, a size below 1, a kernel that cannot serve, no memory for ours,
        or results that differ.
    """
    config = BTLMConfig.preset(preset)
    platform = sharding.mesh_platform(None)
    T = (1024 if platform == "cpu" else 8192) if length is None else length
    dtype = dtype or ("float32" if platform == "cpu" else "bfloat16")
    measure.check_sizes(length=T, batch_size=batch_size, rounds=rounds)
    H, K = config.n_head, config.head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (jax.random.normal(key, (batch_size, H, T, K), dtype) for key in keys)
    args = q * config.attention_scale, k, v, weight

    compiled, too_large, ours = {}, [], None
    for way, fn in _ways(config, platform).items():
        both = jax.jit(jax.grad(_weighted(fn), (0, 1, 2), has_aux=True))
        try:
            program = both.lower(*args).compile()
            found = jax.device_get(program(*args))
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            why = f"{way} does not fit this device: {str(e).splitlines()[0]}"
            if ours is None:
                raise ValueError(f"{why}; use a smaller length or batch_size") from None
            logger.warning("%s", why)
            too_large.append(way)
        else:
            ours = found if ours is None else ours
            _check_equal(way, found, ours, dtype)
            compiled[way] = program
    flops = 7.0 * batch_size * H * K * T * (T + 1)
    report = measure.measure_in_turn(compiled, args, rounds=rounds, dtype=dtype, flops=flops)
    report |= {"length": T, "batch_size": batch_size, "heads": H, "head_dim": K, "dtype": dtype}
    report |= {"does_not_fit": too_large} | measure.measurement_conditions()
    what = f"attention and gradients, {batch_size} x {H} heads x {T:,} x {K}"
    for line in measure.format_measurements(what, report):
        show(line)
    for way in too_large:
        show(f"{way:<24} does not fit")
    return report


def _ways(config: BTLMConfig, platform: str) -> dict[str, Callable[..., jax.Array]]:
    """Attention of (q, k, v) by name, ours first."""
    slopes = jnp.asarray(alibi.slopes(config.n_head), jnp.float32)

    def of(implementation):
        return lambda q, k, v: attention.attention(
            q, k, v, slopes=slopes, implementation=implementation
        )

    def full_bias(implementation, dtype):
        def attend(q, k, v):
            at = jnp.arange(q.shape[2])
            bias = alibi.bias(slopes, at, at)[None].astype(dtype or q.dtype)
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
            return jax.nn.dot_product_attention(
                q, k, v, bias, scale=1.0, is_causal=True, implementation=implementation
            ).swapaxes(1, 2)

        return attend

    name = attention.FUSED.get(platform, "xla")
    ways = {f"ours: {name}": of(name)} | ({} if name == "xla" else {"xla": of("xla")})
    ways["xla, full bias"] = full_bias("xla", jnp.float32)
    if name == "cudnn":
        ways["cudnn, full bias"] = full_bias("cudnn", None)
    return ways


def _weighted(fn):
    def loss(q, k, v, weight):
        out = fn(q, k, v)
        return jnp.vdot(out.astype(jnp.float32), weight.astype(jnp.float32)), out

    return loss


def _check_equal(way: str, found: Any, ours: Any, dtype: str) -> None:
    """Raises ValueError if output or gradients are not those of ours: then it is other work."""
    # bf16 rounds P and dS (3e-3), and a bias in bf16 is wrong by up to 6e-2 in a probability.
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(found), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        error = np.linalg.norm(a - b) / np.linalg.norm(a)
        if not error < tolerance:
            raise ValueError(f"{way} differs from ours: found {error:.2g}, expected < {tolerance}")
