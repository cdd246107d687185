"""Continuations up to given texts: `generate_until` of lm-evaluation-harness.

The rules are those of its Hugging Face backend for one request at a time. A prompt is truncated on
the left so that the new tokens fit. Generation ends with the token that completes one of the texts
(counted from the first new token) or with EOS. The answer ends before the first of the texts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from btlm_jax.generation import continuous_batching, options
from btlm_jax.generation.call_arguments import with_special_tokens_only
from btlm_jax.generation.request import GenerationRequest, make_request
from btlm_jax.generation.transformers_arguments import known_arguments
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params

# Options of `generate` that ask for several rows per prompt.
_MULTIPLE_ROWS = ("num_beams", "num_return_sequences")
_DEFAULT_BATCH_SIZE = 8


class UntilRules(NamedTuple):
    """How prompts are continued."""

    until: tuple[str, ...]  # texts that end a continuation and are not part of it
    max_new_tokens: int
    options_json: str = "{}"  # other options of `generate`, as JSON, so that rules are hashable

    @property
    def options(self) -> dict[str, Any]:
        """Options of `generate`."""
        return json.loads(self.options_json)


class UntilPrompt(NamedTuple):
    """A prompt and the rules of its continuation."""

    ids: tuple[int, ...]  # at least one token
    rules: UntilRules


def until_rules(
    until: Sequence[str],
    max_new_tokens: int,
    generate_options: Mapping[str, Any],
    max_length: int,
) -> UntilRules:
    """Returns checked rules.

    Args:
      until: texts that end a continuation; empty ones are left out.
      max_new_tokens: maximum number of new tokens.
      generate_options: options of `generate`; `temperature` 0 without sampling means greedy.
      max_length: maximum tokens of prompt and continuation together.

    Raises:
      ValueError: options that are unknown to `generate` or concern beams, or no room for a prompt.
    """
    if not 1 <= max_new_tokens < max_length:
        raise ValueError(
            f"max_gen_toks: found {max_new_tokens}, expected from 1 to {max_length - 1}, so that a "
            f"prompt fits into max_length = {max_length}"
        )
    named = dict(generate_options)
    if not named.get("do_sample") and not named.get("temperature"):
        named.pop("temperature", None)
    if refused := [name for name in _MULTIPLE_ROWS if named.get(name, 1) != 1]:
        raise ValueError(
            f"generation_kwargs: found {refused[0]} = {named[refused[0]]!r}, expected greedy "
            "decoding or sampling (do_sample, temperature, top_k, top_p ...): leave it out"
        )
    try:
        named = known_arguments(named, alibi=False)  # no position_ids
        options.GenerationOptions.from_kwargs(named)
        options_json = json.dumps(named, sort_keys=True)
    except (ValueError, TypeError) as e:
        raise ValueError(f"generation_kwargs: {e}") from None
    return UntilRules(tuple(text for text in until if text), max_new_tokens, options_json)


def generate_continuations(
    model: BTLM,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Mapping[Any, UntilPrompt],
    *,
    max_length: int,
    batch_size: int | None = None,
    seed: int = 0,
) -> Iterator[tuple[Any, str]]:
    """Yields (key, answer) as answers are finished.

    Args:
      model, params, tokenizer: the model, its weights and its tokenizer.
      prompts: prompts by key. The key's text selects the random numbers of a sampled answer, which
        therefore does not depend on the other prompts.
      max_length: maximum tokens of prompt and continuation together.
      batch_size: rows per batch, over all devices; default 8.
      seed: seed of the random numbers.

    Raises:
      ValueError: a bad batch size, or ids outside the vocabulary.
    """
    model = with_special_tokens_only(model)  # a task names its own options
    groups: dict[UntilRules, list[Any]] = {}
    for key, prompt in prompts.items():
        groups.setdefault(prompt.rules, []).append(key)
    for rules, keys in groups.items():
        max_prompt = max_length - rules.max_new_tokens
        ids = [prompts[key].ids[-max_prompt:] for key in keys]
        seeds = [(seed, _random_stream(key)) for key in keys]
        batch_request = _request(model, tokenizer, ids, rules, seeds)
        rows = _DEFAULT_BATCH_SIZE if batch_size is None else batch_size
        for i, result in continuous_batching.iterate_results(batch_request, params, rows):
            yield keys[i], _answer_text(tokenizer, result.tokens.tolist(), rules.until)


def _request(
    model: BTLM,
    tokenizer: Tokenizer,
    ids: Sequence[Sequence[int]],
    rules: UntilRules,
    seeds: Sequence[tuple[int, int]],
) -> GenerationRequest:
    named = rules.options
    if rules.until:
        named |= {"stop_strings": rules.until, "tokenizer": tokenizer}
    checked = make_request(model, ids, max_new_tokens=rules.max_new_tokens, seed=seeds, **named)
    return dataclasses.replace(checked, stops_in_prompt=False)


def _random_stream(key: Any) -> int:
    return int.from_bytes(hashlib.blake2b(str(key).encode(), digest_size=4).digest()) >> 1


def _answer_text(tokenizer: Tokenizer, tokens: Sequence[int], until: Sequence[str]) -> str:
    """Returns the text before the first of `until`, without special tokens."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True)
    for end in until:
        text = text.split(end)[0]
    return text
