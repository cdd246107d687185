"""Retrieval of an answer far back in a prompt, which `btlm eval retrieval` measures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from btlm_jax.data.tokenizer import encode_prompt
from btlm_jax.evaluation.context_extension import ScalingKind
from btlm_jax.evaluation.retrieval_texts import (
    MAX_ENTRIES,
    RetrievalRecord,
    RetrievalTask,
    RetrievalText,
)
from btlm_jax.generation.call_arguments import with_special_tokens_only
from btlm_jax.generation.continuous_batching import generate_batch
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params

# Maps prompts, as ids, to the texts that follow them.
ContinuePrompts = Callable[[Sequence[list[int]]], list[str]]


class RetrievalPrompt(NamedTuple):
    """A prompt of a given number of tokens, or slightly fewer."""

    text: RetrievalText
    ids: list[int]
    size: int  # number of lines or topics


class RetrievalOutcome(NamedTuple):
    """The answers to the prompts of one length, with one kind of scaling."""

    scaling: ScalingKind
    length: int
    prompts: list[RetrievalPrompt]
    answers: list[str]
    correct: list[bool]

    @property
    def accuracy(self) -> float:
        """The fraction of correct answers."""
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy."""
        return wilson_interval(sum(self.correct), len(self.correct))


def fit_prompt(
    record: RetrievalRecord, task: RetrievalTask, tokenizer: Tokenizer, length: int
) -> RetrievalPrompt:
    """Returns the record's largest prompt of at most `length` tokens.

    Raises:
      ValueError: the length cannot hold one line or topic, or holds all of them; or the tokenizer
        does not decode what it encodes.
    """

    def prompt_of(size: int) -> RetrievalPrompt:
        text = record.text(size)
        return RetrievalPrompt(text, encode_prompt(tokenizer, text.prompt), size)

    best = prompt_of(1)
    if tokenizer.decode(best.ids) != best.text.prompt:
        raise ValueError(
            f"tokenizer: found {tokenizer.decode(best.ids)[-60:]!r} after encoding and decoding "
            f"{best.text.prompt[-60:]!r}, expected equal texts: a vocabulary of all its characters "
            "(such as a byte-level one) is needed"
        )
    if len(best.ids) > length:
        raise ValueError(
            f"lengths: found {length} tokens, expected at least {len(best.ids)}, which one of the "
            f"{task} takes"
        )
    too_large = 2
    while too_large <= MAX_ENTRIES[task]:
        candidate = prompt_of(too_large)
        if len(candidate.ids) > length:
            break
        best, too_large = candidate, 2 * too_large
    too_large = min(too_large, MAX_ENTRIES[task] + 1)
    while too_large - best.size > 1:
        candidate = prompt_of((best.size + too_large) // 2)
        if len(candidate.ids) <= length:
            best = candidate
        else:
            too_large = candidate.size
    if best.size == MAX_ENTRIES[task]:
        raise ValueError(
            f"lengths: found {length} tokens, expected at most {len(best.ids)}, which all "
            f"{MAX_ENTRIES[task]} {task} take"
        )
    return best


def retrieval_prompts(
    task: RetrievalTask,
    tokenizer: Tokenizer,
    length: int,
    samples: int,
    *,
    seed: int = 0,
    lead: bool = True,
) -> list[RetrievalPrompt]:
    """Returns prompts of at most `length` tokens; equal arguments give equal prompts.

    Raises:
      ValueError: as in `fit_prompt`, or samples < 1.
    """
    if samples < 1:
        raise ValueError(f"samples: found {samples}, expected at least 1")
    records = (RetrievalRecord(task, seed, i, lead=lead) for i in range(samples))
    return [fit_prompt(record, task, tokenizer, length) for record in records]


def is_correct(task: RetrievalTask, text: RetrievalText, answer: str) -> bool:
    """Returns whether an answer is the expected one.

    For lines, a number in the answer counts: the first if the prompt leads to it; else the last, as
    LongEval scores, because an answer may repeat the question. For topics, the first topic of the
    conversation that the answer names counts; case and the characters between words do not matter.
    """
    if task == "lines":
        numbers = re.findall(r"[0-9]+", answer)
        return bool(numbers) and numbers[0 if text.lead else -1] == text.answer
    normalized = _normalize(answer)
    start = normalized.find(_normalize(text.answer))
    return start >= 0 and not any(
        0 <= normalized.find(_normalize(other)) < start for other in text.others
    )


def _normalize(text: str) -> str:
    """Returns the words in lower case, with spaces around each."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def greedy_continuation(
    model: BTLM, params: Params, tokenizer: Tokenizer, *, new_tokens: int, batch_size: int
) -> ContinuePrompts:
    """Returns a function that continues prompts greedily, in continuously filled batches.

    Of the checkpoint's generation_config.json, only its special tokens are used.
    """
    model = with_special_tokens_only(model)

    def continue_prompts(ids: Sequence[list[int]]) -> list[str]:
        results = generate_batch(
            model, params, ids, batch_size=batch_size, max_new_tokens=new_tokens
        )
        return [tokenizer.decode(result.tokens.tolist()) for result in results]

    return continue_prompts


def evaluate_retrieval(
    task: RetrievalTask,
    scaling: ScalingKind,
    length: int,
    prompts: list[RetrievalPrompt],
    continue_prompts: ContinuePrompts,
) -> RetrievalOutcome:
    """Asks a model and scores its answers.

    Args:
      task: the task.
      scaling, length: recorded in the outcome.
      prompts: as returned by `retrieval_prompts`.
      continue_prompts: for example `greedy_continuation(...)`.
    """
    answers = continue_prompts([p.ids for p in prompts])
    correct = [is_correct(task, p.text, a) for p, a in zip(prompts, answers, strict=True)]
    return RetrievalOutcome(scaling, length, prompts, answers, correct)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Returns the 95 % interval of a proportion (Wilson, 1927, J. Am. Stat. Assoc. 22, 209-212)."""
    z, p = 1.959963984540054, successes / trials
    center = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + (z / (2 * trials)) ** 2)
    # Rounding would leave the ends slightly outside of [0, 1].
    low, high = ((center + s) / (1 + z * z / trials) for s in (-spread, spread))
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)
