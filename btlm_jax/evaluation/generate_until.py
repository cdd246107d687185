"""Continuations up to given texts: what lm-evaluation-harness calls `generate_until`.

The rules are those of its Hugging Face backend for one request at a time: a prompt is cut off on
the left so that the new tokens fit, generation ends with the token that completes one of the texts
(counted from the first new token) or with EOS, and the answer ends before the first of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from btlm_jax.generation import batch, options
from btlm_jax.generation.request import Request, request
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params

# Of `generate`'s options, those of several rows for a prompt.
_SEVERAL = ("num_beams", "num_return_sequences")


class Rules(NamedTuple):
    """How prompts are continued."""

    until: tuple[str, ...]  # texts that end a continuation and are no part of it
    max_new_tokens: int
    named: str = "{}"  # other options of `generate`, as JSON, so that rules can be compared

    @property
    def options(self) -> dict[str, Any]:
        """Of `generate`."""
        return json.loads(self.named)


class Prompt(NamedTuple):
    """What is asked."""

    ids: tuple[int, ...]  # one token at least
    rules: Rules


def rules(
    until: Sequence[str], max_new_tokens: int, named: Mapping[str, Any], max_length: int
) -> Rules:
    """Checked rules.

    Args:
      until: empty texts are left out.
      named: options of `generate`; `temperature` 0 without sampling is that of greedy decoding.
      max_length: tokens of prompt and continuation together.

    Raises:
      ValueError: options that `generate` does not know or that concern beams, or no room.
    """
    if not 1 <= max_new_tokens < max_length:
        raise ValueError(
            f"max_gen_toks: found {max_new_tokens}, expected from 1 to {max_length - 1}, so that a "
            f"prompt fits into max_length = {max_length}"
        )
    named = dict(named)
    if not named.get("do_sample") and not named.get("temperature"):
        named.pop("temperature", None)
    if found := [name for name in _SEVERAL if named.get(name, 1) != 1]:
        raise ValueError(
            f"generation_kwargs: found {found[0]} = {named[found[0]]!r}, expected greedy decoding "
            "or sampling (do_sample, temperature, top_k, top_p ...): leave it out"
        )
    try:
        options.from_names(named, ())
        text = json.dumps(named, sort_keys=True)
    except (ValueError, TypeError) as e:
        raise ValueError(f"generation_kwargs: {e}") from None
    return Rules(tuple(text for text in until if text), max_new_tokens, text)


def continuations(
    model: BTLM,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Mapping[Any, Prompt],
    *,
    max_length: int,
    batch_size: int | None = None,
    seed: int = 0,
) -> Iterator[tuple[Any, str]]:
    """Answers, each with its key, as they come.

    Args:
      prompts: by keys whose text says which random numbers a sampled one gets: it draws the same
        alone and among any others.
      max_length: tokens of prompt and continuation together.
      batch_size: rows at a time, over all devices; default 8.

    Raises:
      ValueError: the size of the batch, or ids outside the vocabulary.
    """
    groups: dict[Rules, list[Any]] = {}
    for key, prompt in prompts.items():
        groups.setdefault(prompt.rules, []).append(key)
    for how, keys in groups.items():
        room = max_length - how.max_new_tokens
        ids = [prompts[key].ids[-room:] for key in keys]
        asked = _request(model, tokenizer, ids, how, [(seed, _stream(key)) for key in keys])
        for i, result in batch.results(asked, params, 8 if batch_size is None else batch_size):
            yield keys[i], _text(tokenizer, result.tokens.tolist(), how.until)


def _request(model: BTLM, tokenizer: Tokenizer, ids, how: Rules, seeds) -> Request:
    named = how.options
    if how.until:
        named |= {"stop_strings": how.until, "tokenizer": tokenizer}
    asked = request(model, ids, max_new_tokens=how.max_new_tokens, seed=seeds, **named)
    return dataclasses.replace(asked, stops_in_prompt=False)


def _stream(key: Any) -> int:
    return int.from_bytes(hashlib.blake2b(str(key).encode(), digest_size=4).digest()) >> 1


def _text(tokenizer: Tokenizer, tokens: Sequence[int], until: Sequence[str]) -> str:
    """The text before the first of `until`, special tokens left out."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True)
    for end in until:
        text = text.split(end)[0]
    return text
