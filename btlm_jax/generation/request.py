"""What is asked of rows that run on their own, each at its own length: in streams and batches.

A `GenerationRequest` is what all of them share; a `RowRequest` is one of them. `start_rows` reads
prompts, and starts their rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from btlm_jax.config import BTLMConfig
from btlm_jax.generation import decode, options, prompts, sample_loop, stop_automaton
from btlm_jax.generation.prefill import prefill
from btlm_jax.generation.processors import Processor, as_processors
from btlm_jax.model import sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.params import Params, is_unstacked

logger = logging.getLogger(__name__)

# Slots for new tokens at first, where many more may be needed: a step reads all there are.
_FIRST = 256
# Bytes of weights below which how they lie does not matter.
_SMALL = 256 << 20
# What only `generate` takes.
_OTHERS = (
    "attention_mask", "cache_length", "prompt_cache", "return_dict_in_generate", "output_scores",
    "output_logits",
)  # fmt: skip


class RowRequest(NamedTuple):
    """One continuation of one prompt."""

    ids: np.ndarray  # int32 [T]
    least: int  # in slots, prompt included: no EOS before
    most: int  # the end
    seed: int
    stream: int
    copy: int  # of several continuations of the same prompt

    @property
    def new(self) -> int:
        """How many tokens are added at most."""
        return self.most - len(self.ids)


@dataclasses.dataclass(frozen=True, eq=False)
class GenerationRequest:
    """How rows are continued.

    Attributes:
      program: what is compiled; one row for each prompt.
      rows: `num_return_sequences` neighbours for each prompt.
      copies: `num_return_sequences`.
      table: `stop_automaton.build_stop_table`, or None.
      cache_dtype: of the KV cache.
      arguments: as they were given, for `generate`.
      stops_in_prompt: whether a stop string may begin in the prompt, as with transformers; not of
        beams, where it always may.
    """

    program: decode.DecodeSpec
    rows: list[RowRequest]
    copies: int
    table: np.ndarray | None
    cache_dtype: DTypeLike | None
    arguments: Mapping[str, Any]
    stops_in_prompt: bool = True

    def reason(self, row: RowRequest, tokens: np.ndarray) -> str:
        """Why a row ended: "eos", "stop" (a stop string) or "length"."""
        if tokens[-1] in self.program.eos:
            return "eos"
        if self.table is None or len(tokens) < row.new:
            return "length" if self.table is None else "stop"
        both = np.concatenate([row.ids, tokens[:-1]])[None]
        read = np.arange(both.shape[1]) >= (0 if self.stops_in_prompt else len(row.ids))
        before = stop_automaton.stop_state_after_prompt(self.table, both, read[None])
        return (
            "stop"
            if stop_automaton.advance_stop_state(self.table, before[0], tokens[-1])[1]
            else "length"
        )


def check_options(
    config: BTLMConfig,
    eos_token_id: prompts.EndTokens,
    named: Mapping[str, Any],
    also: Iterable[str],
) -> tuple[options.GenerationOptions, tuple[int, ...]]:
    """The options and the ids that end a row; warns of what does nothing.

    Args:
      named, also: as for `options.GenerationOptions.from_kwargs`.

    Raises:
      ValueError: an unknown name, a value out of range, or tokens outside the vocabulary.
    """
    how = options.GenerationOptions.from_kwargs(named, also)
    for idle in how.unused:
        logger.warning("%s", idle)
    how.check_vocabulary(config.vocab_size)
    eos = prompts.resolve_eos_ids(eos_token_id, config)
    if any(len(ids) == 1 and ids[0] in eos for ids in how.bad_words_ids):
        logger.warning("bad_words_ids: an EOS alone stays allowed; see suppress_tokens")
    return how, eos


def make_request(
    model: BTLM,
    input_ids: Sequence[Any],
    names: Sequence[str] | None = None,
    /,
    **arguments: Any,
) -> GenerationRequest:
    """Checks what is asked.

    Args:
      input_ids: prompts, int [T] each, of any lengths; nothing is padding.
      names: of the prompts, for messages.
      **arguments: those of `generate`, without `_OTHERS`. `pad_token_id` has no effect: nothing is
        filled up.

    Raises:
      ValueError: as `generate`; the message names the prompt.
    """
    for name in _OTHERS:
        if name in arguments:
            raise ValueError(f"{name}: found it in a stream or batch of rows that run on their "
                             "own, expected it of generate only: leave it out")  # fmt: skip
    names = names or [f"prompt {i}" for i in range(len(input_ids))]
    return _request(model, input_ids, names, arguments, **arguments)


def _request(
    model: BTLM,
    input_ids: Sequence[Any],
    names: Sequence[str],
    arguments: Mapping[str, Any],
    *,
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
    cache_dtype: DTypeLike | None = None,
    **named: Any,
) -> GenerationRequest:
    c = model.config
    how, eos = check_options(c, eos_token_id, named, inspect.signature(_request).parameters)
    arrays = []
    for name, ids in zip(names, input_ids, strict=True):
        with _naming(name):
            arrays.append(
                prompts.check_prompts(np.asarray(ids)[None], None, c.vocab_size, None)[0][0]
            )
    # What the longest may, the others may too; so they are warned of once.
    longest = max(range(len(arrays)), key=lambda i: len(arrays[i]))
    with _naming(names[longest]):
        limits = prompts.resolve_lengths(
            len(arrays[longest]), max_new_tokens, max_length, min_new_tokens, min_length
        )
        prompts.check_context_length(limits, c, None)
    seeds, streams = prompts.row_seeds(seed, len(arrays))
    alone = dataclasses.replace(how, num_return_sequences=1)
    program = decode.DecodeSpec(model, alone, eos, as_processors(logits_processor))
    table = None
    if stop_strings is not None:
        table = stop_automaton.build_stop_table(stop_strings, tokenizer, c.vocab_size)
    by_total = max_new_tokens is None and max_length is not None
    rows = []
    for ids, own, stream in zip(arrays, seeds.tolist(), streams.tolist(), strict=True):
        longer = limits.prompt - len(ids)
        least = limits.least - (longer if min_new_tokens is not None else 0)
        most = limits.most - (0 if by_total else longer)
        each = (
            RowRequest(ids, least, most, own, stream, n) for n in range(how.num_return_sequences)
        )
        rows.extend(each)
    return GenerationRequest(program, rows, how.num_return_sequences, table, cache_dtype, arguments)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None


def warn_if_stacked(params: Params) -> None:
    """Warns, once, where decoding is much slower than it need be."""
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    stacked = not is_unstacked(params)
    if stacked and size > _SMALL and sharding.mesh_platform(sharding.mesh_of(params)) == "cpu":
        _warn_once(
            f"{size / 1e9:.1f} GB of stacked weights decode several times slower on a CPU than "
            "weights by layer, and are copied: load them with btlm.load(path, unstacked=True)"
        )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def initial_capacity(room: int) -> int:
    """With how many slots a cache that may need `room` for new tokens begins."""
    return room if room <= 2 * _FIRST else _FIRST


def start_rows(
    asked: GenerationRequest,
    params: Params,
    rows: Sequence[RowRequest | None],
    prompt_slots: int,
    room: int,
    new_slots: int,
) -> tuple[KVCache, sample_loop.SampleState]:
    """Reads prompts and starts their rows.

    Args:
      rows: as many as divide over the mesh; None fills up, and is done.
      prompt_slots: of the prompts' cache, P.
      room: for new tokens, in the buffer of ids.
      new_slots: of the cache of new tokens, at first.

    Returns:
      The cache of the prompts, and the state, which continues it.
    """
    real = [row for row in rows if row is not None]
    filled = [real[0] if row is None else row for row in rows]
    lengths = np.array([len(row.ids) for row in filled], np.int32)
    ids = np.zeros((len(rows), prompt_slots + room), np.int32)
    for i, row in enumerate(filled):
        ids[i, : lengths[i]] = row.ids
    width = _width(int(lengths.max()), prompt_slots)
    program = asked.program
    read = prefill(
        program.model, params, ids[:, :width], None, lengths, prompt_slots, asked.cache_dtype
    )
    stop_state = None
    if asked.table is not None:
        mask = (np.arange(width) < lengths[:, None]) & asked.stops_in_prompt
        stop_state = stop_automaton.stop_state_after_prompt(asked.table, ids[:, :width], mask)

    def each(name: str, dtype: Any = np.int32) -> np.ndarray:
        return np.array([getattr(row, name) for row in filled], dtype)

    state_of_row = decode.RowInputs(
        lengths,
        lengths,
        np.zeros_like(lengths),
        each("least"),
        each("most"),
        each("seed", np.uint32),
        each("stream"),
        each("copy"),
        np.array([row is not None for row in rows]),
    )
    state = sample_loop.start_loop(
        program, params, read, state_of_row, ids, asked.table, stop_state, new_slots
    )
    return read.cache, state


def prefill_group(model: BTLM, length: int, prompt_slots: int) -> int:
    """Prompts for which this is equal can be read at once."""
    scaling = model.config.alibi_scaling
    dynamic = scaling is not None and scaling.train_seq_len is not None
    return length if dynamic else _width(length, prompt_slots)


def _width(length: int, prompt_slots: int) -> int:
    """With how many slots a prompt is read: one of at most four, each another program."""
    step = max(prompts.bucket_length(1), prompt_slots // 4)
    return min(-(-length // step) * step, prompt_slots)
