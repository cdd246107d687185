"""`generate`: continues a batch of prompts, with transformers' argument names and semantics.

The steps: check the arguments, prefill the prompts, run the sample loop or the beam loop to its
end, and cut the result to the longest row.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from btlm_jax.generation import beam_loop, decode, prompts, request, sample_loop, stop_automaton
from btlm_jax.generation.call_arguments import takes_model_defaults
from btlm_jax.generation.options import GenerationOptions
from btlm_jax.generation.prefill import PromptState, prefill_padded
from btlm_jax.generation.processors import Processor
from btlm_jax.generation.prompt_cache import PromptCache
from btlm_jax.generation.row_options import row_options
from btlm_jax.model import kv_cache
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import CACHE_DTYPES
from btlm_jax.model.params import Params
from btlm_jax.utils.dtypes import optional_dtype

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class GenerateOutput:
    """The result of `generate(..., return_dict_in_generate=True)`.

    There are R rows, `num_return_sequences` for each prompt, and n is the largest number of new
    tokens.

    Attributes:
      sequences: int32 [R, T + n], including the prompts.
      logprobs: fp32 [R, n]: the model's log-probability of each new token, before any processor or
        warper; NaN after the end of a row.
      sequences_scores: fp32 [R], for beams only: the log-probability after the processors, divided
        by length ** length_penalty.
      beam_indices: int32 [R, n], for beams only: the row (prompt * num_beams + beam) of `scores`
        that each new token was taken from; -1 after the end.
      scores: fp32 [n, rows, V], with `output_scores`: the scores from which each token was
        selected. Without beams, NaN after the end of a row; with beams, rows are those of the
        search, not those of the result.
      logits: fp32 [n, rows, V], with `output_logits`: the model's logits, in the same form.
    """

    sequences: np.ndarray
    logprobs: np.ndarray
    sequences_scores: np.ndarray | None = None
    beam_indices: np.ndarray | None = None
    scores: np.ndarray | None = None
    logits: np.ndarray | None = None


@takes_model_defaults
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
    eos_token_id: prompts.EosIds = "config",
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
    generation_config: Any = None,
    **kwargs: Any,
) -> Any:
    """Continues prompts.

    Arguments that are not given have the values of the checkpoint's `generation_config.json`, if
    `load` found one (`model.generation_config`), with a notice of what it sets.

    Decoding runs inside jit. A program is compiled for every set of rules that are used, such as
    sampling, beams or a repetition penalty, and every bucket of lengths (`prompts.bucket_length`);
    the values of options, seeds, and lengths within a bucket change without compiling.

    Args:
      model: the model.
      params: its weights, on a device or a mesh.
      input_ids: int [B, T]; shorter prompts are padded on the left.
      attention_mask: [B, T], nonzero for valid tokens; required for padded prompts, unless
        `pad_token_id` identifies the padding and is not an EOS.
      max_new_tokens: maximum number of new tokens; default 20. Generation ends earlier once every
        row has ended.
      max_length: instead, the maximum number of tokens including the (padded) prompt.
      min_new_tokens: no EOS before this number of new tokens.
      min_length: no EOS before this number of tokens including the (padded) prompt.
      eos_token_id: one id or several that end a row; None never ends; default those of
        `generation_config.json`, else "config", that of the model's configuration.
      pad_token_id: fills rows after their end; default the model's pad token, else the first EOS.
      seed: random seed: one per row, with which a row draws the same tokens alone and in any batch;
        or one for all, of which each row uses its own stream, by its index; or a (seed, stream)
        pair per row.
      stop_strings: strings that end a row with the token that completes one. The row is then
        padded, even if no EOS is set (transformers continues it until the other rows have ended).
      tokenizer: the tokenizer to match stop strings with.
      logits_processor: pure functions (ids [R, S], length [R], scores [R, V]) -> scores that JAX
        can trace, applied after the processors of the options; the first `length` of a row's S
        slots are filled. A new function compiles a new program.
      cache_length: maximum slots of the KV cache; more tokens are an error. By default the cache
        has as many as needed, in buckets, and grows with the text.
      cache_dtype: dtype of the KV cache: "int8" takes half the memory of bf16. Default the compute
        dtype.
      prompt_cache: a prefilled beginning of the prompts (`PromptCache`); excludes `cache_length`
        and `cache_dtype`.
      return_dict_in_generate: return a `GenerateOutput`.
      output_scores: fill the (large) array of scores of the `GenerateOutput`.
      output_logits: fill the (large) array of logits of the `GenerateOutput`.
      generation_config: a dict of arguments, or a `GenerationConfig` of transformers, for what the
        other arguments and not the checkpoint should decide.
      **kwargs: see `options.GenerationOptions` for names and defaults.

    Returns:
      int32 [B * num_return_sequences, T + n], including the prompts, as long as the longest row; or
      a `GenerateOutput`.

    Raises:
      ValueError: an unknown argument or a value out of range; an empty prompt, tokens outside the
        vocabulary, padding on the right; more tokens than the cache or the learned positions hold.
    """
    assert generation_config is None  # resolved by the decorator
    c = model.config
    request.warn_if_stacked(params)
    known_names = inspect.signature(generate).parameters
    options, eos = request.check_options(c, eos_token_id, kwargs, known_names)
    if (output_scores or output_logits) and not return_dict_in_generate:
        logger.warning("output_scores and output_logits need return_dict_in_generate=True")
        output_scores = output_logits = False
    if prompt_cache is not None:
        _refuse_cache_arguments({"cache_length": cache_length, "cache_dtype": cache_dtype})
    cache_dtype = optional_dtype(cache_dtype, "cache_dtype", CACHE_DTYPES)
    pad = c.pad_token_id if pad_token_id is None else pad_token_id
    ids, mask = prompts.check_prompts(
        input_ids, attention_mask, c.vocab_size, None if pad in eos else pad
    )
    rows, T = ids.shape
    limits = prompts.resolve_lengths(T, max_new_tokens, max_length, min_new_tokens, min_length)
    prompts.check_context_length(limits, c, cache_length)
    seeds, streams = prompts.row_seeds(seed, rows)
    stop_table = stop_state = None
    if stop_strings is not None:
        stop_table = stop_automaton.build_stop_table(stop_strings, tokenizer, c.vocab_size)
        stop_state = stop_automaton.stop_state_after_prompt(stop_table, ids, mask)

    extra_rows = -rows % decode.num_batch_shards(model, params)

    def pad_rows(x):
        """Appends copies of the last row, so that the mesh divides the batch."""
        return np.concatenate([x, np.repeat(x[-1:], extra_rows, 0)])

    def per_row(x):
        return np.repeat(x, options.rows_per_prompt, 0)

    ids, mask = pad_rows(ids), pad_rows(mask)
    prompt_slots, max_new_slots = _cache_slots(limits, cache_length)
    if prompt_cache is None:
        prompt = prefill_padded(model, params, ids, mask, prompt_slots, cache_dtype)
    else:
        prompt = prompt_cache.extend(model, params, ids, mask)
    steps = prompts.bucket_length(limits.max_new_tokens)
    spec = request.decode_spec(
        model,
        options,
        eos,
        logits_processor,
        score_steps=steps * output_scores,
        logit_steps=steps * output_logits,
    )
    num_rows = len(ids) * options.rows_per_prompt
    inputs = decode.RowInputs(
        prompt_length=np.full(num_rows, T, np.int32),
        num_valid=per_row(mask.sum(1)),
        first_valid=per_row(mask.argmax(1)),
        min_length=np.full(num_rows, limits.min_length, np.int32),
        max_length=np.full(num_rows, limits.max_length, np.int32),
        seed=per_row(pad_rows(seeds)),
        stream=per_row(pad_rows(streams)),
        copy=np.tile(np.arange(options.rows_per_prompt, dtype=np.int32), len(ids)),
        active=per_row(np.arange(len(ids)) < rows),
        options=row_options([options] * num_rows, [eos] * num_rows),
    )
    fill = _fill_token(pad, eos, options.num_beams > 1)
    extra_slots = prompts.bucket_length(T) - T + steps
    buffer = np.pad(per_row(ids), ((0, 0), (0, extra_slots)), constant_values=fill)
    if stop_state is not None:
        stop_state = per_row(pad_rows(stop_state))
    result, recorded = _run_loop(
        spec,
        params,
        prompt,
        inputs,
        buffer,
        stop_table,
        stop_state,
        max_new_slots,
        options.num_return_sequences,
    )
    output = _cut_output(options, result, recorded, rows, T)
    return output if return_dict_in_generate else output.sequences


def _refuse_cache_arguments(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name}: found {value} beside prompt_cache, whose slots exist already: leave it "
                "out (PromptCache.of takes cache_dtype)"
            )


def _cache_slots(limits: prompts.LengthLimits, cache_length: int | None) -> tuple[int, int]:
    """Returns the slots of the prompts' cache, and the maximum of the new tokens' cache."""
    T, new = limits.prompt_length, limits.max_new_tokens
    prompt_slots, new_slots = prompts.bucket_length(T), prompts.bucket_length(new)
    if cache_length is not None:  # buckets may exceed it
        prompt_slots = prompt_slots if prompt_slots + new <= cache_length else T
        new_slots = min(new_slots, cache_length - prompt_slots)
    return prompt_slots, new_slots


def _run_loop(
    spec: decode.DecodeSpec,
    params: Params,
    prompt: PromptState,
    rows: decode.RowInputs,
    ids: np.ndarray,
    stop_table: np.ndarray | None,
    stop_state: np.ndarray | None,
    max_new_slots: int,
    num_return_sequences: int,
) -> tuple[decode.DecodeResult, Mapping[str, jax.Array]]:
    """Decodes to the end, in a cache that grows up to `max_new_slots` slots for new tokens.

    Returns:
      The result, and the recorded scores and logits.
    """
    loop: Any = beam_loop if spec.num_beams > 1 else sample_loop
    used, capacity = 0, request.initial_capacity(max_new_slots)
    s = loop.start_loop(spec, params, prompt, rows, ids, stop_table, stop_state, capacity)
    while True:
        s = loop.advance_loop(spec, params, prompt.cache, s, stop_table, capacity - used)
        if loop.loop_ended(s):
            return loop.loop_result(s, num_return_sequences), s.score_buffers
        used, capacity = capacity, min(2 * capacity, max_new_slots)
        s = s._replace(cache=kv_cache.resized(s.cache, capacity))


def _cut_output(
    options: GenerationOptions,
    result: decode.DecodeResult,
    recorded: Mapping[str, jax.Array],
    num_prompts: int,
    prompt_length: int,
) -> GenerateOutput:
    """Returns the output without padding rows, and without slots after the longest row."""
    num_rows = num_prompts * options.num_return_sequences
    end = int(np.asarray(result.lengths)[:num_rows].max())

    def new_tokens(x):
        return np.asarray(x)[:num_rows, prompt_length:end]

    logprobs = new_tokens(result.logprobs)
    lengths = np.asarray(result.lengths)[:num_rows, None]
    decode.check_logprobs(options, logprobs[np.arange(prompt_length, end) < lengths])
    row_ended = np.isnan(logprobs.T)[..., None]

    def steps(name):
        if name not in recorded:
            return None
        num_search_rows = num_prompts * options.rows_per_prompt
        x = np.asarray(recorded[name])[: end - prompt_length, :num_search_rows]
        # The rows of a beam search continue after the best one has ended.
        return x if options.num_beams > 1 else np.where(row_ended, np.nan, x)

    scores, indices = result.sequences_scores, result.beam_indices
    return GenerateOutput(
        np.asarray(result.ids)[:num_rows, :end],
        logprobs,
        None if scores is None else np.asarray(scores)[:num_rows],
        None if indices is None else new_tokens(indices),
        steps("scores"),
        steps("logits"),
    )


def _fill_token(pad: int | None, eos: tuple[int, ...], has_beams: bool) -> int:
    """Returns the token that fills a row after its end."""
    if has_beams and eos:  # as transformers' `pad or eos[0]`, which ignores a pad token of 0
        return pad or eos[0]
    return pad if pad is not None else eos[0] if eos else 0
