"""ALiBi: slopes, linear scaling, the relative bias, and the bias as four query/key features.

Press et al., "Train Short, Test Long" (2022); scaling as in Position Interpolation for ALiBi
(arXiv 2310.13017). The bias of head h is -(slope_h / scale) * |key - query|, with positions counted
in slots, so left padding needs no position ids.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.config import AlibiScaling, BTLMConfig

# A position is split into hi + lo, where hi is a multiple of this base with 8 significant bits and
# |lo| is at most half of it, 256. It is the largest base for which every lo is exact in bf16.
_BASE = 512
# Positions from 0 to MAX_POSITIONS - 1 are exact.
MAX_POSITIONS = _BASE * 256 + _BASE // 2


def slopes(n_head: int) -> np.ndarray:
    """Returns the exact slopes of `n_head` heads, float64 [H].

    If H is a power of two they are 2**(-8 (i + 1) / H). Otherwise they are the slopes of p heads,
    the largest power of two below H, followed by every second slope of 2p heads (appended, not
    interleaved, as in the original).
    """
    p = 1 << (n_head.bit_length() - 1)
    p_slopes = 2.0 ** (-8.0 * np.arange(1, p + 1) / p)
    if p == n_head:
        return p_slopes
    return np.concatenate([p_slopes, slopes(2 * p)[0::2][: n_head - p]])


def model_slopes(config: BTLMConfig) -> np.ndarray:
    """Returns the slopes a model uses, float64 [H]: the stored ones if any, else the exact ones."""
    if config.alibi_slopes is not None:
        return np.asarray(config.alibi_slopes, np.float64)
    return slopes(config.n_head)


def scale(scaling: AlibiScaling | None, key_length: int | jax.Array) -> float | jax.Array:
    """Returns the divisor of every distance for `key_length` keys, cache and padding included.

    It is a float if known at trace time, and an fp32 array for dynamic scaling of a traced length.
    """
    if scaling is None:
        return 1.0
    trained = scaling.train_seq_len
    if trained is None:
        assert scaling.factor is not None  # exactly one of the two is set
        return scaling.factor
    if isinstance(key_length, jax.Array):
        return jnp.maximum(1.0, key_length.astype(jnp.float32) / trained)
    return max(1.0, key_length / trained)


def scale_varies(scaling: AlibiScaling | None, max_length: int) -> bool:
    """Returns whether `scale` depends on the length, up to `max_length` keys.

    If so, a result depends on the padded length of its batch.
    """
    return bool(scale(scaling, 1) != scale(scaling, max_length))


def bias(slopes_H: jax.Array, query_T: jax.Array, key_S: jax.Array) -> jax.Array:
    """Computes the ALiBi bias from integer positions, fp32 [H, T, S].

    Args:
      slopes_H: fp32, already divided by the scale.
      query_T, key_S: int32 positions in slots.
    """
    distance_TS = jnp.abs(key_S[None, :] - query_T[:, None]).astype(jnp.float32)
    return -slopes_H.astype(jnp.float32)[:, None, None] * distance_TS


# The bias as features ---------------------------------------------------------------------------
#
# Softmax ignores a constant per row, so slope * key may replace slope * (key - query). It is the
# dot product of [s0, s0, s1, s1] with [hi, lo, hi, lo], where s0 + s1 is the slope and hi + lo the
# position. Every piece is exact in bf16, and every product has at most 16 significant bits, hence
# is exact in fp32: any fused kernel then computes ALiBi inside QK^T.


def query_features(slopes_H: jax.Array) -> jax.Array:
    """Splits slopes, fp32 [H], into two pieces exact in bf16: [s0, s0, s1, s1], bf16 [H, 4]."""
    s = slopes_H.astype(jnp.float32)
    # Not a cast to bf16 and back, which XLA may remove.
    s0 = jax.lax.reduce_precision(s, exponent_bits=8, mantissa_bits=7)
    s1 = jax.lax.reduce_precision(s - s0, exponent_bits=8, mantissa_bits=7)
    return jnp.stack([s0, s0, s1, s1], -1).astype(jnp.bfloat16)


def key_features(positions: np.ndarray) -> jax.Array:
    """Splits int positions into pieces exact in bf16: [hi, lo, hi, lo], bf16 [..., 4].

    They are exact below `MAX_POSITIONS`: |lo| <= 256, and hi / 512 has at most 8 significant bits.

    Raises:
      ValueError: a position is outside the exact range.
    """
    limit = MAX_POSITIONS - 1
    if positions.size:
        first, last = int(positions.min()), int(positions.max())
        if first < 0 or last > limit:
            raise ValueError(
                f"ALiBi key positions: found {first} to {last}, expected 0 to {limit}, the range "
                "in which their bf16 pieces are exact"
            )
    half = _BASE // 2
    lo = (positions + half) % _BASE - half
    hi = positions - lo
    return jnp.asarray(np.stack([hi, lo, hi, lo], -1), jnp.bfloat16)
