"""Beam search and beam sampling: the loop around `beam_search.beam_step`."""

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
from btlm_jax.model import kv_cache, sharding
from btlm_jax.model.kv_cache import KVCache


class BeamState(NamedTuple):
    """B searches of K beams each. All beams have the same length, and B K = R rows."""

    rows: RowInputs  # of the R beams
    length: jax.Array  # int32
    # Their tracks, [B, K, ...]: ids and log-probabilities [S], the rows that tokens came from [S],
    # and the state of the stop strings.
    beams: beam_search.Beams
    cache: KVCache  # of new tokens; the prompts' is its prefix, and given beside
    kept: dict[str, jax.Array]


@functools.partial(jax.jit, static_argnames=("program", "capacity"))
def start_loop(
    program: DecodeSpec,
    params: Any,
    prompt: PromptState,
    rows: RowInputs,
    ids,
    table,
    stop_state,
    capacity: int,
) -> BeamState:
    """Begins searches, and takes the first step; arguments as in `sample_loop.start_loop`."""
    model, K = program.model, program.options.num_beams
    with sharding.on_mesh(model.runtime(params).mesh):
        B, S = len(prompt.logits), ids.shape[1]
        cache = model.fork(params, prompt.cache, K, capacity)
        logits = prompt.logits[decode.prompt_index(program, B)]
        tracks = {
            "ids": ids.reshape(B, K, S),
            "logprobs": jnp.full((B, K, S), jnp.nan),
            "rows": jnp.full((B, K, S), -1, jnp.int32),
        }
        if table is not None:
            tracks["stop"] = stop_state.reshape(B, K)
        active = rows.meant.reshape(B, K)[:, :1]
        begun = BeamState(
            rows,
            rows.prompt_length[0],
            beam_search.start_beams(tracks, B, K, active),
            dataclasses.replace(cache, prefix=None),
            decode.score_buffers(program, logits),
        )
        return _append(program, params, begun, logits, table)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def advance_loop(
    program: DecodeSpec, params: Any, prompts: KVCache, state: BeamState, table, steps
) -> BeamState:
    """Takes more steps: at most `steps`, until the search ends."""

    def unfinished(carry):
        i, state = carry
        return (i < steps) & state.beams.go_on

    def one(carry):
        i, s = carry
        ids = s.beams.running["ids"]
        ids = ids.reshape(-1, ids.shape[-1])
        length = jnp.broadcast_to(s.length, len(ids))
        cache = dataclasses.replace(s.cache, prefix=prompts)
        logits, cache = decode.decode_logits(program, params, s.rows, ids, length, cache)
        s = s._replace(cache=dataclasses.replace(cache, prefix=None))
        return i + 1, _append(program, params, s, logits, table)

    with sharding.on_mesh(program.model.runtime(params).mesh):
        return jax.lax.while_loop(unfinished, one, (jnp.int32(0), state))[1]


def loop_ended(s: BeamState) -> bool:
    """Whether nothing can become better."""
    return not s.beams.go_on


def loop_result(program: DecodeSpec, s: BeamState) -> DecodeResult:
    """The best `num_return_sequences` beams of each prompt."""
    beams, n = s.beams, program.options.num_return_sequences

    def best(x):
        x = np.asarray(x)[:, :n]
        return x.reshape(-1, *x.shape[2:])

    tracks = jax.tree.map(best, beams.finished)
    lengths = np.asarray(s.rows.prompt_length)[0] + best(beams.lengths)
    scores = best(beams.scores)
    return DecodeResult(tracks["ids"], lengths, tracks["logprobs"], scores, tracks["rows"])


def _append(program: DecodeSpec, params: Any, s: BeamState, logits: jax.Array, table) -> BeamState:
    options, rows = program.options, s.rows
    B, K, S = s.beams.running["ids"].shape
    prompt_length, most = rows.prompt_length[0], rows.max_length[0]
    length, step = s.length, s.length - prompt_length
    own = jax.nn.log_softmax(logits, -1)
    V = own.shape[1]
    lengths = jnp.broadcast_to(length, B * K)
    ids = s.beams.running["ids"].reshape(B * K, S)
    scores = decode.process_scores(program, rows, own, ids, lengths)
    totals = scores.reshape(B, K, V) + s.beams.running_scores[:, :, None]
    count = max(2, 1 + len(program.eos)) * K
    if options.do_sample:
        keys = decode.row_keys(rows, lengths - prompt_length)[::K]
        chosen = draw_tokens(totals.reshape(B, K * V), keys, count)
    else:
        chosen = jax.lax.top_k(totals.reshape(B, K * V), count)[1]
    found = beam_search.beam_candidates(totals, chosen)
    tracks = beam_search.take_beams(s.beams.running, found.parents)
    hit, state = decode.ends_row(program, table, found.tokens, tracks.get("stop"))
    hit = hit | (length + 1 >= most)
    logprob = jnp.take_along_axis(own.reshape(B, K * V), chosen, 1)
    row_of = jnp.arange(B)[:, None] * K
    tracks = {
        "ids": tracks["ids"].at[:, :, length].set(found.tokens),
        "logprobs": tracks["logprobs"].at[:, :, length].set(logprob),
        "rows": tracks["rows"].at[:, :, length].set(found.parents + row_of),
    } | ({} if state is None else {"stop": state})
    active = rows.meant.reshape(B, K)[:, :1]
    powers = np.arange(S + 1, dtype=np.float64)
    powers[1:] **= options.length_penalty  # in float64, as Python does
    beams, kept = beam_search.beam_step(
        s.beams, found, tracks, hit, step + 1, most - prompt_length,
        powers.astype(np.float32), options, active,
    )  # fmt: skip
    runtime = program.model.runtime(params)
    parents = runtime.shard(jnp.take_along_axis(found.parents, kept, 1), "batch", None)
    return BeamState(
        rows,
        length + 1,
        beams,
        kv_cache.reordered(s.cache, parents, runtime.attention_shard),
        decode.record_scores(s.kept, step, scores=scores, logits=logits),
    )
