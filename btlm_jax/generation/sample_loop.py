"""Greedy decoding and sampling: rows that grow by a token at a time, each at its own length."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.generation import decode
from btlm_jax.generation.decode import DecodeResult, DecodeSpec, RowInputs
from btlm_jax.generation.prefill import PromptState
from btlm_jax.generation.sampling import draw_tokens
from btlm_jax.model import sharding
from btlm_jax.model.kv_cache import KVCache


class SampleState(NamedTuple):
    """R rows on their way. What is per token lies at its slot."""

    rows: RowInputs
    ids: jax.Array  # int32 [R, S]: prompts and new tokens, then the filling
    length: jax.Array  # int32 [R], of each row so far, at the end with its EOS
    done: jax.Array  # bool [R]
    logprobs: jax.Array  # fp32 [R, S], the model's own, of new tokens; else NaN
    stop_state: jax.Array | None  # int32 [R]
    cache: KVCache  # of new tokens; the prompts' is its prefix, and given beside
    step: jax.Array  # int32, how many tokens have been chosen
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
) -> SampleState:
    """Begins rows, and chooses the first token of each.

    Args:
      prompt: of B rows; R = B * copies.
      ids: int32 [R, S], prompts, then what fills a row that has ended.
      table: `stop_automaton.build_stop_table`, or None; `stop_state`, after the prompts, int32 [R].
      capacity: slots for new tokens, at first.
    """
    model = program.model
    with sharding.on_mesh(model.runtime(params).mesh):
        of_row = decode.prompt_index(program, prompt.logits.shape[0])
        cache = model.fork(params, prompt.cache, program.options.rows_per_prompt, capacity)
        logits = prompt.logits[of_row]
        begun = SampleState(
            rows,
            ids,
            rows.prompt_length,
            ~rows.meant,
            jnp.full(ids.shape, jnp.nan),
            stop_state,
            dataclasses.replace(cache, prefix=None),
            jnp.int32(0),
            decode.score_buffers(program, logits),
        )
        return _append(program, begun, logits, table)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def advance_loop(
    program: DecodeSpec,
    params: Any,
    prompts: KVCache,
    state: SampleState,
    table,
    steps,
    patience=None,
) -> SampleState:
    """Chooses more tokens: at most `steps` for each row, until `patience` rows (all) are done."""
    patience = len(state.done) if patience is None else patience

    def unfinished(carry):
        i, state = carry
        return (i < steps) & (state.done.sum() < patience)

    def one(carry):
        i, s = carry
        cache = dataclasses.replace(s.cache, prefix=prompts)
        logits, cache = decode.decode_logits(program, params, s.rows, s.ids, s.length, cache)
        # RowInputs that are done take no more slots.
        length = jnp.where(s.done, s.cache.length, cache.length)
        s = s._replace(cache=dataclasses.replace(cache, length=length, prefix=None))
        return i + 1, _append(program, s, logits, table)

    with sharding.on_mesh(program.model.runtime(params).mesh):
        return jax.lax.while_loop(unfinished, one, (jnp.int32(0), state))[1]


def loop_ended(s: SampleState) -> bool:
    """Whether all rows are done."""
    return bool(np.asarray(s.done).all())


def loop_result(program: DecodeSpec, s: SampleState) -> DecodeResult:
    """The rows as they are."""
    return DecodeResult(s.ids, s.length, s.logprobs, None, None)


def _append(program: DecodeSpec, s: SampleState, logits: jax.Array, table) -> SampleState:
    step = s.length - s.rows.prompt_length
    scores = decode.process_scores(program, s.rows, logits, s.ids, s.length)
    if program.options.do_sample:
        # Each copy has a key of its own, the same however many there are.
        keys = jax.vmap(jax.random.fold_in)(decode.row_keys(s.rows, step), s.rows.copy)
        token = draw_tokens(scores, keys, 1)[:, 0].astype(jnp.int32)
    else:
        token = jnp.argmax(scores, -1).astype(jnp.int32)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), token[:, None], 1)[:, 0]
    hit, stop_state = decode.ends_row(program, table, token, s.stop_state)
    R, S = s.ids.shape
    at = jnp.arange(R), jnp.where(s.done, S, s.length)  # past the end: dropped
    length = s.length + ~s.done
    return s._replace(
        ids=s.ids.at[at].set(token, mode="drop"),
        length=length,
        done=s.done | hit | (length >= s.rows.max_length),
        logprobs=s.logprobs.at[at].set(logprob, mode="drop"),
        stop_state=stop_state,
        step=s.step + 1,
        kept=decode.record_scores(s.kept, s.step, scores=scores, logits=logits),
    )
