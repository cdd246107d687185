"""Finding an answer far back in a prompt: what `btlm eval retrieval` measures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from btlm_jax.evaluation.context_extension import Kind
from btlm_jax.evaluation.retrieval_texts import MOST, Record, Task, Text
from btlm_jax.generation.batch import generate_batch
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params
from btlm_jax.utils import plots

# From prompts, as ids, to the texts that follow.
Continue = Callable[[Sequence[list[int]]], list[str]]


class Prompt(NamedTuple):
    """A text of a given number of tokens, or the next fewer."""

    text: Text
    ids: list[int]
    size: int  # lines or topics


class Outcome(NamedTuple):
    """Of the prompts of one length, under one kind of scaling."""

    scaling: Kind
    length: int
    prompts: list[Prompt]
    answers: list[str]
    right: list[bool]

    @property
    def accuracy(self) -> float:
        """The fraction of right answers."""
        return sum(self.right) / len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the accuracy, at 95 %."""
        return wilson(sum(self.right), len(self.right))


def prompt(record: Record, task: Task, tokenizer: Tokenizer, length: int) -> Prompt:
    """The record's largest prompt of at most `length` tokens.

    Raises:
      ValueError: the length does not hold one line or topic, or holds all there are; or the
        tokenizer does not give back what it reads.
    """

    def made(size: int) -> Prompt:
        text = record.text(size)
        return Prompt(text, tokenizer.encode(text.prompt).ids, size)

    best = made(1)
    if tokenizer.decode(best.ids) != best.text.prompt:
        raise ValueError(
            f"tokenizer: found {tokenizer.decode(best.ids)[-60:]!r} of the prompt's end "
            f"{best.text.prompt[-60:]!r}, expected the same: a vocabulary of all its characters "
            "(such as a byte-level one) is needed"
        )
    if len(best.ids) > length:
        raise ValueError(
            f"lengths: found {length} tokens, expected at least {len(best.ids)}, which one of the "
            f"{task} takes"
        )
    above = 2
    while above <= MOST[task] and len((found := made(above)).ids) <= length:
        best, above = found, 2 * above
    above = min(above, MOST[task] + 1)
    while above - best.size > 1:
        found = made((best.size + above) // 2)
        if len(found.ids) <= length:
            best = found
        else:
            above = found.size
    if best.size == MOST[task]:
        raise ValueError(
            f"lengths: found {length} tokens, expected at most {len(best.ids)}, which all "
            f"{MOST[task]} {task} take"
        )
    return best


def prompts(
    task: Task, tokenizer: Tokenizer, length: int, samples: int, *, seed: int = 0, lead: bool = True
) -> list[Prompt]:
    """Prompts of at most `length` tokens, the same for the same arguments.

    Raises:
      ValueError: as `prompt`, or samples < 1.
    """
    if samples < 1:
        raise ValueError(f"samples: found {samples}, expected at least 1")
    records = (Record(task, seed, i, lead=lead) for i in range(samples))
    return [prompt(record, task, tokenizer, length) for record in records]


def is_right(task: Task, text: Text, answer: str) -> bool:
    """Whether an answer is the expected one.

    Of a line, if a number in it is: the first where the prompt leads to it; else the last, as
    LongEval scores, for an answer may repeat the question. Of topics, if the first topic of the
    conversation that it names is; letters of either case, and whatever is between words.
    """
    if task == "lines":
        found = re.findall(r"[0-9]+", answer)
        return bool(found) and found[0 if text.lead else -1] == text.answer
    said = _normal(answer)
    at = said.find(_normal(text.answer))
    return at >= 0 and not any(0 <= said.find(_normal(other)) < at for other in text.others)


def _normal(text: str) -> str:
    """Words, with spaces around each."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def continuation(
    model: BTLM, params: Params, tokenizer: Tokenizer, *, new: int, batch_size: int
) -> Continue:
    """Greedy continuations of `new` tokens, as text, in batches that refill."""

    def continued(ids: Sequence[list[int]]) -> list[str]:
        found = generate_batch(model, params, ids, batch_size=batch_size, max_new_tokens=new)
        return [tokenizer.decode(result.tokens.tolist()) for result in found]

    return continued


def evaluate(
    task: Task, scaling: Kind, length: int, asked: list[Prompt], continued: Continue
) -> Outcome:
    """What a model makes of prompts.

    Args:
      scaling, length: to be told.
      asked: as from `prompts`.
      continued: such as `continuation`.
    """
    answers = continued([p.ids for p in asked])
    right = [is_right(task, p.text, a) for p, a in zip(asked, answers, strict=True)]
    return Outcome(scaling, length, asked, answers, right)


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson, 1927, J. Am. Stat. Assoc. 22, 209-212)."""
    z, p = 1.959963984540054, right / of
    center, spread = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + (z / (2 * of)) ** 2)
    # At the ends rounding would leave them a little beyond.
    low, high = ((center + s) / (1 + z * z / of) for s in (-spread, spread))
    return (0.0 if right == 0 else low), (1.0 if right == of else high)


def line(task: Task, outcome: Outcome) -> str:
    """What is printed of an outcome."""
    sizes = sorted({p.size for p in outcome.prompts})
    tokens = max(len(p.ids) for p in outcome.prompts)
    many = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"
    low, high = outcome.interval
    return (
        f"{outcome.scaling:<8} {outcome.length:>7,} tokens ({many} {task}, up to {tokens:,}): "
        f"{sum(outcome.right)} of {len(outcome.right)} right, {outcome.accuracy:.0%} "
        f"({low:.0%} to {high:.0%})"
    )


def to_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Outcomes as objects for a file, every answer included."""
    return [
        {
            "scaling": x.scaling, "length": x.length, "samples": len(x.right),
            "right": sum(x.right), "accuracy": x.accuracy, "interval": list(x.interval),
            "answers": [
                {"tokens": len(p.ids), "size": p.size, "expected": p.text.answer, "found": a,
                 "right": right}
                for p, a, right in zip(x.prompts, x.answers, x.right, strict=True)
            ],
        }
        for x in outcomes
    ]  # fmt: skip


def draw(path: Path, outcomes: Sequence[Outcome], trained: int, title: str) -> None:
    """Draws accuracy against length, with Wilson intervals."""
    made, panels = plots.new_figure()
    axes = panels[0, 0]
    kinds = list(dict.fromkeys(x.scaling for x in outcomes))
    for i, kind in enumerate(kinds):
        own = sorted((x for x in outcomes if x.scaling == kind), key=lambda x: x.length)
        # Apart by 2 %, or equal ones would cover each other.
        at = [x.length * 1.02 ** (i - (len(kinds) - 1) / 2) for x in own]
        low, high = zip(*(x.interval for x in own), strict=True)
        mean = [x.accuracy for x in own]
        spread = [[m - a for m, a in zip(mean, low, strict=True)],
                  [b - m for m, b in zip(mean, high, strict=True)]]  # fmt: skip
        axes.errorbar(at, mean, spread, marker="o", capsize=3, label=f"scaling: {kind}")
    axes.axvline(trained, color="gray", linestyle=":", linewidth=1.2, label="trained length")
    axes.set(
        xlabel="tokens of the prompt",
        ylabel="accuracy (95 % intervals)",
        title=title,
        ylim=(-0.03, 1.03),
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    plots.save_png(path, made)
