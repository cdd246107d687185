"""The loop of beam search and beam sampling: K beams per prompt, all at the same length.

`beam_search` has the rules of a step. `sample_loop` describes the interface of the loops.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.generation import beam_search, decode
from btlm_jax.generation.decode import DecodeResult, DecodeSpec, RowInputs
from btlm_jax.generation.prefill import PromptState
from btlm_jax.generation.sampling import draw_tokens
from btlm_jax.model import forward, kv_cache, sharding
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.runtime import Runtime


class BeamState(NamedTuple):
    """State of B searches with K beams each. All beams have the same length; B * K = R rows."""

    rows: RowInputs  # of the R beams
    length: jax.Array  # int32
    # A beam's history, [B, K, ...]: "ids" [S], "logprobs" [S], "rows" [S] (the row that each token
    # was taken from) and "stop", the state of the stop automaton.
    beams: beam_search.Beams
    cache: KVCache  # of new tokens; the prompts' cache, its prefix, is passed separately
    score_buffers: dict[str, jax.Array]


@functools.partial(jax.jit, static_argnames=("spec", "capacity"))
def start_loop(
    spec: DecodeSpec,
    params: Any,
    prompt: PromptState,
    rows: RowInputs,
    ids,
    stop_table,
    stop_state,
    capacity: int,
) -> BeamState:
    """Starts searches and takes their first step; arguments as for `sample_loop.start_loop`."""
    runtime, K = spec.model.runtime(params), spec.num_beams
    with sharding.on_mesh(runtime.mesh):
        B, S = len(prompt.logits), ids.shape[1]
        cache = forward.fork_cache(runtime, params, prompt.cache, K, capacity)
        logits = prompt.logits[decode.prompt_index(spec, B)]
        histories = {
            "ids": ids.reshape(B, K, S),
            "logprobs": jnp.full((B, K, S), jnp.nan),
            "rows": jnp.full((B, K, S), -1, jnp.int32),
        }
        if stop_table is not None:
            histories["stop"] = stop_state.reshape(B, K)
        state = BeamState(
            rows,
            rows.prompt_length[0],
            beam_search.start_beams(histories, B, K, _active_searches(rows, B)),
            dataclasses.replace(cache, prefix=None),
            decode.score_buffers(spec, logits),
        )
        return _append_tokens(spec, runtime, state, logits, stop_table)


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="state")
def advance_loop(
    spec: DecodeSpec, params: Any, prompt_cache: KVCache, state: BeamState, stop_table, steps
) -> BeamState:
    """Takes up to `steps` more steps, and stops when all searches have ended.

    Arguments are as for `sample_loop.advance_loop`.
    """

    runtime = spec.model.runtime(params)

    def unfinished(carry):
        i, state = carry
        return (i < steps) & state.beams.unfinished

    def step(carry):
        i, s = carry
        ids = s.beams.running["ids"]
        ids = ids.reshape(-1, ids.shape[-1])
        length = jnp.broadcast_to(s.length, len(ids))
        cache = dataclasses.replace(s.cache, prefix=prompt_cache)
        logits, cache = decode.decode_logits(runtime, params, s.rows, ids, length, cache)
        s = s._replace(cache=dataclasses.replace(cache, prefix=None))
        return i + 1, _append_tokens(spec, runtime, s, logits, stop_table)

    with sharding.on_mesh(runtime.mesh):
        return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]


def loop_ended(s: BeamState) -> bool:
    """Returns whether all searches have ended."""
    return not s.beams.unfinished


def loop_result(s: BeamState, num_return_sequences: int) -> DecodeResult:
    """Returns the best `num_return_sequences` finished beams of each prompt."""
    beams, n = s.beams, num_return_sequences

    def best(x):
        x = np.asarray(x)[:, :n]
        return x.reshape(-1, *x.shape[2:])

    histories = jax.tree.map(best, beams.finished)
    lengths = np.asarray(s.rows.prompt_length)[0] + best(beams.lengths)
    scores = best(beams.scores)
    return DecodeResult(histories["ids"], lengths, histories["logprobs"], scores, histories["rows"])


def _append_tokens(
    spec: DecodeSpec, runtime: Runtime, s: BeamState, logits: jax.Array, stop_table
) -> BeamState:
    rows, search = s.rows, s.rows.options.search
    assert search is not None
    B, K, S = s.beams.running["ids"].shape
    prompt_length, max_length = rows.prompt_length[0], rows.max_length[0]
    length, step = s.length, s.length - prompt_length
    logprobs = jax.nn.log_softmax(logits, -1)
    V = logprobs.shape[1]
    lengths = jnp.broadcast_to(length, B * K)
    ids = s.beams.running["ids"].reshape(B * K, S)
    scores = decode.process_scores(spec, rows, logprobs, ids, lengths)
    totals = scores.reshape(B, K, V) + s.beams.running_scores[:, :, None]
    num_candidates = max(2, 1 + spec.num_eos) * K
    if rows.options.sampling is not None:
        keys = decode.row_keys(rows, lengths - prompt_length)[::K]
        index = draw_tokens(totals.reshape(B, K * V), keys, num_candidates)
    else:
        index = jax.lax.top_k(totals.reshape(B, K * V), num_candidates)[1]
    candidates = beam_search.beam_candidates(totals, index)
    histories = beam_search.take_beams(s.beams.running, candidates.parents)
    eos_B1E = rows.options.eos.reshape(B, K, -1)[:, :1]
    is_end, stop_state = decode.ends_row(
        eos_B1E, stop_table, candidates.tokens, histories.get("stop")
    )
    is_end = is_end | (length + 1 >= max_length)
    logprob = jnp.take_along_axis(logprobs.reshape(B, K * V), index, 1)
    first_row = jnp.arange(B)[:, None] * K
    histories = {
        "ids": histories["ids"].at[:, :, length].set(candidates.tokens),
        "logprobs": histories["logprobs"].at[:, :, length].set(logprob),
        "rows": histories["rows"].at[:, :, length].set(candidates.parents + first_row),
    } | ({} if stop_state is None else {"stop": stop_state})

    def per_search(x):
        return x.reshape(B, K)[:, :1]

    powers_BS = jnp.arange(S + 1.0).at[0].set(1.0) ** per_search(search.length_penalty)
    beams, survivors = beam_search.beam_step(
        s.beams,
        candidates,
        histories,
        is_end,
        step + 1,
        max_length - prompt_length,
        powers_BS,
        per_search(search.early_stopping),
        per_search(search.allows_longer),
        per_search(rows.active),
    )
    parents = runtime.shard(jnp.take_along_axis(candidates.parents, survivors, 1), "batch", None)
    return BeamState(
        rows,
        length + 1,
        beams,
        kv_cache.reordered(s.cache, parents, runtime.attention_shard),
        decode.record_scores(s.score_buffers, step, scores=scores, logits=logits),
    )


def _active_searches(rows: RowInputs, num_prompts: int) -> jax.Array:
    """Returns which searches do not merely pad the batch, bool [B, 1]."""
    return rows.active.reshape(num_prompts, -1)[:, :1]
