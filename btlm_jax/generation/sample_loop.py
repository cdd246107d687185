"""The loop of greedy decoding and sampling: one token per row and step, each row at its own length.

`sample_loop` and `beam_loop` have the same four functions: `start_loop`, `advance_loop`,
`loop_ended` and `loop_result`.
"""

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
from btlm_jax.model import forward, sharding
from btlm_jax.model.kv_cache import KVCache


class SampleState(NamedTuple):
    """State of R rows; per-token arrays are indexed by slot."""

    rows: RowInputs
    ids: jax.Array  # int32 [R, S]: the prompt, the new tokens, then the fill token
    length: jax.Array  # int32 [R], current length, including a final EOS
    done: jax.Array  # bool [R]
    logprobs: jax.Array  # fp32 [R, S], the model's, for new tokens; otherwise NaN
    stop_state: jax.Array | None  # int32 [R]
    cache: KVCache  # of new tokens; the prompts' cache, its prefix, is passed separately
    step: jax.Array  # int32, number of tokens selected so far
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
) -> SampleState:
    """Starts rows and selects the first new token of each.

    Args:
      spec, params: the static arguments and the weights.
      prompt: of B rows; R = B * rows_per_prompt.
      rows: the constants of the rows.
      ids: int32 [R, S], the prompts, then the token that fills a row after its end.
      stop_table: `build_stop_table`, or None.
      stop_state: state of the stop automaton after the prompts, int32 [R], or None.
      capacity: initial slots for new tokens.
    """
    runtime = spec.model.runtime(params)
    with sharding.on_mesh(runtime.mesh):
        copies = spec.rows_per_prompt
        cache = forward.fork_cache(runtime, params, prompt.cache, copies, capacity)
        logits = prompt.logits[decode.prompt_index(spec, prompt.logits.shape[0])]
        state = SampleState(
            rows,
            ids,
            rows.prompt_length,
            ~rows.active,
            jnp.full(ids.shape, jnp.nan),
            stop_state,
            dataclasses.replace(cache, prefix=None),
            jnp.int32(0),
            decode.score_buffers(spec, logits),
        )
        return _append_token(spec, state, logits, stop_table)


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="state")
def advance_loop(
    spec: DecodeSpec,
    params: Any,
    prompt_cache: KVCache,
    state: SampleState,
    stop_table,
    steps,
    patience=None,
) -> SampleState:
    """Selects up to `steps` more tokens per row, and stops once `patience` rows are done.

    Args:
      spec, params: the static arguments and the weights.
      prompt_cache: the cache of the prompts.
      state: the state, which is donated.
      stop_table: `build_stop_table`, or None.
      steps: int32.
      patience: int32; None means all rows.
    """
    runtime = spec.model.runtime(params)
    patience = len(state.done) if patience is None else patience

    def unfinished(carry):
        i, state = carry
        return (i < steps) & (state.done.sum() < patience)

    def step(carry):
        i, s = carry
        cache = dataclasses.replace(s.cache, prefix=prompt_cache)
        logits, cache = decode.decode_logits(runtime, params, s.rows, s.ids, s.length, cache)
        # Rows that are done use no more slots.
        length = jnp.where(s.done, s.cache.length, cache.length)
        s = s._replace(cache=dataclasses.replace(cache, length=length, prefix=None))
        return i + 1, _append_token(spec, s, logits, stop_table)

    with sharding.on_mesh(runtime.mesh):
        return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]


def loop_ended(s: SampleState) -> bool:
    """Returns whether all rows are done."""
    return bool(np.asarray(s.done).all())


def loop_result(s: SampleState, num_return_sequences: int) -> DecodeResult:
    """Returns all rows in their current state."""
    return DecodeResult(s.ids, s.length, s.logprobs, None, None)


def _append_token(spec: DecodeSpec, s: SampleState, logits: jax.Array, stop_table) -> SampleState:
    step, sampling = s.length - s.rows.prompt_length, s.rows.options.sampling
    scores = decode.process_scores(spec, s.rows, logits, s.ids, s.length)
    if sampling is None:
        token = jnp.argmax(scores, -1).astype(jnp.int32)
    else:
        # Each copy has its own key, whatever the number of copies.
        keys = jax.vmap(jax.random.fold_in)(decode.row_keys(s.rows, step), s.rows.copy)
        token = draw_tokens(scores, keys, 1, sampling.do_sample)[:, 0].astype(jnp.int32)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), token[:, None], 1)[:, 0]
    is_end, stop_state = decode.ends_row(s.rows.options.eos, stop_table, token, s.stop_state)
    R, S = s.ids.shape
    # Writes past the end, for rows that are done, are dropped.
    target = jnp.arange(R), jnp.where(s.done, S, s.length)
    length = s.length + ~s.done
    return s._replace(
        ids=s.ids.at[target].set(token, mode="drop"),
        length=length,
        done=s.done | is_end | (length >= s.rows.max_length),
        logprobs=s.logprobs.at[target].set(logprob, mode="drop"),
        stop_state=stop_state,
        step=s.step + 1,
        score_buffers=decode.record_scores(s.score_buffers, s.step, scores=scores, logits=logits),
    )
