"""The rules of one step of beam search and beam sampling, as in transformers, as pure functions.

B prompts, K beams each, V tokens, and C = max(2, 1 + number of EOS ids) * K candidates per step. To
match transformers, equal scores are resolved in favor of the lower index, and scores that must not
win have -1e9 added in fp32, which absorbs the log-probability.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_EXCLUDED = np.float32(-1e9)


class Beams(NamedTuple):
    """State of B searches. `running` and `finished` are pytrees of [B, K, ...] histories."""

    running: Any
    running_scores: jax.Array  # fp32 [B, K], log-probabilities
    finished: Any
    scores: jax.Array  # fp32 [B, K], length-normalized scores of the finished beams
    is_finished: jax.Array  # bool [B, K]
    lengths: jax.Array  # int32 [B, K], new tokens of the finished beams
    can_improve: jax.Array  # bool [B, 1]
    unfinished: jax.Array  # bool, whether any search must continue


class BeamCandidates(NamedTuple):
    """The best continuations of each prompt's beams, [B, C]."""

    scores: jax.Array
    parents: jax.Array  # the beam that is continued, 0 to K - 1
    tokens: jax.Array


def start_beams(histories: Any, num_prompts: int, num_beams: int, active: jax.Array) -> Beams:
    """Returns the state before the first step.

    Only the first beam of each prompt takes part in it, because all beams are equal.

    Args:
      histories: pytree of [B, K, ...].
      num_prompts, num_beams: B and K.
      active: bool [B, 1], False for rows that only pad the batch.
    """
    shape = (num_prompts, num_beams)
    first = jnp.broadcast_to(jnp.where(jnp.arange(num_beams) == 0, 0.0, _EXCLUDED), shape)
    return Beams(
        histories,
        first.astype(jnp.float32),
        histories,
        jnp.full(shape, _EXCLUDED),
        jnp.zeros(shape, bool),
        jnp.zeros(shape, jnp.int32),
        active,
        jnp.bool_(True),
    )


def take_beams(histories: Any, index_BN: jax.Array) -> Any:
    """Gathers histories [B, N, ...] along the second axis."""

    def take(x):
        index = index_BN.reshape(index_BN.shape + (1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, 1)

    return jax.tree.map(take, histories)


def beam_candidates(totals_BKV: jax.Array, index_BC: jax.Array) -> BeamCandidates:
    """Returns the candidates at indices into the flattened [K * V] scores."""
    B, K, V = totals_BKV.shape
    scores = jnp.take_along_axis(totals_BKV.reshape(B, K * V), index_BC, 1)
    return BeamCandidates(scores, index_BC // V, index_BC % V)


def beam_step(
    beams: Beams,
    candidates: BeamCandidates,
    histories: Any,
    is_end_BC: jax.Array,
    new_tokens: jax.Array,
    max_new_tokens: jax.Array,
    powers_BS: jax.Array,
    early_stopping_B1: jax.Array,
    allows_longer_B1: jax.Array,
    active: jax.Array,
) -> tuple[Beams, jax.Array]:
    """Selects the beams that continue and updates the best finished ones.

    Args:
      beams: the state before the step.
      candidates: the candidates.
      histories: their histories, [B, C, ...].
      is_end_BC: bool, candidates that end here.
      new_tokens: int32, new tokens of the candidates.
      max_new_tokens: int32.
      powers_BS: fp32 [B, S + 1]; entry n is n ** length_penalty, for n >= 1.
      early_stopping_B1: bool, searches that end as soon as K beams have ended.
      allows_longer_B1: bool, searches that compare with the score that the best beam would have at
        the maximum length.
      active: as for `start_beams`.

    Returns:
      The next state, and the indices of the candidates that continue, int32 [B, K].
    """
    C, K = candidates.scores.shape[1], beams.scores.shape[1]
    power_B1 = powers_BS[:, new_tokens, None]

    continuing_scores = candidates.scores + is_end_BC * _EXCLUDED
    survivors = jax.lax.top_k(continuing_scores, K)[1]
    running, running_scores = take_beams((histories, continuing_scores), survivors)

    # Candidates beyond the first K are only there to continue in place of those that end.
    ended = is_end_BC & (jnp.arange(C) < K)
    final_scores = candidates.scores / power_B1
    full = beams.is_finished.all(1, keepdims=True) & early_stopping_B1
    for excluded in (full, ~beams.can_improve, ~ended):
        final_scores = final_scores + excluded * _EXCLUDED

    def concatenate(old, new):
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), old, new)

    merged = concatenate(
        (beams.finished, beams.scores, beams.is_finished, beams.lengths),
        (histories, final_scores, ended, jnp.broadcast_to(new_tokens, ended.shape)),
    )
    best = jax.lax.top_k(merged[1], K)[1]
    finished, scores, is_finished, lengths = take_beams(merged, best)

    best_power = jnp.where(allows_longer_B1, powers_BS[:, max_new_tokens, None], power_B1)
    best_possible = running_scores[:, :1] / best_power
    worst = jnp.where(is_finished, scores.min(1, keepdims=True), _EXCLUDED)
    can_improve = beams.can_improve & (best_possible > worst).any(1, keepdims=True)
    stopped_early = ((is_finished & early_stopping_B1) | ~active).all()
    all_ended = (is_end_BC | ~active).all()
    unfinished = can_improve.any() & ~stopped_early & ~all_ended
    state = Beams(
        running, running_scores, finished, scores, is_finished, lengths, can_improve, unfinished
    )
    return state, survivors
