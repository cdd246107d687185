"""`stream`: the tokens of one continuation, or its text, as they come."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from btlm_jax.generation import decode, detokenize, prompts, sample_loop
from btlm_jax.generation.request import (
    GenerationRequest,
    initial_capacity,
    make_request,
    start_rows,
    warn_if_stacked,
)
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
    """Continues a prompt, and gives the new tokens while it goes on.

    The device computes the next tokens while the last ones are fetched and used. Leaving the
    iterator, at any time, ends the work.

    Args:
      model, params: the model and its weights, on a device or a mesh.
      input_ids: int [T] or [1, T], the prompt, which is not repeated.
      tokenizer: gives text instead of ids, in pieces of whole characters, without special tokens;
        together they are what decoding all tokens would give.
      chunk: tokens computed between two looks; more cost the host less, and come in groups.
      **arguments: those of `generate` (`help(btlm.generate)`), but for `attention_mask`,
        `cache_length`, `prompt_cache` and what concerns its result.

    Returns:
      An iterator over int ids, those `generate` gives, an EOS included; or over str.

    Raises:
      ValueError: as `generate`, at once; beams, which are not known before their end; several rows.
    """
    ids = np.asarray(input_ids)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise ValueError(
            f"input_ids: found shape {ids.shape}, expected one prompt, [T] or [1, T]: "
            "generate_batch continues several"
        )
    if chunk < 1:
        raise ValueError(f"chunk: found {chunk}, expected >= 1")
    asked = make_request(model, [ids], tokenizer=tokenizer, **arguments)
    if asked.program.options.num_beams > 1:
        raise ValueError(
            f"num_beams: found {asked.program.options.num_beams}, expected 1: which beam is the "
            "best is known at the end only; use generate, or do without beams"
        )
    if asked.copies > 1:
        raise ValueError(f"num_return_sequences: found {asked.copies}, expected 1: streams have "
                         "one row; use generate")  # fmt: skip
    warn_if_stacked(params)
    groups = _tokens(asked, params, chunk)
    if tokenizer is not None:
        return detokenize.detokenize_stream(tokenizer, ids.tolist(), groups)
    return (token for group in groups for token in group)


def _tokens(asked: GenerationRequest, params: Params, chunk: int) -> Iterator[list[int]]:
    (row,) = asked.rows
    T, room = len(row.ids), prompts.bucket_length(row.new)
    capacity = initial_capacity(room)
    rows = [row, *[None] * (decode.num_batch_shards(asked.program.model, params) - 1)]
    cache, s = start_rows(asked, params, rows, prompts.bucket_length(T), room, capacity)
    # The first token has no slot yet: it takes one when it is read, to choose the second.
    length, used, ahead = T, 0, _tail(s, np.int32(T), chunk)
    while True:
        coming, before, length = ahead, length, T + 1 + used
        if capacity - used < chunk and capacity < room:
            capacity = min(2 * capacity, room)
            s = s._replace(cache=kv_cache.resized(s.cache, capacity))
        steps = min(chunk, capacity - used)
        s = sample_loop.advance_loop(
            asked.program, params, cache, s, asked.table, np.int32(steps), np.int32(len(rows))
        )
        used += steps
        ahead = _tail(s, np.int32(length), chunk)
        tokens, end, done = jax.device_get(coming)
        yield tokens[: end - before].tolist()
        if done:
            return


@functools.partial(jax.jit, static_argnames="size")
def _tail(s: SampleState, start, size: int):
    """Of the first row: `size` tokens from `start` on, its length, and whether it is done.

    Copies, which outlast the state that is given away.
    """
    at = jnp.minimum(start + jnp.arange(size), s.ids.shape[1] - 1)
    return s.ids[0][at], s.length[0], s.done[0]
