"""Prompts and lengths, checked on the host, and the static shapes they are filled up to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from btlm_jax.config import BTLMConfig

logger = logging.getLogger(__name__)

EndTokens = int | Sequence[int] | Literal["config"] | None
Seeds = int | Sequence[int] | Sequence[tuple[int, int]]
_SMALLEST = 32


def bucket_length(length: int) -> int:
    """The static shape for a length: the next of four sizes per octave, from 32. At most 25 % more.

    Programs are compiled per bucket: 32, 40, 48, 56, 64, 80, ..., 8192.
    """
    step = max(_SMALLEST, 1 << (length - 1).bit_length()) // 8
    return max(_SMALLEST, -(-length // step) * step)


def check_prompts(
    input_ids: ArrayLike, attention_mask: ArrayLike | None, vocab_size: int, pad: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Checked prompts and their mask, int32 [B, T] each.

    Args:
      pad: masks its occurrences where no mask is given, as transformers does; None masks nothing.

    Raises:
      ValueError: an empty prompt, tokens outside the vocabulary, right padding, or shapes that do
        not agree.
    """
    ids = np.asarray(input_ids)
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
    mask = ids != (-1 if pad is None else pad)
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


def resolve_eos_ids(eos_token_id: EndTokens, config: BTLMConfig) -> tuple[int, ...]:
    """The ids that end a row.

    Raises:
      ValueError: ids outside the vocabulary (of a configuration, they are left out with a warning).
    """
    from_config = isinstance(eos_token_id, str)
    if from_config and eos_token_id != "config":
        raise ValueError(f"eos_token_id: found {eos_token_id!r}, expected ids, None or 'config'")
    given = config.eos_token_id if from_config else eos_token_id
    ids = () if given is None else tuple(int(t) for t in np.atleast_1d(given))
    unknown = [t for t in ids if not 0 <= t < config.vocab_size]
    if unknown and not from_config:
        raise ValueError(
            f"eos_token_id: found {unknown}, expected ids from 0 to {config.vocab_size - 1}"
        )
    if unknown:
        logger.warning(
            "the configuration's eos_token_id %s is outside its vocabulary of %d: no row will end "
            "early; pass eos_token_id",
            unknown[0],
            config.vocab_size,
        )
        return ()
    return tuple(dict.fromkeys(ids))


class LengthLimits(NamedTuple):
    """In slots, padded prompt included."""

    prompt: int
    least: int  # no EOS before
    most: int


def resolve_lengths(
    prompt: int,
    max_new_tokens: int | None,
    max_length: int | None,
    min_new_tokens: int | None,
    min_length: int | None,
) -> LengthLimits:
    """The lengths that the arguments of `generate` mean, for a padded prompt of `prompt` slots.

    Raises:
      ValueError: no room for a new token.
    """
    named = dict(
        max_new_tokens=(max_new_tokens, 1),
        max_length=(max_length, 1),
        min_new_tokens=(min_new_tokens, 0),
        min_length=(min_length, 0),
    )
    for name, (value, least) in named.items():
        if value is not None and value < least:
            raise ValueError(f"{name}: found {value}, expected >= {least}")
    for new, all_ in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if named[new][0] is not None and named[all_][0] is not None:
            logger.warning("both %s and %s are given: %s holds", new, all_, new)
    if max_new_tokens is None and max_length is None:
        max_new_tokens = 20
    most = prompt + max_new_tokens if max_new_tokens is not None else max_length
    assert most is not None
    if most <= prompt:
        raise ValueError(
            f"max_length: found {most}, expected more than the {prompt} tokens of the (padded) "
            "prompt, which it includes: raise it, or give max_new_tokens"
        )
    least = prompt + min_new_tokens if min_new_tokens is not None else min_length or 0
    if least > most:
        logger.warning(
            "at least %d new tokens are wanted, and at most %d allowed: rows end there",
            least - prompt,
            most - prompt,
        )
    return LengthLimits(prompt, least, most)


def check_context_length(
    lengths: LengthLimits, config: BTLMConfig, cache_length: int | None
) -> None:
    """Raises ValueError, or warns, where there are more tokens than a cache or the model holds."""
    prompt, new, total = lengths.prompt, lengths.most - lengths.prompt, lengths.most
    if cache_length is not None and total > cache_length:
        raise ValueError(
            f"a prompt of {prompt} tokens and {new} new ones need {total} cache slots, found "
            f"cache_length={cache_length}: raise it, or shorten the prompt"
        )
    if total <= config.n_positions:
        return
    if not config.alibi:
        raise ValueError(
            f"a prompt of {prompt} tokens and {new} new ones exceed the {config.n_positions} "
            "learned positions: shorten the prompt or max_new_tokens"
        )
    if config.alibi_scaling is None:
        logger.warning(
            "%d tokens exceed the trained context of %d and alibi_scaling is not set: quality "
            "falls off beyond it",
            total,
            config.n_positions,
        )


def row_seeds(seed: Seeds, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Seed and stream of every row, uint32 and int32 [rows]: of one seed, a stream for each row.

    Raises:
      ValueError: another number of seeds, one outside 0 to 2**32 - 1, or a stream from 2**31 on.
    """
    given = np.asarray(seed)
    pairs = given.ndim == 2 and given.shape[1] == 2
    most = np.array([2**32, 2**31]) if pairs else 2**32
    whole = np.issubdtype(given.dtype, np.integer) and (given.ndim < 2 or pairs)
    if not whole or ((given < 0) | (given >= most)).any():
        raise ValueError(
            f"seed: found {seed!r}, expected integers from 0 to 2**32 - 1 (or pairs of one and a "
            "stream)"
        )
    if given.ndim and len(given) != rows:
        raise ValueError(f"seed: found {len(given)} seeds, expected one for all or {rows}")
    streams = given[:, 1] if pairs else np.zeros(rows) if given.ndim else np.arange(rows)
    own = given[:, 0] if pairs else np.broadcast_to(given, rows)
    return own.astype(np.uint32), streams.astype(np.int32)
