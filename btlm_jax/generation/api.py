"""`generate`: continuations of prompts, with the argument names and semantics of transformers."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from btlm_jax import sharding
from btlm_jax.generation import decode, options, prompts, stopping
from btlm_jax.generation.processors import Processor
from btlm_jax.model import BTLM
from btlm_jax.weights import Params

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
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
      scores: with `output_scores`, fp32 [n, rows, V]: what was chosen from, at every step.
      logits: with `output_logits`, fp32 [n, rows, V]: of the model, at every step.
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
    seed: int | Sequence[int] = 0,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    logits_processor: Processor | Sequence[Processor] = (),
    cache_length: int | None = None,
    return_dict_in_generate: bool = False,
    output_scores: bool = False,
    output_logits: bool = False,
    **named: Any,
) -> Any:
    """Continues prompts.

    Runs inside jit. A program is compiled for every set of options and every bucket of lengths
    (`prompts.bucket`); seeds and lengths within the bucket may change without compiling.

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
        or one for all, of which each row takes a stream of its own, by its index.
      stop_strings, tokenizer: strings that end a row with the token that completes one, and the
        tokenizer to find them with. The row is then filled up, also where no EOS is set
        (transformers lets it go on until the others have ended).
      logits_processor: pure functions (ids [R, S], length, scores [R, V]) -> scores that JAX can
        trace, applied after the processors of the options; `length` of the S slots are filled. A
        new function compiles a new program.
      cache_length: slots of the KV cache; default as many as needed, in buckets.
      return_dict_in_generate: return an `Output`.
      output_scores, output_logits: which of its large arrays to fill.
      **named: see `options.Options`, the names and defaults.

    Returns:
      int32 [B * num_return_sequences, T + n], prompts included, as long as the longest row, or an
      `Output`.

    Raises:
      ValueError: an unknown argument or a value out of range; an empty prompt, tokens outside the
        vocabulary, right padding; more tokens than the cache or the learned positions hold.
    """
    c = model.config
    how = options.from_names(named, inspect.signature(generate).parameters)
    for idle in how.idle:
        logger.warning("%s", idle)
    how.check_vocabulary(c.vocab_size)
    eos = prompts.end_tokens(eos_token_id, c)
    if any(len(ids) == 1 and ids[0] in eos for ids in how.bad_words_ids):
        logger.warning("bad_words_ids: an EOS alone stays allowed; see suppress_tokens")
    if (output_scores or output_logits) and not return_dict_in_generate:
        logger.warning("output_scores and output_logits need return_dict_in_generate=True")
        output_scores = output_logits = False
    pad = c.pad_token_id if pad_token_id is None else pad_token_id
    ids, mask = prompts.prompts(
        input_ids, attention_mask, c.vocab_size, None if pad in eos else pad
    )
    rows, T = ids.shape
    lengths = prompts.lengths(T, max_new_tokens, max_length, min_new_tokens, min_length)
    prompts.check_context(lengths, c, cache_length)
    seed_of, stream_of = prompts.seeds(seed, rows)
    table = state = None
    if stop_strings is not None:
        table = stopping.table(stop_strings, tokenizer, c.vocab_size)
        state = stopping.after_prompt(table, ids, mask)

    capacity = prompts.bucket(lengths.most) if cache_length is None else cache_length
    steps = min(prompts.bucket(lengths.most - T), capacity)
    mesh = sharding.mesh_of(params["wte"])
    extra = -rows % sharding.ways(mesh, model.rules, "batch") if mesh is not None else 0

    def filled(x, width=None, value=0):
        """`x` with copies of the last row, so that the batch divides over the mesh, and wider."""
        x = np.concatenate([x, np.repeat(x[-1:], extra, 0)])
        return x if width is None else np.pad(x, ((0, 0), (0, width - T)), constant_values=value)

    fill = _fill(pad, eos, how.num_beams > 1)
    custom = (logits_processor,) if callable(logits_processor) else tuple(logits_processor or ())
    program = decode.Program(
        model, how, eos, custom, steps * output_scores, steps * output_logits
    )  # fmt: skip
    request = decode.Request(
        ids=filled(ids, capacity, fill),
        mask=filled(mask, min(prompts.bucket(T), capacity)),
        prompt_length=np.int32(T),
        min_length=np.int32(lengths.least),
        max_length=np.int32(lengths.most),
        rows=np.int32(rows),
        seeds=filled(seed_of),
        streams=filled(stream_of),
        fill=np.int32(fill),
        stop=table,
        stop_state=None if state is None else filled(state),
    )
    result = decode.run(program, params, request)

    count = rows * how.num_return_sequences
    end = int(np.asarray(result.lengths)[:count].max())
    sequences = np.asarray(result.ids)[:count, :end]
    if not return_dict_in_generate:
        return sequences
    # Beams run on after the best has ended.
    kept = rows * how.copies, end - T

    def steps_of(x):
        return None if x is None else np.asarray(x)[: kept[1], : kept[0]]

    scores, parents = result.sequences_scores, result.beam_indices
    return Output(
        sequences,
        np.asarray(result.logprobs)[:count, T:end],
        None if scores is None else np.asarray(scores)[:count],
        None if parents is None else np.asarray(parents)[:count, T:end],
        steps_of(result.scores),
        steps_of(result.logits),
    )


def _fill(pad: int | None, eos: tuple[int, ...], beams: bool) -> int:
    """The token after the end of a row."""
    if beams and eos:  # transformers' `pad or eos[0]`: there a pad token of 0 counts as none
        return pad or eos[0]
    return pad if pad is not None else eos[0] if eos else 0
