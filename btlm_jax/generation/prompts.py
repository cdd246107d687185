"""Prompts, lengths, EOS ids and seeds, checked on the host, and the static shapes for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from btlm_jax.config import BTLMConfig
from btlm_jax.model.positions import check_length

logger = logging.getLogger(__name__)

EosIds = int | Sequence[int] | Literal["config"] | None
Seeds = int | Sequence[int] | Sequence[tuple[int, int]]
_SMALLEST_BUCKET = 32


def bucket_length(length: int) -> int:
    """Returns the static shape for a length: 32, 40, 48, 56, 64, 80, ..., 8192, ...

    There are four sizes per octave, so at most 25 % is padding. Programs are compiled per bucket.
    """
    step = max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length()) // 8
    return max(_SMALLEST_BUCKET, -(-length // step) * step)


def as_id_array(input_ids: Any) -> np.ndarray:
    """Returns token ids as an array; other shapes and dtypes are not checked.

    Raises:
      ValueError: text, a dict, or rows of different lengths.
    """
    if isinstance(input_ids, Mapping) or hasattr(input_ids, "keys"):
        raise ValueError(
            f"input_ids: found {type(input_ids).__name__} with {list(input_ids.keys())}, expected "
            'ids: pass input_ids=x["input_ids"], attention_mask=x["attention_mask"]'
        )
    try:
        ids = np.asarray(input_ids)
    except ValueError:
        raise ValueError(
            "input_ids: found prompts of different lengths, expected [B, T]: pad them on the left, "
            "with an attention_mask, or use generate_batch"
        ) from None
    if ids.dtype.kind in "US":
        raise ValueError(
            "input_ids: found text, expected ids: encode it with the tokenizer of the model "
            "(btlm.load_tokenizer), or use btlm.pipeline"
        )
    return ids


def check_prompts(
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None,
    vocab_size: int,
    pad_token_id: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns checked prompts and their mask, int32 [B, T] each.

    Args:
      input_ids: int [B, T].
      attention_mask: [B, T], nonzero for valid tokens.
      vocab_size: upper bound of the ids, exclusive.
      pad_token_id: without an attention mask, occurrences of this id count as padding, as in
        transformers; None means no padding.

    Raises:
      ValueError: an empty prompt, tokens outside the vocabulary, padding on the right, or shapes
        that do not agree.
    """
    ids = as_id_array(input_ids)
    if ids.ndim != 2 or ids.shape[1] == 0 or ids.shape[0] == 0:
        raise ValueError(f"input_ids: found shape {ids.shape}, expected [B, T] with T >= 1 (no "
                         "empty prompt; a lone EOS token can stand for one)")  # fmt: skip
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"input_ids: found dtype {ids.dtype}, expected integers")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"input_ids: found ids from {ids.min()} to {ids.max()}, expected 0 to "
            f"{vocab_size - 1}; was the prompt encoded with this model's tokenizer?"
        )
    mask = ids != (-1 if pad_token_id is None else pad_token_id)
    if attention_mask is not None:
        mask = np.asarray(attention_mask) != 0
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask: found shape {mask.shape}, expected {ids.shape}")
    if not mask.any(1).all():
        raise ValueError("attention_mask: a row is all padding: give every prompt a token")
    if not mask[:, -1].all():
        raise ValueError(
            "attention_mask: the last token of a row is padding; pad prompts on the left"
        )
    return ids.astype(np.int32), mask.astype(np.int32)


def resolve_eos_ids(eos_token_id: EosIds, config: BTLMConfig) -> tuple[int, ...]:
    """Returns the ids that end a row; "config" means the configuration's.

    Raises:
      ValueError: ids outside the vocabulary. If they come from the configuration, they are ignored
        with a warning instead.
    """
    from_config = isinstance(eos_token_id, str)
    if from_config and eos_token_id != "config":
        raise ValueError(f"eos_token_id: found {eos_token_id!r}, expected ids, None or 'config'")
    value = config.eos_token_ids if from_config else eos_token_id
    array = np.atleast_1d([] if value is None else np.asarray(value))
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"eos_token_id: found {value!r}, expected token ids")
    ids = tuple(int(t) for t in array)
    unknown = [t for t in ids if not 0 <= t < config.vocab_size]
    if unknown and not from_config:
        raise ValueError(
            f"eos_token_id: found {unknown}, expected ids from 0 to {config.vocab_size - 1}"
        )
    if unknown:
        ids = tuple(t for t in ids if t not in unknown)
        logger.warning(
            "the configuration's eos_token_id %s is outside its vocabulary of %d: %s",
            unknown[0],
            config.vocab_size,
            "it will not end a row" if ids else "no row will end early; pass eos_token_id",
        )
    return tuple(dict.fromkeys(ids))


class LengthLimits(NamedTuple):
    """Lengths in slots; all include the padded prompt."""

    prompt_length: int
    min_length: int  # no EOS before this length
    max_length: int

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of new tokens."""
        return self.max_length - self.prompt_length


def resolve_lengths(
    prompt_length: int,
    max_new_tokens: int | None,
    max_length: int | None,
    min_new_tokens: int | None,
    min_length: int | None,
) -> LengthLimits:
    """Returns the lengths that the arguments of `generate` define.

    Args:
      prompt_length: slots of the padded prompt.
      max_new_tokens, max_length, min_new_tokens, min_length: as for `generate`.

    Raises:
      ValueError: a length out of range, or no room for a new token.
    """
    arguments = dict(
        max_new_tokens=(max_new_tokens, 1),
        max_length=(max_length, 1),
        min_new_tokens=(min_new_tokens, 0),
        min_length=(min_length, 0),
    )
    for name, (value, lowest) in arguments.items():
        if value is not None and value < lowest:
            raise ValueError(f"{name}: found {value}, expected >= {lowest}")
    for new, total in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if arguments[new][0] is not None and arguments[total][0] is not None:
            logger.warning("both %s and %s are given: %s is used", new, total, new)
    if max_new_tokens is None and max_length is None:
        max_new_tokens = 20
    end = prompt_length + max_new_tokens if max_new_tokens is not None else max_length
    assert end is not None
    if end <= prompt_length:
        raise ValueError(
            f"max_length: found {end}, expected more than the {prompt_length} tokens of the "
            "(padded) prompt, which it includes: raise it, or give max_new_tokens"
        )
    start = prompt_length + min_new_tokens if min_new_tokens is not None else min_length or 0
    if start > end:
        logger.warning(
            "at least %d new tokens are requested, but at most %d are allowed: rows end there",
            start - prompt_length,
            end - prompt_length,
        )
    return LengthLimits(prompt_length, min(start, end), end)


def check_context_length(
    limits: LengthLimits, config: BTLMConfig, cache_length: int | None
) -> None:
    """Raises ValueError, or warns, if the tokens exceed the cache or the model's context."""
    prompt, new, total = limits.prompt_length, limits.max_new_tokens, limits.max_length
    if cache_length is not None and total > cache_length:
        raise ValueError(
            f"a prompt of {prompt} tokens and {new} new ones need {total} cache slots, found "
            f"cache_length={cache_length}: raise it, or shorten the prompt"
        )
    sequence = f"a prompt of {prompt} tokens and {new} new ones"
    check_length(config, total, sequence, "shorten the prompt or max_new_tokens")


def row_seeds(seed: Seeds, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the seed and the stream of every row, uint32 [rows] and int32 [rows].

    Args:
      seed: one seed, of which each row uses its own stream; or one per row; or a (seed, stream)
        pair per row.
      rows: number of rows.

    Raises:
      ValueError: a wrong number of seeds, a seed outside 0 to 2**32 - 1, or a stream outside 0 to
        2**31 - 1.
    """
    values = np.asarray(seed)
    is_pairs = values.ndim == 2 and values.shape[1] == 2
    limit = np.array([2**32, 2**31]) if is_pairs else 2**32
    valid = np.issubdtype(values.dtype, np.integer) and (values.ndim < 2 or is_pairs)
    if not valid or ((values < 0) | (values >= limit)).any():
        raise ValueError(
            f"seed: found {seed!r}, expected integers from 0 to 2**32 - 1 (or pairs of one and a "
            "stream)"
        )
    if values.ndim and len(values) != rows:
        raise ValueError(f"seed: found {len(values)} seeds, expected one for all or {rows}")
    streams = values[:, 1] if is_pairs else np.zeros(rows) if values.ndim else np.arange(rows)
    seeds = values[:, 0] if is_pairs else np.broadcast_to(values, rows)
    return seeds.astype(np.uint32), streams.astype(np.int32)
