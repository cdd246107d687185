"""One step of beam search and beam sampling: transformers' rules, as pure functions.

B prompts, K beams each, C = max(2, 1 + number of EOS ids) K candidates a step, V tokens. "Lower
index first among equals" and sums with -1e9 in fp32, which swallow the log-probability, are part of
the rules.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from btlm_jax.generation.options import GenerationOptions

_NEVER = np.float32(-1e9)


class Beams(NamedTuple):
    """The state of a search. `tracks` are pytrees of [B, K, ...], what goes along with a beam."""

    running: Any  # tracks
    running_scores: jax.Array  # fp32 [B, K], log-probabilities
    finished: Any  # tracks
    scores: jax.Array  # fp32 [B, K], of the finished ones, by length
    is_finished: jax.Array  # bool [B, K]
    lengths: jax.Array  # int32 [B, K], new tokens of the finished ones
    can_improve: jax.Array  # bool [B, 1]
    go_on: jax.Array  # bool


class BeamCandidates(NamedTuple):
    """The best continuations of each prompt's beams, [B, C]."""

    scores: jax.Array
    parents: jax.Array  # the beam, 0 to K - 1
    tokens: jax.Array


def start_beams(tracks: Any, count: int, beams: int, active: jax.Array) -> Beams:
    """Before the first step; only the first beam counts, as all are the same prompt.

    Args:
      active: bool [B, 1], False for rows that only fill up the batch.
    """
    shape = (count, beams)
    first = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, _NEVER), shape)
    return Beams(
        tracks,
        first.astype(jnp.float32),
        tracks,
        jnp.full(shape, _NEVER),
        jnp.zeros(shape, bool),
        jnp.zeros(shape, jnp.int32),
        active,
        jnp.bool_(True),
    )


def take_beams(tracks: Any, index_BN: jax.Array) -> Any:
    """Tracks [B, N, ...] by index along the second axis."""

    def one(x):
        index = index_BN.reshape(index_BN.shape + (1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, 1)

    return jax.tree.map(one, tracks)


def beam_candidates(totals_BKV: jax.Array, chosen_BC: jax.Array) -> BeamCandidates:
    """Candidates from indices into the flattened [K V] scores."""
    B, K, V = totals_BKV.shape
    scores = jnp.take_along_axis(totals_BKV.reshape(B, K * V), chosen_BC, 1)
    return BeamCandidates(scores, chosen_BC // V, chosen_BC % V)


def beam_step(
    beams: Beams,
    found: BeamCandidates,
    tracks: Any,
    hit_BC: jax.Array,
    new: jax.Array,
    limit: jax.Array,
    powers: ArrayLike,
    options: GenerationOptions,
    active: jax.Array,
) -> tuple[Beams, jax.Array]:
    """The next state, and which candidates run on, int32 [B, K].

    Args:
      tracks: of the candidates, [B, C, ...].
      hit_BC: bool, candidates that end here.
      new: how many new tokens they have; `limit`, how many there may be.
      powers: fp32, 1, 2, ... to the power `length_penalty`, at index 1, 2, ...
      active: as in `start`.
    """
    C, K = found.scores.shape[1], beams.scores.shape[1]
    power, early = jnp.asarray(powers), options.early_stopping is True

    left = found.scores + hit_BC * _NEVER
    kept = jax.lax.top_k(left, K)[1]
    running, running_scores = take_beams((tracks, left), kept)

    ended = hit_BC & (jnp.arange(C) < K)  # the others are there to run on in their place
    final = found.scores / power[new]
    full = beams.is_finished.all(1, keepdims=True) & early
    for closed in (full, ~beams.can_improve, ~ended):
        final = final + closed * _NEVER

    def merge(old, new):
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), old, new)

    everything = merge(
        (beams.finished, beams.scores, beams.is_finished, beams.lengths),
        (tracks, final, ended, jnp.broadcast_to(new, ended.shape)),
    )
    best = jax.lax.top_k(everything[1], K)[1]
    finished, scores, is_finished, lengths = take_beams(everything, best)

    reach = limit if options.early_stopping == "never" and options.length_penalty > 0 else new
    hope = running_scores[:, :1] / power[reach]
    worst = jnp.where(is_finished, scores.min(1, keepdims=True), _NEVER)
    can_improve = beams.can_improve & (hope > worst).any(1, keepdims=True)
    open_ = ~((is_finished | ~active).all() & early)
    go_on = can_improve.any() & open_ & ~(hit_BC | ~active).all()
    state = Beams(
        running, running_scores, finished, scores, is_finished, lengths, can_improve, go_on
    )
    return state, kept
