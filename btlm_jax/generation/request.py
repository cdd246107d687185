"""Requests: checked prompts and how to continue them.

A `GenerationRequest` holds what all rows share, a `RowRequest` is one continuation of one prompt.
`row_batch` runs them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from btlm_jax.config import BTLMConfig
from btlm_jax.generation import decode, prompts, stop_automaton
from btlm_jax.generation.call_arguments import resolve_arguments
from btlm_jax.generation.options import GenerationOptions
from btlm_jax.generation.processors import Processor, as_processors
from btlm_jax.generation.row_options import RowOptions, row_options, rule_sizes, take_rows
from btlm_jax.model import sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import CACHE_DTYPES
from btlm_jax.model.params import Params, is_unstacked
from btlm_jax.utils.dtypes import optional_dtype
from btlm_jax.utils.notices import warn_once

logger = logging.getLogger(__name__)

# Weights smaller than this decode fast enough when stacked.
_SMALL_BYTES = 256 << 20
# Arguments that only `generate` accepts.
_GENERATE_ONLY = (
    "attention_mask", "cache_length", "prompt_cache", "return_dict_in_generate", "output_scores",
    "output_logits",
)  # fmt: skip


class Prompt(NamedTuple):
    """A checked prompt."""

    ids: np.ndarray  # int32 [T]
    mask: np.ndarray  # int32 [T], 0 for padding
    name: str | None  # for messages


# (EOS ids, pad token) -> checked prompts
_CheckPrompts = Callable[[tuple[int, ...], int | None], list[Prompt]]


class RowRequest(NamedTuple):
    """One continuation of one prompt. Lengths include the prompt and its padding."""

    ids: np.ndarray  # int32 [T]
    mask: np.ndarray  # int32 [T], 0 for padding
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
      spec: the static arguments.
      options: the generation options.
      eos: ids that end a row.
      rows: one row for each prompt, of which `spec.rows_per_prompt` are made.
      stop_table: `build_stop_table`, or None.
      fill_token: fills a row after its end.
      cache_dtype: dtype of the KV cache.
      stops_in_prompt: whether a stop string may begin in the prompt, as in transformers.
    """

    spec: decode.DecodeSpec
    options: GenerationOptions
    eos: tuple[int, ...]
    rows: list[RowRequest]
    stop_table: np.ndarray | None
    fill_token: int
    cache_dtype: DTypeLike | None
    stops_in_prompt: bool = True

    @property
    def num_results(self) -> int:
        """Number of continuations of all prompts."""
        return len(self.rows) * self.options.num_return_sequences

    def separate_copies(self) -> GenerationRequest:
        """Returns a request with a row for every continuation of a prompt, which can run apart.

        A beam search stays one row.
        """
        if self.spec.num_beams > 1:
            return self
        copies = range(self.spec.rows_per_prompt)
        rows = [row._replace(copy=copy) for row in self.rows for copy in copies]
        return dataclasses.replace(
            self, rows=rows, spec=dataclasses.replace(self.spec, rows_per_prompt=1)
        )

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


def _check_options(
    config: BTLMConfig,
    eos_token_id: prompts.EosIds,
    kwargs: Mapping[str, Any],
) -> tuple[GenerationOptions, tuple[int, ...]]:
    """Returns the options and the ids that end a row; warns of options without effect.

    Args:
      config: the model's configuration.
      eos_token_id: as for `generate`.
      kwargs: the arguments that are options.

    Raises:
      ValueError: an unknown name, a value out of range, or tokens outside the vocabulary.
    """
    options = GenerationOptions.from_kwargs(kwargs, inspect.signature(_make_request).parameters)
    for message in options.unused:
        logger.warning("%s", message)
    options.check_vocabulary(config.vocab_size)
    eos = prompts.resolve_eos_ids(eos_token_id, config)
    if any(len(ids) == 1 and ids[0] in eos for ids in options.bad_words_ids):
        logger.warning("bad_words_ids: a single EOS stays allowed; see suppress_tokens")
    return options, eos


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

    def check_prompts(eos: tuple[int, ...], pad: int | None) -> list[Prompt]:
        checked = []
        for name, ids in zip(names, input_ids, strict=True):
            with _name_in_errors(name):
                (row,), (mask,) = prompts.check_prompts(
                    np.asarray(ids)[None], None, model.config.vocab_size, None
                )
                checked.append(Prompt(row, mask, name))
        return checked

    with call.explain_errors():
        return _make_request(model, check_prompts, **call.arguments)


def make_padded_request(
    model: BTLM, input_ids: Any, attention_mask: Any, **arguments: Any
) -> GenerationRequest:
    """Checks a batch of prompts that are padded on the left, and returns the request.

    Args:
      model: the model.
      input_ids, attention_mask: as for `generate`.
      **arguments: those of `_make_request`.

    Raises:
      ValueError: as `generate`.
    """

    def check_prompts(eos: tuple[int, ...], pad: int | None) -> list[Prompt]:
        ids, mask = prompts.check_prompts(
            input_ids, attention_mask, model.config.vocab_size, None if pad in eos else pad
        )
        return [Prompt(x, m, None) for x, m in zip(ids, mask, strict=True)]

    return _make_request(model, check_prompts, **arguments)


def _make_request(
    model: BTLM,
    check_prompts: _CheckPrompts,
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
    cache_length: int | None = None,
    cache_dtype: DTypeLike | None = None,
    output_scores: bool = False,
    output_logits: bool = False,
    **kwargs: Any,
) -> GenerationRequest:
    c = model.config
    options, eos = _check_options(c, eos_token_id, kwargs)
    cache_dtype = optional_dtype(cache_dtype, "cache_dtype", CACHE_DTYPES)
    pad = c.pad_token_id if pad_token_id is None else pad_token_id
    checked = check_prompts(eos, pad)
    # The limits are checked for the longest prompt only, so that warnings appear once.
    longest = max(checked, key=lambda prompt: len(prompt.ids))
    with _name_in_errors(longest.name):
        limits = prompts.resolve_lengths(
            len(longest.ids), max_new_tokens, max_length, min_new_tokens, min_length
        )
        prompts.check_context_length(limits, c, cache_length)
    seeds, streams = prompts.row_seeds(seed, len(checked))
    max_is_total = max_new_tokens is None and max_length is not None
    min_is_total = min_new_tokens is None
    rows, of_row = [], take_rows(row_options([options], [eos]), 0)
    for (ids, mask, _), row_seed, stream in zip(
        checked, seeds.tolist(), streams.tolist(), strict=True
    ):
        shorter_by = limits.prompt_length - len(ids)
        row_min = limits.min_length - (0 if min_is_total else shorter_by)
        row_max = limits.max_length - (0 if max_is_total else shorter_by)
        rows.append(RowRequest(ids, mask, of_row, row_min, row_max, row_seed, stream, 0))
    steps = prompts.bucket_length(limits.max_new_tokens)
    spec = decode.DecodeSpec(
        # Its defaults have been applied, and must not select a program.
        dataclasses.replace(model, generation_config=None),
        options.num_beams,
        len(eos) if options.num_beams > 1 else 0,
        options.rows_per_prompt,
        rule_sizes([options]),
        as_processors(logits_processor),
        score_steps=steps * output_scores,
        logit_steps=steps * output_logits,
    )
    stop_table = None
    if stop_strings is not None:
        stop_table = stop_automaton.build_stop_table(stop_strings, tokenizer, c.vocab_size)
    fill = _fill_token(pad, eos, options.num_beams > 1)
    return GenerationRequest(spec, options, eos, rows, stop_table, fill, cache_dtype)


def _fill_token(pad: int | None, eos: tuple[int, ...], has_beams: bool) -> int:
    """Returns the token that fills a row after its end."""
    if has_beams and eos:  # as transformers' `pad or eos[0]`, which ignores a pad token of 0
        return pad or eos[0]
    return pad if pad is not None else eos[0] if eos else 0


@contextlib.contextmanager
def _name_in_errors(name: str | None) -> Iterator[None]:
    try:
        yield
    except ValueError as e:
        if name is None:
            raise
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
