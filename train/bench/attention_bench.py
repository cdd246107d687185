"""Measures attention, forward and backward, beside plain XLA and beside a full ALiBi bias."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.config import BTLMConfig
from btlm_jax.model import alibi, attention, sharding
from btlm_jax.train.bench import measure

logger = logging.getLogger(__name__)
Variant = Callable[..., jax.Array]


def bench_attention(
    *,
    preset: str = "btlm-3b-8k",
    length: int | None = None,
    batch_size: int = 1,
    rounds: int = 5,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> dict[str, Any]:
    """Times causal ALiBi attention and its gradients, in several variants in turn, on one device.

    The variants are our kernel of the platform, plain XLA where that is another one, and the usual
    way to add ALiBi elsewhere: a bias [heads, length, length], in XLA and, on GPUs, in cuDNN. The
    limit is the rate of a large matrix product for seven products per head (two forward, five
    backward), half of them masked. The compiled memory of each variant is reported too.

    Args:
      preset: preset of the model, for the number and size of its heads.
      length: tokens per sequence; by default 8192 on accelerators, 1024 on CPU.
      batch_size: sequences.
      rounds: rounds of measurements; medians are reported.
      dtype: compute dtype; by default bfloat16 on accelerators, float32 on CPU.

    Returns:
      The measurements and their conditions, for JSON; `does_not_fit` names the variants that the
      device has no memory for.

    Raises:
      ValueError: the preset is unknown, a size is below 1, the platform's kernel does not support
        the arguments, our variant needs too much memory, or the results differ.
    """
    config = BTLMConfig.preset(preset)
    platform = sharding.mesh_platform(None)
    T = (1024 if platform == "cpu" else 8192) if length is None else length
    compute_dtype = measure.benchmark_dtype(dtype)
    measure.require_positive(length=T, batch_size=batch_size, rounds=rounds)
    H, K = config.n_head, config.head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    shape = batch_size, H, T, K
    q, k, v, weight = (jax.random.normal(key, shape, compute_dtype) for key in keys)
    args = q * config.attention_scale, k, v, weight

    programs, too_large = _compile_variants(_variants(config, platform), args, compute_dtype)
    flops = 7.0 * batch_size * H * K * T * (T + 1)
    report = measure.measure_in_turn(
        programs, args, rounds=rounds, dtype=compute_dtype, flops=flops
    )
    report |= {"length": T, "batch_size": batch_size, "heads": H, "head_dim": K}
    report |= {"dtype": compute_dtype, "does_not_fit": too_large}
    report |= measure.measurement_conditions()
    title = f"attention and gradients, {batch_size} x {H} heads x {T:,} x {K}"
    for line in measure.format_measurements(title, report):
        print(line)
    for name in too_large:
        print(f"{name:<24} does not fit")
    return report


def _variants(config: BTLMConfig, platform: str) -> dict[str, Variant]:
    """Returns attention functions of (q, k, v) [B, H, T, K] by name, ours first."""
    slopes = jnp.asarray(alibi.slopes(config.n_head), jnp.float32)

    def ours(implementation):
        return lambda q, k, v: attention.attention(
            q, k, v, slopes_H=slopes, implementation=implementation
        )

    def full_bias(implementation, dtype):
        def attend(q, k, v):
            positions = jnp.arange(q.shape[2])
            bias = alibi.bias(slopes, positions, positions)[None].astype(dtype or q.dtype)
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
            return jax.nn.dot_product_attention(
                q, k, v, bias, scale=1.0, is_causal=True, implementation=implementation
            ).swapaxes(1, 2)

        return attend

    kernel = attention.FUSED.get(platform, "xla")
    variants = {f"ours: {kernel}": ours(kernel)}
    if kernel != "xla":
        variants["xla"] = ours("xla")
    variants["xla, full bias"] = full_bias("xla", jnp.float32)
    if kernel == "cudnn":
        variants["cudnn, full bias"] = full_bias("cudnn", None)
    return variants


def _compile_variants(
    variants: dict[str, Variant], args: tuple[Any, ...], dtype: str
) -> tuple[dict[str, Any], list[str]]:
    """Compiles and checks every variant.

    Returns:
      The compiled programs by name, and the names of the variants that do not fit the device.
    """
    programs, too_large, expected = {}, [], None
    for name, attend in variants.items():
        step = jax.jit(jax.grad(_weighted_sum(attend), (0, 1, 2), has_aux=True))
        try:
            program = step.lower(*args).compile()
            results = jax.device_get(program(*args))
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            message = f"{name} does not fit this device: {str(e).splitlines()[0]}"
            if expected is None:
                raise ValueError(f"{message}; use a smaller length or batch_size") from None
            logger.warning("%s", message)
            too_large.append(name)
        else:
            expected = results if expected is None else expected
            _check_results(name, results, expected, dtype)
            programs[name] = program
    return programs, too_large


def _weighted_sum(attend: Variant) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns a scalar function of the attention's output, to differentiate."""

    def loss(q, k, v, weight):
        output = attend(q, k, v)
        return jnp.vdot(output.astype(jnp.float32), weight.astype(jnp.float32)), output

    return loss


def _check_results(name: str, results: Any, expected: Any, dtype: str) -> None:
    """Raises ValueError if a variant's output or gradients differ from ours."""
    # bf16 rounds P and dS (3e-3), and a bias in bf16 changes a probability by up to 6e-2.
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(results), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        error = np.linalg.norm(a - b) / np.linalg.norm(a)
        if not error < tolerance:
            raise ValueError(f"{name} differs from ours: found {error:.2g}, expected < {tolerance}")
