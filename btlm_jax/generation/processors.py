"""Transformers' logits processors, in transformers' order.

Scores are fp32 [R, V]: logits, or log-probabilities with beams. Processors see the token buffer and
the length of each row, so they run inside jit with static shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.generation.options import GenerationOptions, TokenBias

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
    options: GenerationOptions,
    eos: tuple[int, ...],
    custom: Sequence[Processor],
) -> jax.Array:
    """Applies all processors that do not depend on how the token is selected afterwards.

    Args:
      scores_RV: fp32 scores.
      context: the rows.
      options: the generation options.
      eos: ids that end a row.
      custom: user processors, applied last.
    """
    o, c, scores = options, context, scores_RV
    vocab = scores.shape[-1]
    is_eos = _is_member(eos, vocab)
    scores = _add_bias(scores, c, o.sequence_bias + tuple(((t,), b) for t, b in o.logit_bias))
    if o.repetition_penalty != 1:
        scores = _penalize_repetition(scores, c, o.repetition_penalty)
    if o.no_repeat_ngram_size:
        scores = _ban_repeated_ngrams(scores, c, o.no_repeat_ngram_size)
    # A bad word that is a single EOS is ignored: no row could end.
    bad = [ids for ids in o.bad_words_ids if len(ids) > 1 or ids[0] not in eos]
    scores = _add_bias(scores, c, tuple((ids, -np.inf) for ids in bad))
    if eos:
        early = (c.length < c.min_length)[:, None]
        scores = jnp.where(early & is_eos, -jnp.inf, scores)
    if o.forced_bos_token_id is not None:
        forced = _forced((o.forced_bos_token_id,), vocab)
        scores = jnp.where((c.length == 1)[:, None], forced, scores)
    if o.forced_eos_token_id:
        forced = _forced(o.forced_eos_token_id, vocab)
        last = (c.length == c.max_length - 1)[:, None]
        scores = jnp.where(last, forced, scores)
    if o.remove_invalid_values:
        scores = jnp.nan_to_num(scores)
    if o.exponential_decay_length_penalty is not None and eos:
        start, factor = o.exponential_decay_length_penalty
        past = (c.length - c.prompt_length - start)[:, None]
        rise = jnp.abs(scores) * (jnp.float32(factor) ** past - 1)
        rising = is_eos & (past > 0) & jnp.isfinite(scores)
        scores = jnp.where(rising, scores + rise, scores)
    scores = jnp.where(_is_member(o.suppress_tokens, vocab), -jnp.inf, scores)
    if o.begin_suppress_tokens:
        # After a forced second token, the first free token is the third.
        forced = (c.prompt_length == 1) & (o.forced_bos_token_id is not None)
        first = c.length == c.prompt_length + forced
        banned = first[:, None] & _is_member(o.begin_suppress_tokens, vocab)
        scores = jnp.where(banned, -jnp.inf, scores)
    for processor in custom:
        scores = processor(c.ids, c.length, scores)
    return scores


def _is_member(tokens: Sequence[int], vocab: int) -> np.ndarray:
    return np.isin(np.arange(vocab), tokens)


def _forced(tokens: Sequence[int], vocab: int) -> np.ndarray:
    return np.where(_is_member(tokens, vocab), 0.0, -np.inf).astype(np.float32)


def _occurs(scores, tokens, where):
    """Returns whether each id is among its row's tokens where `where` holds, bool [R, V]."""
    rows, vocab = scores.shape
    tokens = jnp.where(where, tokens, vocab)
    return (
        jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], tokens].set(True, mode="drop")
    )


def _penalize_repetition(scores, c: ProcessorContext, penalty: float):
    slot = jnp.arange(c.ids.shape[1])
    is_valid = (slot < c.length[:, None]) & (slot >= c.first_valid[:, None])
    occurs = _occurs(scores, c.ids, is_valid)
    return jnp.where(occurs, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def _ban_repeated_ngrams(scores, c: ProcessorContext, n: int):
    num_windows = c.ids.shape[1] - n + 1
    if num_windows < 1:
        return scores
    matches = jnp.arange(num_windows) + n <= c.length[:, None]
    suffix = _suffix(c, n - 1)
    for i in range(n - 1):
        matches = matches & (c.ids[:, i : i + num_windows] == suffix[:, i : i + 1])
    banned = _occurs(scores, c.ids[:, n - 1 :], matches)
    return jnp.where(banned & (c.length >= n)[:, None], -jnp.inf, scores)


def _suffix(c: ProcessorContext, n: int) -> jax.Array:
    """Returns the last n tokens of every row, int32 [R, n]; undefined for shorter rows."""
    slots = c.length[:, None] - n + jnp.arange(n)
    return jnp.take_along_axis(c.ids, slots, 1, mode="clip")


def _add_bias(scores, c: ProcessorContext, bias: TokenBias):
    """Adds bias to the last token of each sequence whose other tokens are the end of the row."""
    rows, vocab = scores.shape
    single = np.zeros(vocab, np.float32)
    longer: dict[int, list[tuple[tuple[int, ...], float]]] = {}
    for ids, value in bias:
        if len(ids) == 1:
            single[ids[0]] += value
        elif len(ids) - 1 <= c.ids.shape[1]:
            longer.setdefault(len(ids) - 1, []).append((ids, value))
    if single.any():
        scores = scores + single
    for n, group in longer.items():
        sequences = np.array([ids for ids, _ in group], np.int32)
        values = np.array([value for _, value in group], np.float32)
        matches = (_suffix(c, n)[:, None] == sequences[None, :, :-1]).all(-1)
        matches = matches & (c.length >= n)[:, None]
        zeros = jnp.zeros((rows, vocab), jnp.float32)
        scores = scores + zeros.at[:, sequences[:, -1]].add(jnp.where(matches, values, 0.0))
    return scores
