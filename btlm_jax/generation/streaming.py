"""`stream`: the tokens of one continuation, or its text, as they are generated."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from btlm_jax.generation import decode, prompts, sample_loop
from btlm_jax.generation.detokenize import detokenize_stream
from btlm_jax.generation.request import GenerationRequest, make_request, warn_if_stacked
from btlm_jax.generation.row_batch import initial_capacity, start_rows
from btlm_jax.generation.sample_loop import SampleState
from btlm_jax.model import kv_cache
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params


def stream(
    model: BTLM,
    params: Params,
    input_ids: ArrayLike,
    *,
    tokenizer: Any = None,
    chunk: int = 1,
    **arguments: Any,
) -> Iterator[Any]:
    """Continues a prompt and yields the new tokens as they are generated.

    The device computes the next tokens while the previous ones are fetched and used. Closing the
    iterator, at any time, ends the work.

    Args:
      model: the model.
      params: its weights, on a device or a mesh.
      input_ids: int [T] or [1, T], the prompt, which is not repeated.
      tokenizer: yield text instead of ids, in pieces of whole characters, without special tokens.
        Together they are the text of all tokens.
      chunk: number of tokens between two fetches; a larger one costs the host less and yields
        tokens in groups.
      **arguments: those of `generate` (`help(btlm.generate)`) except `attention_mask`,
        `cache_length`, `prompt_cache` and those about the form of the result.

    Returns:
      An iterator over int ids, the same as `generate`'s, including the EOS; or over str.

    Raises:
      ValueError: as `generate`, before the first token; beams, whose result is only known at the
        end; several rows.
    """
    ids = prompts.as_id_array(input_ids)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise ValueError(
            f"input_ids: found shape {ids.shape}, expected one prompt, [T] or [1, T]: "
            "generate_batch continues several"
        )
    if chunk < 1:
        raise ValueError(f"chunk: found {chunk}, expected >= 1")
    request = make_request(model, [ids], tokenizer=tokenizer, **arguments)
    options = request.options
    if options.num_beams > 1:
        raise ValueError(
            f"num_beams: found {options.num_beams}, expected 1: the best beam is "
            "known only at the end; use generate, or no beams"
        )
    if options.num_return_sequences > 1:
        raise ValueError(
            f"num_return_sequences: found {options.num_return_sequences}, expected 1: a stream "
            "has one row; use generate"
        )
    warn_if_stacked(params)
    groups = _stream_tokens(request, params, chunk)
    if tokenizer is not None:
        return detokenize_stream(tokenizer, ids.tolist(), groups)
    return (token for group in groups for token in group)


def _stream_tokens(request: GenerationRequest, params: Params, chunk: int) -> Iterator[list[int]]:
    (row,) = request.rows
    T, max_new_slots = len(row.ids), prompts.bucket_length(row.max_new_tokens)
    capacity = initial_capacity(max_new_slots)
    rows = [row, *[None] * (decode.num_batch_shards(request.spec.model, params) - 1)]
    cache, s = start_rows(request, params, rows, prompts.bucket_length(T), max_new_slots, capacity)
    # The first new token enters the cache in the next step, so one more token than slots is known.
    length, used, computed = T, 0, _copy_tokens(s, np.int32(T), chunk)
    while True:
        pending, start, length = computed, length, T + 1 + used
        if capacity - used < chunk and capacity < max_new_slots:
            capacity = min(2 * capacity, max_new_slots)
            s = s._replace(cache=kv_cache.resized(s.cache, capacity))
        steps = min(chunk, capacity - used)
        s = sample_loop.advance_loop(
            request.spec, params, cache, s, request.stop_table, np.int32(steps), np.int32(len(rows))
        )
        used += steps
        computed = _copy_tokens(s, np.int32(length), chunk)
        # The device works on the step above while these tokens are fetched.
        tokens, logprobs, end, done = jax.device_get(pending)
        decode.check_logprobs(request.options, logprobs[: end - start])
        yield tokens[: end - start].tolist()
        if done:
            return


@functools.partial(jax.jit, static_argnames="size")
def _copy_tokens(s: SampleState, start, size: int):
    """Returns the first row's `size` tokens from `start` on, their log-probabilities, its length
    and whether it is done.

    They are copies, because the next step donates the state.
    """
    slots = jnp.minimum(start + jnp.arange(size), s.ids.shape[1] - 1)
    return s.ids[0][slots], s.logprobs[0][slots], s.length[0], s.done[0]
