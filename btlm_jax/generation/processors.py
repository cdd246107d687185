"""Transformers' logits processors, in transformers' order.

Scores are fp32 [R, V]: logits, or log-probabilities with beams. Processors see the token buffer and
the length of each row, so they run inside jit with static shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from btlm_jax.generation.row_options import RowOptions, TokenBias

# (ids [R, S], length [R], scores [R, V]) -> scores [R, V]; `length` of a row's S slots are filled.
Processor = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def as_processors(value: Processor | Sequence[Processor] | None) -> tuple[Processor, ...]:
    """Returns one processor, several or none as a tuple."""
    return (value,) if callable(value) else tuple(value or ())


class ProcessorContext(NamedTuple):
    """The rows as processors see them. Lengths are int32 [R] and include the padded prompt."""

    ids: jax.Array  # int32 [R, S], the first `length` are filled
    length: jax.Array
    first_valid: jax.Array  # int32 [R], slot of the first valid token
    prompt_length: jax.Array
    min_length: jax.Array
    max_length: jax.Array


def apply_processors(
    scores_RV: jax.Array,
    context: ProcessorContext,
    options: RowOptions,
    ngram_sizes: Sequence[int],
    custom: Sequence[Processor],
) -> jax.Array:
    """Applies all processors that do not depend on how the token is selected afterwards.

    Args:
      scores_RV: fp32 scores.
      context: the rows.
      options: the options of the rows.
      ngram_sizes: the values that `options.ngram_size` may have.
      custom: user processors, applied last.
    """
    o, c, scores = options, context, scores_RV
    vocab = scores.shape[-1]
    is_eos = _is_member(o.eos, vocab)
    if o.bias is not None:
        scores = _add_bias(scores, c, o.bias)
    if o.repetition_penalty is not None:
        scores = _penalize_repetition(scores, c, o.repetition_penalty[:, None])
    for n in ngram_sizes:
        is_banned = _repeats_ngram(scores, c, n) & (o.ngram_size == n)[:, None]
        scores = jnp.where(is_banned, -jnp.inf, scores)
    if o.bad_words is not None:
        scores = _add_bias(scores, c, o.bad_words)
    early = (c.length < c.min_length)[:, None]
    scores = jnp.where(early & is_eos, -jnp.inf, scores)
    if o.forced_bos is not None:
        is_second = (c.length == 1) & (o.forced_bos >= 0)
        scores = _force(scores, is_second, o.forced_bos[:, None])
    if o.forced_eos is not None:
        is_last = (c.length == c.max_length - 1) & (o.forced_eos >= 0).any(1)
        scores = _force(scores, is_last, o.forced_eos)
    if o.remove_invalid is not None:
        scores = jnp.where(o.remove_invalid[:, None], jnp.nan_to_num(scores), scores)
    if o.decay is not None:
        past = (c.length - c.prompt_length - o.decay.start)[:, None]
        rise = jnp.abs(scores) * (o.decay.factor[:, None] ** past - 1)
        rising = is_eos & (past > 0) & jnp.isfinite(scores)
        scores = jnp.where(rising, scores + rise, scores)
    if o.suppressed is not None:
        scores = jnp.where(_occurs(scores, o.suppressed, o.suppressed >= 0), -jnp.inf, scores)
    if o.begin_suppressed is not None:
        # After a forced second token, the first free token is the third.
        forced = 0 if o.forced_bos is None else (c.prompt_length == 1) & (o.forced_bos >= 0)
        is_first = (c.length == c.prompt_length + forced)[:, None]
        is_banned = _occurs(scores, o.begin_suppressed, (o.begin_suppressed >= 0) & is_first)
        scores = jnp.where(is_banned, -jnp.inf, scores)
    for processor in custom:
        scores = processor(c.ids, c.length, scores)
    return scores


def _is_member(tokens_RN: jax.Array, vocab: int) -> jax.Array:
    """Returns whether each id is in its row's short list, bool [R, V]."""
    return (tokens_RN[:, :, None] == jnp.arange(vocab)).any(1)


def _force(scores, where_R, tokens_RN):
    """Returns scores that allow only `tokens` in the rows `where`."""
    forced = jnp.where(_is_member(tokens_RN, scores.shape[-1]), 0.0, -jnp.inf)
    return jnp.where(where_R[:, None], forced, scores)


def _occurs(scores, tokens, where):
    """Returns whether each id is among its row's tokens where `where` holds, bool [R, V]."""
    rows, vocab = scores.shape
    tokens = jnp.where(where, tokens, vocab)
    return (
        jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], tokens].set(True, mode="drop")
    )


def _penalize_repetition(scores, c: ProcessorContext, penalty_R1):
    slot = jnp.arange(c.ids.shape[1])
    is_valid = (slot < c.length[:, None]) & (slot >= c.first_valid[:, None])
    penalized = jnp.where(scores < 0, scores * penalty_R1, scores / penalty_R1)
    return jnp.where(_occurs(scores, c.ids, is_valid), penalized, scores)


def _repeats_ngram(scores, c: ProcessorContext, n: int):
    """Returns whether each id would complete an n-gram that its row has already, bool [R, V]."""
    num_windows = c.ids.shape[1] - n + 1
    if num_windows < 1:
        return jnp.zeros(scores.shape, bool)
    matches = jnp.arange(num_windows) + n <= c.length[:, None]
    suffix = _suffix(c, n - 1)
    for i in range(n - 1):
        matches = matches & (c.ids[:, i : i + num_windows] == suffix[:, i : i + 1])
    return _occurs(scores, c.ids[:, n - 1 :], matches) & (c.length >= n)[:, None]


def _suffix(c: ProcessorContext, n: int) -> jax.Array:
    """Returns the last n tokens of every row, int32 [R, n]; undefined for shorter rows."""
    slots = c.length[:, None] - n + jnp.arange(n)
    return jnp.take_along_axis(c.ids, slots, 1, mode="clip")


def _add_bias(scores, c: ProcessorContext, bias: TokenBias):
    rows, vocab = scores.shape
    is_any = bias.context < 0
    suffix_R1W = _suffix(c, bias.context.shape[2])[:, None]
    matches_RN = (is_any | (bias.context == suffix_R1W)).all(2)
    matches_RN = matches_RN & ((~is_any).sum(2) <= c.length[:, None])
    token_RN = jnp.where(bias.token >= 0, bias.token, vocab)
    total = jnp.zeros((rows, vocab), jnp.float32)
    total = total.at[jnp.arange(rows)[:, None], token_RN].add(
        jnp.where(matches_RN, bias.value, 0.0), mode="drop"
    )
    return scores + total
