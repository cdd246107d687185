"""Choosing the next token: the rules of transformers' logits warpers, on fp32 logits [B, V]."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose; the defaults are those of transformers.

    Attributes:
      do_sample: draw from the distribution; otherwise take the most likely token (the lowest id of
        equals), and the other fields do nothing.
      temperature: divides the logits; > 0.
      top_k: keep the k most likely tokens (and ties with the last); 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probability reaches p, in (0, 1].

    Raises:
      ValueError: a value outside its range, when sampling.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.do_sample:
            return
        if not self.temperature > 1e-30:  # fp32 would flush smaller ones to zero
            raise ValueError(
                f"temperature: found {self.temperature}, expected > 0 (for greedy decoding "
                "do not sample)"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k: found {self.top_k}, expected >= 0 (0 keeps every token)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: found {self.top_p}, expected a probability in (0, 1]")


def warp(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Applies temperature, top_k and top_p, in this order; removed tokens become -inf."""
    # Relative to the largest, so that a tiny temperature cannot overflow.
    logits = (logits_BV - logits_BV.max(-1, keepdims=True)) / sampling.temperature
    vocab = logits.shape[-1]
    if 0 < sampling.top_k < vocab:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        ascending = jnp.argsort(logits, -1)
        p = jax.nn.softmax(jnp.take_along_axis(logits, ascending, -1), -1)
        removed = jnp.cumsum(p, -1) <= 1 - sampling.top_p
        removed = removed.at[:, -1].set(False)  # the most likely token always stays
        rows = jnp.arange(logits.shape[0])[:, None]
        removed = jnp.zeros_like(removed).at[rows, ascending].set(removed)
        logits = jnp.where(removed, -jnp.inf, logits)
    return logits


def choose(logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array) -> jax.Array:
    """The next token of every row, int32 [B]; `keys_B` holds one random key per row."""
    if not sampling.do_sample:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical)
    return draw(keys_B, warp(logits_BV, sampling)).astype(jnp.int32)
