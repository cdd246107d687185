"""`generate`: continues a batch of prompts, with transformers' argument names and semantics.

The steps: make a request of the arguments, run its rows to their end, and cut the result to the
longest row.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike, DTypeLike

from btlm_jax.generation import decode, prompts, row_batch
from btlm_jax.generation.call_arguments import takes_model_defaults
from btlm_jax.generation.processors import Processor
from btlm_jax.generation.prompt_cache import PromptCache
from btlm_jax.generation.request import (
    GenerationRequest,
    RowRequest,
    make_padded_request,
    warn_if_stacked,
)
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params

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
    warn_if_stacked(params)
    if (output_scores or output_logits) and not return_dict_in_generate:
        logger.warning("output_scores and output_logits need return_dict_in_generate=True")
        output_scores = output_logits = False
    if prompt_cache is not None:
        _refuse_cache_arguments({"cache_length": cache_length, "cache_dtype": cache_dtype})
    request = make_padded_request(
        model,
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        min_new_tokens=min_new_tokens,
        min_length=min_length,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        seed=seed,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        logits_processor=logits_processor,
        cache_length=cache_length,
        cache_dtype=cache_dtype,
        output_scores=output_scores,
        output_logits=output_logits,
        **kwargs,
    )
    rows: list[RowRequest | None] = [*request.rows]
    rows += [None] * (-len(rows) % decode.num_batch_shards(model, params))
    prompt = None if prompt_cache is None else prompt_cache.extend(model, params, rows)
    prompt_slots, max_new_slots = _cache_slots(request.rows[0], cache_length)
    result, recorded = row_batch.run_rows(
        request, params, rows, prompt_slots, max_new_slots, prompt
    )
    output = _cut_output(request, result, recorded)
    return output if return_dict_in_generate else output.sequences


def _refuse_cache_arguments(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name}: found {value} beside prompt_cache, whose slots exist already: leave it "
                "out (PromptCache.of takes cache_dtype)"
            )


def _cache_slots(row: RowRequest, cache_length: int | None) -> tuple[int, int]:
    """Returns the slots of the prompts' cache, and the maximum of the new tokens' cache."""
    T, new = len(row.ids), row.max_new_tokens
    prompt_slots, new_slots = prompts.bucket_length(T), prompts.bucket_length(new)
    if cache_length is not None:  # buckets may exceed it
        prompt_slots = prompt_slots if prompt_slots + new <= cache_length else T
        new_slots = min(new_slots, cache_length - prompt_slots)
    return prompt_slots, new_slots


def _cut_output(
    request: GenerationRequest, result: decode.DecodeResult, recorded: Mapping[str, np.ndarray]
) -> GenerateOutput:
    """Returns the output without padding rows, and without slots after the longest row."""
    options, prompt_length = request.options, len(request.rows[0].ids)
    num_rows = len(request.rows) * options.num_return_sequences
    end = int(result.lengths[:num_rows].max())

    def new_tokens(x: np.ndarray) -> np.ndarray:
        return x[:num_rows, prompt_length:end]

    logprobs = new_tokens(result.logprobs)
    lengths = result.lengths[:num_rows, None]
    decode.check_logprobs(options, logprobs[np.arange(prompt_length, end) < lengths])
    row_ended = np.isnan(logprobs.T)[..., None]

    def steps(name: str) -> np.ndarray | None:
        if name not in recorded:
            return None
        num_search_rows = len(request.rows) * options.rows_per_prompt
        x = recorded[name][: end - prompt_length, :num_search_rows]
        # The rows of a beam search continue after the best one has ended.
        return x if options.num_beams > 1 else np.where(row_ended, np.nan, x)

    scores, indices = result.sequences_scores, result.beam_indices
    return GenerateOutput(
        result.ids[:num_rows, :end],
        logprobs,
        None if scores is None else scores[:num_rows],
        None if indices is None else new_tokens(indices),
        steps("scores"),
        steps("logits"),
    )
