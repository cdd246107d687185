"""Rules on the scores of the next token: transformers' logits processors, in their order.

Scores are fp32 [R, V]: logits, or with beams log-probabilities. They see the token buffer and how
much of it is filled, so they run inside jit with static shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.generation.options import GenerationOptions, TokenBias

# (ids [R, S], how many of the S are filled [R], scores [R, V]) -> scores [R, V]
Processor = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def as_processors(given: Processor | Sequence[Processor] | None) -> tuple[Processor, ...]:
    """Processors, of which one, several or none were given."""
    return (given,) if callable(given) else tuple(given or ())


class ProcessorContext(NamedTuple):
    """What the rules know of the rows. LengthLimits are int32 [R] and count padded prompts."""

    ids: jax.Array  # int32 [R, S], of which `length` are filled
    length: jax.Array
    start: jax.Array  # int32 [R], the first token that is no padding
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
    """The scores after all rules that apply however the token is then chosen."""
    o, c, scores = options, context, scores_RV
    vocab = scores.shape[-1]
    ends = _members(eos, vocab)
    scores = _biased(scores, c, o.sequence_bias + tuple(((t,), b) for t, b in o.logit_bias))
    if o.repetition_penalty != 1:
        scores = _penalized(scores, c, o.repetition_penalty)
    if o.no_repeat_ngram_size:
        scores = _without_repeated(scores, c, o.no_repeat_ngram_size)
    # A single EOS cannot be a bad word: nothing would end.
    bad = [ids for ids in o.bad_words_ids if len(ids) > 1 or ids[0] not in eos]
    scores = _biased(scores, c, tuple((ids, -np.inf) for ids in bad))
    if eos:
        early = (c.length < c.min_length)[:, None]
        scores = jnp.where(early & ends, -jnp.inf, scores)
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
        rising = ends & (past > 0) & jnp.isfinite(scores)
        scores = jnp.where(rising, scores + rise, scores)
    scores = jnp.where(_members(o.suppress_tokens, vocab), -jnp.inf, scores)
    if o.begin_suppress_tokens:
        # After a forced second token, the first free one is the third.
        forced = (c.prompt_length == 1) & (o.forced_bos_token_id is not None)
        first = c.length == c.prompt_length + forced
        banned = first[:, None] & _members(o.begin_suppress_tokens, vocab)
        scores = jnp.where(banned, -jnp.inf, scores)
    for processor in custom:
        scores = processor(c.ids, c.length, scores)
    return scores


def _members(tokens: Sequence[int], vocab: int) -> np.ndarray:
    return np.isin(np.arange(vocab), tokens)


def _forced(tokens: Sequence[int], vocab: int) -> np.ndarray:
    return np.where(_members(tokens, vocab), 0.0, -np.inf).astype(np.float32)


def _seen(scores, tokens, where):
    """Whether a token is among those of its row where `where`. bool [R, V]."""
    rows, vocab = scores.shape
    tokens = jnp.where(where, tokens, vocab)
    return (
        jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], tokens].set(True, mode="drop")
    )


def _penalized(scores, c: ProcessorContext, penalty: float):
    slot = jnp.arange(c.ids.shape[1])
    seen = _seen(scores, c.ids, (slot < c.length[:, None]) & (slot >= c.start[:, None]))
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def _without_repeated(scores, c: ProcessorContext, n: int):
    windows = c.ids.shape[1] - n + 1
    if windows < 1:
        return scores
    same = jnp.arange(windows) + n <= c.length[:, None]
    suffix = _suffix(c, n - 1)
    for i in range(n - 1):
        same = same & (c.ids[:, i : i + windows] == suffix[:, i : i + 1])
    banned = _seen(scores, c.ids[:, n - 1 :], same)
    return jnp.where(banned & (c.length >= n)[:, None], -jnp.inf, scores)


def _suffix(c: ProcessorContext, n: int) -> jax.Array:
    """The last n tokens of every row, int32 [R, n]; anything of shorter ones."""
    at = c.length[:, None] - n + jnp.arange(n)
    return jnp.take_along_axis(c.ids, at, 1, mode="clip")


def _biased(scores, c: ProcessorContext, bias: TokenBias):
    """Adds to the score of the last token of each sequence whose others end the row."""
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
        ends = (_suffix(c, n)[:, None] == sequences[None, :, :-1]).all(-1)
        ends = ends & (c.length >= n)[:, None]
        added = jnp.zeros((rows, vocab), jnp.float32)
        scores = scores + added.at[:, sequences[:, -1]].add(jnp.where(ends, values, 0.0))
    return scores
