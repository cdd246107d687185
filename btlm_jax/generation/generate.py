"""`generate`: continuations of prompts, with the argument names and semantics of transformers."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike, DTypeLike

from btlm_jax.generation import beam_loop, decode, prompts, request, sample_loop, stop_automaton
from btlm_jax.generation.prefill import prefill_padded
from btlm_jax.generation.processors import Processor, as_processors
from btlm_jax.generation.prompt_cache import PromptCache
from btlm_jax.model import kv_cache
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class GenerateOutput:
    """What `generate(..., return_dict_in_generate=True)` returns.

    R rows are `num_return_sequences` for each prompt, n the greatest number of new tokens.

    Attributes:
      sequences: int32 [R, T + n], prompts included.
      logprobs: fp32 [R, n]: the model's own log-probability of each new token, before any processor
        or warper; NaN after the end of a row. Of several rows of beams, of each one's own tokens.
      sequences_scores: of beams, fp32 [R]: the log-probability after the processors, divided by
        length ** length_penalty.
      beam_indices: of beams, int32 [R, n]: the row (prompt * num_beams + beam) of `scores` from
        which each new token was taken; -1 after the end.
      scores: with `output_scores`, fp32 [n, rows, V]: what was chosen from, at every step; NaN
        after the end of a row (not of beams, where rows are not the result's).
      logits: with `output_logits`, fp32 [n, rows, V]: of the model; likewise.
    """

    sequences: np.ndarray
    logprobs: np.ndarray
    sequences_scores: np.ndarray | None = None
    beam_indices: np.ndarray | None = None
    scores: np.ndarray | None = None
    logits: np.ndarray | None = None


def generate(
    model: BTLM,
    params: Params,
    input_ids: ArrayLike,
    *,
    attention_mask: ArrayLike | None = None,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    min_new_tokens: int | None = None,
    min_length: int | None = None,
    eos_token_id: prompts.EndTokens = "config",
    pad_token_id: int | None = None,
    seed: prompts.Seeds = 0,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    logits_processor: Processor | Sequence[Processor] = (),
    cache_length: int | None = None,
    cache_dtype: DTypeLike | None = None,
    prompt_cache: PromptCache | None = None,
    return_dict_in_generate: bool = False,
    output_scores: bool = False,
    output_logits: bool = False,
    **named: Any,
) -> Any:
    """Continues prompts.

    Runs inside jit. Programs are compiled for every set of options and every bucket of lengths
    (`prompts.bucket_length`); seeds and lengths within the bucket may change without compiling.

    Args:
      model, params: the model and its weights, on a device or a mesh.
      input_ids: int [B, T]; shorter prompts are padded on the left.
      attention_mask: [B, T], nonzero for real tokens; required where prompts are padded, unless
        `pad_token_id` says what padding is and is no EOS.
      max_new_tokens, max_length: upper bounds, of new tokens or with the (padded) prompt; default
        20 new tokens. Generation ends earlier once every row has ended.
      min_new_tokens, min_length: no EOS before.
      eos_token_id: one or several ids that end a row; "config" takes the model's, None never ends.
      pad_token_id: fills rows that have ended; default the model's pad token, else the first EOS.
      seed: of the random draws: one for each row, which then draws the same alone and in any batch;
        or one for all, of which each row takes a stream of its own, by its index; or a pair of a
        seed and a stream for each row.
      stop_strings, tokenizer: strings that end a row with the token that completes one, and the
        tokenizer to find them with. The row is then filled up, also where no EOS is set
        (transformers lets it go on until the others have ended).
      logits_processor: pure functions (ids [R, S], length [R], scores [R, V]) -> scores that JAX
        can trace, applied after the processors of the options; `length` of a row's S slots are
        filled. A new function compiles a new program.
      cache_length: the most slots the KV cache may take; more tokens are refused. By default it
        takes as many as are needed, in buckets, and grows with the text.
      cache_dtype: of the KV cache: "int8" takes half of bf16. Default the compute dtype.
      prompt_cache: how the prompts begin, read before (`PromptCache`); without the two above.
      return_dict_in_generate: return an `GenerateOutput`.
      output_scores, output_logits: which of its large arrays to fill.
      **named: see `options.GenerationOptions`, the names and defaults.

    Returns:
      int32 [B * num_return_sequences, T + n], prompts included, as long as the longest row, or an
      `GenerateOutput`.

    Raises:
      ValueError: an unknown argument or a value out of range; an empty prompt, tokens outside the
        vocabulary, right padding; more tokens than the cache or the learned positions hold.
    """
    c = model.config
    request.warn_if_stacked(params)
    how, eos = request.check_options(c, eos_token_id, named, inspect.signature(generate).parameters)
    if (output_scores or output_logits) and not return_dict_in_generate:
        logger.warning("output_scores and output_logits need return_dict_in_generate=True")
        output_scores = output_logits = False
    own = {"cache_length": cache_length, "cache_dtype": cache_dtype}
    if prompt_cache is not None and (given := [name for name in own if own[name] is not None]):
        raise ValueError(
            f"{given[0]}: found {own[given[0]]} beside prompt_cache, whose slots are there "
            "already: leave it out (PromptCache.of takes cache_dtype)"
        )
    pad = c.pad_token_id if pad_token_id is None else pad_token_id
    ids, mask = prompts.check_prompts(
        input_ids, attention_mask, c.vocab_size, None if pad in eos else pad
    )
    rows, T = ids.shape
    lengths = prompts.resolve_lengths(T, max_new_tokens, max_length, min_new_tokens, min_length)
    prompts.check_context_length(lengths, c, cache_length)
    seed_of, stream_of = prompts.row_seeds(seed, rows)
    table = state = None
    if stop_strings is not None:
        table = stop_automaton.build_stop_table(stop_strings, tokenizer, c.vocab_size)
        state = stop_automaton.stop_state_after_prompt(table, ids, mask)

    extra = -rows % decode.num_batch_shards(model, params)

    def filled(x):
        """`x` with copies of the last row, so that the batch divides over the mesh."""
        return np.concatenate([x, np.repeat(x[-1:], extra, 0)])

    ids, mask = filled(ids), filled(mask)
    fill = _fill(pad, eos, how.num_beams > 1)
    new = lengths.most - T
    width, room = prompts.bucket_length(T), prompts.bucket_length(new)
    if cache_length is not None:  # a bucket may be more than there may be
        width = width if width + new <= cache_length else T
        room = min(room, cache_length - width)
    if prompt_cache is None:
        read = prefill_padded(model, params, ids, mask, width, cache_dtype)
    else:
        read = prompt_cache.continued(model, params, ids, mask)
    steps = prompts.bucket_length(new)
    program = decode.DecodeSpec(
        model,
        how,
        eos,
        as_processors(logits_processor),
        steps * output_scores,
        steps * output_logits,
    )

    def each(x):
        return np.repeat(x, how.rows_per_prompt, 0)

    def same(x):
        return np.full(len(ids) * how.rows_per_prompt, x, np.int32)

    state_of_row = decode.RowInputs(
        same(T),
        each(mask.sum(1)),
        each(mask.argmax(1)),
        same(lengths.least),
        same(lengths.most),
        each(filled(seed_of)),
        each(filled(stream_of)),
        np.tile(np.arange(how.rows_per_prompt, dtype=np.int32), len(ids)),
        each(np.arange(len(ids)) < rows),
    )
    after = prompts.bucket_length(T) - T + prompts.bucket_length(new)
    buffer = np.pad(each(ids), ((0, 0), (0, after)), constant_values=fill)
    begun = each(filled(state)) if state is not None else None
    result, kept = _run(program, params, read, state_of_row, buffer, table, begun, room)

    count = rows * how.num_return_sequences
    lengths_R = np.asarray(result.lengths)[:count]
    end = int(lengths_R.max())
    sequences = np.asarray(result.ids)[:count, :end]
    if not return_dict_in_generate:
        return sequences
    logprobs = np.asarray(result.logprobs)[:count, T:end]

    def steps_of(x):
        """Of the rows that were decoded, which with beams run on after the best has ended."""
        if x is None:
            return None
        x = np.asarray(x)[: end - T, : rows * how.rows_per_prompt]
        return x if how.num_beams > 1 else np.where(np.isnan(logprobs.T)[..., None], np.nan, x)

    scores, parents = result.sequences_scores, result.beam_indices
    return GenerateOutput(
        sequences,
        logprobs,
        None if scores is None else np.asarray(scores)[:count],
        None if parents is None else np.asarray(parents)[:count, T:end],
        steps_of(kept.get("scores")),
        steps_of(kept.get("logits")),
    )


def _run(program, params, prompt, rows, ids, table, stop_state, room: int) -> Any:
    """Decodes to the end, in a cache that grows to `room` slots for new tokens.

    Returns:
      The `decode.DecodeResult`, and the scores and logits that are kept.
    """
    loop: Any = beam_loop if program.options.num_beams > 1 else sample_loop
    used, capacity = 0, request.initial_capacity(room)
    s = loop.start_loop(program, params, prompt, rows, ids, table, stop_state, capacity)
    while True:
        s = loop.advance_loop(program, params, prompt.cache, s, table, capacity - used)
        if loop.loop_ended(s):
            return loop.loop_result(program, s), s.kept
        used, capacity = capacity, min(2 * capacity, room)
        s = s._replace(cache=kv_cache.resized(s.cache, capacity))


def _fill(pad: int | None, eos: tuple[int, ...], beams: bool) -> int:
    """The token after the end of a row."""
    if beams and eos:  # transformers' `pad or eos[0]`: there a pad token of 0 counts as none
        return pad or eos[0]
    return pad if pad is not None else eos[0] if eos else 0
