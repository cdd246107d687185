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

# Of the pieces of a position: the largest whose low pieces (at most half of it, 256) are exact in
# bf16. High pieces are multiples of it with 8 significant bits.
_BASE = 512
# Positions from 0 to one below are exact.
POSITIONS = _BASE * 256 + _BASE // 2


def slopes(n_head: int) -> np.ndarray:
    """The exact slopes of `n_head` heads. Returns float64 [H].

    For a power of two, 2**(-8 (i + 1) / H). Otherwise those of p, the largest power of two below
    H, followed by every second one of 2p (appended, not interleaved; the original's rule).
    """
    p = 1 << (n_head.bit_length() - 1)
    first = 2.0 ** (-8.0 * np.arange(1, p + 1) / p)
    if p == n_head:
        return first
    return np.concatenate([first, slopes(2 * p)[0::2][: n_head - p]])


def model_slopes(config: BTLMConfig) -> np.ndarray:
    """The slopes a model uses: those of its checkpoint if it has any, else exact ones. f64 [H]."""
    if config.alibi_slopes is not None:
        return np.asarray(config.alibi_slopes, np.float64)
    return slopes(config.n_head)


def scale(scaling: AlibiScaling | None, key_length: int | jax.Array) -> float | jax.Array:
    """The divisor of every distance when `key_length` keys (cache and padding included) are seen.

    A float where it is known at trace time; an fp32 scalar for dynamic scaling with a traced
    length.
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


def scale_varies(scaling: AlibiScaling | None, longest: int) -> bool:
    """Whether `scale` depends on the length, up to `longest` keys: batches must then be alike."""
    return bool(scale(scaling, 1) != scale(scaling, longest))


def bias(slopes_H: jax.Array, query_T: jax.Array, key_S: jax.Array) -> jax.Array:
    """The ALiBi bias from integer positions. Returns fp32 [H, T, S].

    Args:
      slopes_H: fp32, already divided by the scale.
      query_T, key_S: int32 positions in slots.
    """
    distance_TS = jnp.abs(key_S[None, :] - query_T[:, None]).astype(jnp.float32)
    return -slopes_H.astype(jnp.float32)[:, None, None] * distance_TS


# The bias as features ---------------------------------------------------------------------------
#
# Softmax ignores a constant per row, so slope * (key - query) may be replaced by slope * key, and
# that is a dot product of [s0, s0, s1, s1] with [hi, lo, hi, lo], where s0 + s1 is the slope and
# hi + lo the position. Every piece is exact in bf16 and every product has at most 16 significant
# bits, hence exact in fp32: any fused kernel then computes ALiBi inside QK^T.


def query_features(slopes_H: jax.Array) -> jax.Array:
    """Splits slopes, fp32 [H], into two bf16-exact pieces. Returns bf16 [H, 4]."""
    s = slopes_H.astype(jnp.float32)
    # XLA may simplify a cast to bf16 and back away.
    s0 = jax.lax.reduce_precision(s, exponent_bits=8, mantissa_bits=7)
    s1 = jax.lax.reduce_precision(s - s0, exponent_bits=8, mantissa_bits=7)
    return jnp.stack([s0, s0, s1, s1], -1).astype(jnp.bfloat16)


def key_features(positions: np.ndarray) -> jax.Array:
    """Splits int positions (any shape, >= 0) into bf16-exact [hi, lo, hi, lo]. bf16 [..., 4].

    Exact below `POSITIONS`: |lo| <= 256, and hi is a multiple of 512 whose quotient has at most 8
    significant bits up to there.

    Raises:
      ValueError: a position lies outside the exact range.
    """
    limit = POSITIONS - 1
    if positions.size:
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high > limit:
            raise ValueError(
                f"ALiBi key positions: found {low} to {high}, expected 0 to {limit}, the range in "
                "which their bf16 pieces are exact"
            )
    half = _BASE // 2
    lo = (positions + half) % _BASE - half
    hi = positions - lo
    return jnp.asarray(np.stack([hi, lo, hi, lo], -1), jnp.bfloat16)
