"""Requests for streaming and continuous batching, in which every row has its own length.

A `GenerationRequest` holds what all rows share, a `RowRequest` is one continuation of one prompt.
`start_rows` prefills prompts and starts their rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from btlm_jax.config import BTLMConfig
from btlm_jax.generation import decode, prompts, sample_loop, stop_automaton
from btlm_jax.generation.call_arguments import resolve_arguments
from btlm_jax.generation.options import GenerationOptions
from btlm_jax.generation.prefill import prefill
from btlm_jax.generation.processors import Processor, as_processors
from btlm_jax.generation.row_options import RowOptions, row_options, rule_sizes, take_rows
from btlm_jax.model import sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import CACHE_DTYPES, KVCache
from btlm_jax.model.params import Params, is_unstacked
from btlm_jax.utils.dtypes import optional_dtype
from btlm_jax.utils.notices import warn_once

logger = logging.getLogger(__name__)

# Initial slots for new tokens where many more may be needed: a step reads all slots there are.
INITIAL_SLOTS = 256
# Weights smaller than this decode fast enough when stacked.
_SMALL_BYTES = 256 << 20
# Arguments that only `generate` accepts.
_GENERATE_ONLY = (
    "attention_mask", "cache_length", "prompt_cache", "return_dict_in_generate", "output_scores",
    "output_logits",
)  # fmt: skip


class RowRequest(NamedTuple):
    """One continuation of one prompt. Lengths include the prompt."""

    ids: np.ndarray  # int32 [T]
    options: RowOptions  # of this row, without the dimension of rows
    min_length: int  # no EOS before
    max_length: int
    seed: int
    stream: int
    copy: int  # index among the continuations of the same prompt

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of new tokens."""
        return self.max_length - len(self.ids)


@dataclasses.dataclass(frozen=True, eq=False)
class GenerationRequest:
    """Checked rows and how to continue them.

    Attributes:
      spec: the static arguments, with one row per prompt.
      options: the generation options.
      eos: ids that end a row.
      rows: `num_return_sequences` neighbors for each prompt.
      num_return_sequences: continuations per prompt.
      stop_table: `build_stop_table`, or None.
      cache_dtype: dtype of the KV cache.
      arguments: the arguments as given, for `generate`.
      stops_in_prompt: whether a stop string may begin in the prompt, as in transformers; with beams
        it always may.
    """

    spec: decode.DecodeSpec
    options: GenerationOptions
    eos: tuple[int, ...]
    rows: list[RowRequest]
    num_return_sequences: int
    stop_table: np.ndarray | None
    cache_dtype: DTypeLike | None
    arguments: Mapping[str, Any]
    stops_in_prompt: bool = True

    def finish_reason(self, row: RowRequest, tokens: np.ndarray) -> str:
        """Returns why a row with these new tokens ended: "eos", "stop" (string) or "length"."""
        if tokens[-1] in self.eos:
            return "eos"
        if self.stop_table is None:
            return "length"
        if len(tokens) < row.max_new_tokens:
            return "stop"
        ids = np.concatenate([row.ids, tokens[:-1]])[None]
        mask = np.arange(ids.shape[1]) >= (0 if self.stops_in_prompt else len(row.ids))
        state = stop_automaton.stop_state_after_prompt(self.stop_table, ids, mask[None])
        _, completed = stop_automaton.advance_stop_state(self.stop_table, state[0], tokens[-1])
        return "stop" if completed else "length"


def check_options(
    config: BTLMConfig,
    eos_token_id: prompts.EosIds,
    kwargs: Mapping[str, Any],
    other_names: Iterable[str],
) -> tuple[GenerationOptions, tuple[int, ...]]:
    """Returns the options and the ids that end a row; warns of options without effect.

    Args:
      config: the model's configuration.
      eos_token_id: as for `generate`.
      kwargs, other_names: as for `GenerationOptions.from_kwargs`.

    Raises:
      ValueError: an unknown name, a value out of range, or tokens outside the vocabulary.
    """
    options = GenerationOptions.from_kwargs(kwargs, other_names)
    for message in options.unused:
        logger.warning("%s", message)
    options.check_vocabulary(config.vocab_size)
    eos = prompts.resolve_eos_ids(eos_token_id, config)
    if any(len(ids) == 1 and ids[0] in eos for ids in options.bad_words_ids):
        logger.warning("bad_words_ids: a single EOS stays allowed; see suppress_tokens")
    return options, eos


def decode_spec(
    model: BTLM,
    options: GenerationOptions,
    eos: tuple[int, ...],
    processors: Processor | Sequence[Processor] | None,
    **steps: int,
) -> decode.DecodeSpec:
    """Returns the static arguments of decoding with given options.

    Args:
      model: the model.
      options: the generation options.
      eos: ids that end a row.
      processors: user processors.
      **steps: `score_steps` and `logit_steps` of `DecodeSpec`.
    """
    return decode.DecodeSpec(
        model,
        options.num_beams,
        len(eos) if options.num_beams > 1 else 0,
        options.rows_per_prompt,
        rule_sizes([options]),
        as_processors(processors),
        **steps,
    )


def make_request(
    model: BTLM,
    input_ids: Sequence[Any],
    names: Sequence[str] | None = None,
    /,
    **arguments: Any,
) -> GenerationRequest:
    """Checks prompts and arguments, and returns the request.

    Args:
      model: the model.
      input_ids: prompts, int [T] each, of any lengths, without padding.
      names: names of the prompts for messages.
      **arguments: those of `generate` except `_GENERATE_ONLY`, with the model's defaults.
        `pad_token_id` has no effect, because rows are not padded.

    Raises:
      ValueError: as `generate`; the message names the prompt.
    """
    call = resolve_arguments(model, arguments)
    for name in _GENERATE_ONLY:
        value = call.arguments.pop(name, None)
        if name == "attention_mask" and value is not None and np.asarray(value).all():
            continue  # no padding
        if value is not None and value is not False:
            raise ValueError(
                f"{name}: found it in a stream or batch, where every row has its own length; only "
                "generate accepts it: leave it out"
            )
    names = names or [f"prompt {i}" for i in range(len(input_ids))]
    # The defaults must not be applied a second time.
    model = dataclasses.replace(model, generation_config=None)
    with call.explain_errors():
        return _make_request(model, input_ids, names, call.arguments, **call.arguments)


def _make_request(
    model: BTLM,
    input_ids: Sequence[Any],
    names: Sequence[str],
    arguments: Mapping[str, Any],
    *,
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
    cache_dtype: DTypeLike | None = None,
    **kwargs: Any,
) -> GenerationRequest:
    c = model.config
    known_names = inspect.signature(_make_request).parameters
    options, eos = check_options(c, eos_token_id, kwargs, known_names)
    cache_dtype = optional_dtype(cache_dtype, "cache_dtype", CACHE_DTYPES)
    prompt_ids = []
    for name, ids in zip(names, input_ids, strict=True):
        with _name_in_errors(name):
            checked, _ = prompts.check_prompts(np.asarray(ids)[None], None, c.vocab_size, None)
            prompt_ids.append(checked[0])
    # The limits are checked for the longest prompt only, so that warnings appear once.
    longest = max(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    with _name_in_errors(names[longest]):
        limits = prompts.resolve_lengths(
            len(prompt_ids[longest]), max_new_tokens, max_length, min_new_tokens, min_length
        )
        prompts.check_context_length(limits, c, None)
    seeds, streams = prompts.row_seeds(seed, len(prompt_ids))
    max_is_total = max_new_tokens is None and max_length is not None
    min_is_total = min_new_tokens is None
    rows, per_row = [], take_rows(row_options([options], [eos]), 0)
    for ids, row_seed, stream in zip(prompt_ids, seeds.tolist(), streams.tolist(), strict=True):
        shorter_by = limits.prompt_length - len(ids)
        row_min = limits.min_length - (0 if min_is_total else shorter_by)
        row_max = limits.max_length - (0 if max_is_total else shorter_by)
        for copy in range(options.num_return_sequences):
            rows.append(RowRequest(ids, per_row, row_min, row_max, row_seed, stream, copy))
    spec = decode_spec(model, options, eos, logits_processor)
    if options.num_beams == 1:  # every continuation is a row with a prompt of its own
        spec = dataclasses.replace(spec, rows_per_prompt=1)
    stop_table = None
    if stop_strings is not None:
        stop_table = stop_automaton.build_stop_table(stop_strings, tokenizer, c.vocab_size)
    return GenerationRequest(
        spec, options, eos, rows, options.num_return_sequences, stop_table, cache_dtype, arguments
    )


@contextlib.contextmanager
def _name_in_errors(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None


def warn_if_stacked(params: Params) -> None:
    """Warns, once, if large stacked weights make decoding on a CPU slow."""
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    is_slow = size > _SMALL_BYTES and not is_unstacked(params)
    if is_slow and sharding.mesh_platform(sharding.mesh_of(params)) == "cpu":
        warn_once(
            f"{size / 1e9:.1f} GB of stacked weights decode several times slower on a CPU than "
            "unstacked ones, and are copied: load them with btlm.load(path, unstacked=True)"
        )


def initial_capacity(max_slots: int) -> int:
    """Returns the initial capacity of a cache for new tokens, given the maximum."""
    return max_slots if max_slots <= 2 * INITIAL_SLOTS else INITIAL_SLOTS


def start_rows(
    request: GenerationRequest,
    params: Params,
    rows: Sequence[RowRequest | None],
    prompt_slots: int,
    max_new_slots: int,
    capacity: int,
) -> tuple[KVCache, sample_loop.SampleState]:
    """Prefills prompts and starts their rows.

    Args:
      request: the request.
      params: the weights.
      rows: as many as the mesh divides; None is an inactive row that pads the batch.
      prompt_slots: slots of the prompts' cache, P.
      max_new_slots: slots for new tokens in the buffer of ids.
      capacity: initial slots of the cache of new tokens.

    Returns:
      The cache of the prompts, and the state that continues it.
    """
    active = [row for row in rows if row is not None]
    padded = [active[0] if row is None else row for row in rows]
    lengths = np.array([len(row.ids) for row in padded], np.int32)
    ids = np.zeros((len(rows), prompt_slots + max_new_slots), np.int32)
    for i, row in enumerate(padded):
        ids[i, : lengths[i]] = row.ids
    width = _prefill_width(int(lengths.max()), prompt_slots)
    spec = request.spec
    prompt = prefill(
        spec.model, params, ids[:, :width], None, lengths, prompt_slots, request.cache_dtype
    )
    stop_state = None
    if request.stop_table is not None:
        mask = (np.arange(width) < lengths[:, None]) & request.stops_in_prompt
        stop_state = stop_automaton.stop_state_after_prompt(
            request.stop_table, ids[:, :width], mask
        )

    def column(name: str, dtype: Any = np.int32) -> np.ndarray:
        return np.array([getattr(row, name) for row in padded], dtype)

    inputs = decode.RowInputs(
        prompt_length=lengths,
        num_valid=lengths,
        first_valid=np.zeros_like(lengths),
        min_length=column("min_length"),
        max_length=column("max_length"),
        seed=column("seed", np.uint32),
        stream=column("stream"),
        copy=column("copy"),
        active=np.array([row is not None for row in rows]),
        options=jax.tree.map(lambda *x: np.stack(x), *(row.options for row in padded)),
    )
    state = sample_loop.start_loop(
        spec, params, prompt, inputs, ids, request.stop_table, stop_state, capacity
    )
    return prompt.cache, state


def prefill_group(model: BTLM, length: int, prompt_slots: int) -> int:
    """Returns a key for a prompt's length; prompts with the same key can be prefilled together."""
    scaling = model.config.alibi_scaling
    is_dynamic = scaling is not None and scaling.train_seq_len is not None
    return length if is_dynamic else _prefill_width(length, prompt_slots)


def _prefill_width(length: int, prompt_slots: int) -> int:
    """Returns the static width for prefill: one of at most four, because each is a program."""
    step = max(prompts.bucket_length(1), prompt_slots // 4)
    return min(-(-length // step) * step, prompt_slots)
