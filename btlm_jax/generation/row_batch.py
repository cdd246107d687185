"""A batch of running rows: starts the rows of a request, and runs them to their end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from btlm_jax.generation import beam_loop, decode, prompts, sample_loop, stop_automaton
from btlm_jax.generation.prefill import PromptState, prefill
from btlm_jax.generation.request import GenerationRequest, RowRequest
from btlm_jax.model import kv_cache
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.params import Params

# Initial slots for new tokens where many more may be needed: a step reads all slots there are.
INITIAL_SLOTS = 256


def initial_capacity(max_slots: int) -> int:
    """Returns the initial capacity of a cache for new tokens, given the maximum."""
    return max_slots if max_slots <= 2 * INITIAL_SLOTS else INITIAL_SLOTS


def start_rows(
    request: GenerationRequest,
    params: Params,
    prompt_rows: Sequence[RowRequest | None],
    prompt_slots: int,
    max_new_slots: int,
    capacity: int,
    prompt: PromptState | None = None,
) -> tuple[KVCache, Any]:
    """Prefills prompts and starts their rows, `rows_per_prompt` for each.

    Args:
      request: the request.
      params: the weights.
      prompt_rows: as many as the mesh divides; None is an inactive row that pads the batch.
      prompt_slots: slots of the prompts' cache, P.
      max_new_slots: slots for new tokens in the buffer of ids.
      capacity: initial slots of the cache of new tokens.
      prompt: the prompts after prefill, if that has been done.

    Returns:
      The cache of the prompts, and the state that continues it: a `SampleState` or a `BeamState`.
    """
    spec, n = request.spec, request.spec.rows_per_prompt
    active = [row for row in prompt_rows if row is not None]
    rows = [active[-1] if row is None else row for row in prompt_rows]
    lengths = np.array([len(row.ids) for row in rows], np.int32)
    width = _prefill_width(int(lengths.max()), prompt_slots)
    ids = np.full((len(rows), prompt_slots + max_new_slots), request.fill_token, np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        ids[i, : lengths[i]], mask[i, : lengths[i]] = row.ids, row.mask
    if prompt is None:
        # No token attends to the padding on the right, which needs no mask.
        padded = any(not row.mask.all() for row in rows)
        prompt = prefill(
            spec.model,
            params,
            ids[:, :width],
            mask if padded else None,
            lengths,
            prompt_slots,
            request.cache_dtype,
        )
    stop_state = None
    if request.stop_table is not None:
        stop_state = stop_automaton.stop_state_after_prompt(
            request.stop_table, ids[:, :width], mask * request.stops_in_prompt
        )

    def column(name: str, dtype: Any = np.int32) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], dtype)

    inputs = decode.RowInputs(
        prompt_length=lengths,
        num_valid=mask.sum(1, dtype=np.int32),
        first_valid=mask.argmax(1).astype(np.int32),
        min_length=column("min_length"),
        max_length=column("max_length"),
        seed=column("seed", np.uint32),
        stream=column("stream"),
        copy=column("copy"),
        active=np.array([row is not None for row in prompt_rows]),
        options=jax.tree.map(lambda *x: np.stack(x), *(row.options for row in rows)),
    )
    inputs, ids, stop_state = jax.tree.map(lambda x: np.repeat(x, n, 0), (inputs, ids, stop_state))
    inputs = inputs._replace(copy=inputs.copy + np.tile(np.arange(n, dtype=np.int32), len(rows)))
    state = _loop(spec).start_loop(
        spec, params, prompt, inputs, ids, request.stop_table, stop_state, capacity
    )
    return prompt.cache, state


def run_rows(
    request: GenerationRequest,
    params: Params,
    prompt_rows: Sequence[RowRequest | None],
    prompt_slots: int,
    max_new_slots: int,
    prompt: PromptState | None = None,
) -> tuple[decode.DecodeResult, dict[str, np.ndarray]]:
    """Starts rows and runs all of them to their end.

    The cache of new tokens grows with the text, up to `max_new_slots` slots.

    Args:
      request, params, prompt_rows, prompt_slots, max_new_slots, prompt: as for `start_rows`.

    Returns:
      The result, `num_return_sequences` neighbors for each prompt with beams, otherwise all rows;
      and the scores and logits that `request.spec` records.
    """
    spec, loop = request.spec, _loop(request.spec)
    used, capacity = 0, initial_capacity(max_new_slots)
    cache, s = start_rows(
        request, params, prompt_rows, prompt_slots, max_new_slots, capacity, prompt
    )
    while True:
        s = loop.advance_loop(spec, params, cache, s, request.stop_table, np.int32(capacity - used))
        if loop.loop_ended(s):
            result = loop.loop_result(s, request.options.num_return_sequences)
            return jax.tree.map(np.asarray, (result, s.score_buffers))
        used, capacity = capacity, min(2 * capacity, max_new_slots)
        s = s._replace(cache=kv_cache.resized(s.cache, capacity))


def _loop(spec: decode.DecodeSpec) -> Any:
    return beam_loop if spec.num_beams > 1 else sample_loop


def prefill_group(model: BTLM, length: int, prompt_slots: int) -> int:
    """Returns a key for a prompt's length; prompts with the same key can be prefilled together."""
    scaling = model.config.alibi_scaling
    is_dynamic = scaling is not None and scaling.train_seq_len is not None
    return length if is_dynamic else _prefill_width(length, prompt_slots)


def _prefill_width(length: int, prompt_slots: int) -> int:
    """Returns the static width for prefill: one of at most four, because each is a program."""
    step = max(prompts.bucket_length(1), prompt_slots // 4)
    return min(-(-length // step) * step, prompt_slots)
