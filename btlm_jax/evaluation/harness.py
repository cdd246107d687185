"""An adapter for EleutherAI's lm-evaluation-harness: a checkpoint as one of its language models.

Encoding, prefix token, truncation and stop texts are those of its Hugging Face backend. Requests go
through `likelihood` and `until`, and answers into a journal as they come, so that a run that was
killed can go on. Weights are loaded when the first request needs them: what the harness refuses, it
refuses before.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from btlm_jax.config import BTLMConfig
from btlm_jax.evaluation.batch_shapes import check_batch_size
from btlm_jax.evaluation.generate_until import Prompt, Rules, continuations, rules
from btlm_jax.evaluation.likelihood import Pair, likelihoods, rows
from btlm_jax.evaluation.tasks import Tasks, lm_eval
from btlm_jax.generation.jsonl import Journal
from btlm_jax.generation.prompts import end_tokens
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params
from btlm_jax.utils.format import finite_json
from btlm_jax.utils.progress import Progress

logger = logging.getLogger(__name__)

# New tokens where a task does not say, as in the harness.
_NEW_TOKENS = 256


def language_model(*args: Any, **named: Any) -> Any:
    """A `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate`; arguments and errors of `Requests`.

    The harness is imported here and not before, as it takes seconds.
    """
    base: Any = lm_eval("api.model").TemplateLM

    class LanguageModel(Requests, base):
        def __init__(self) -> None:
            base.__init__(self)
            Requests.__init__(self, *args, **named)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            for request in requests:
                if not request.args[1]:
                    raise ValueError(
                        f"task {request.task_name}: found an empty continuation after "
                        f"{request.args[0][-60:]!r}, expected one character at least: see its "
                        "doc_to_choice and doc_to_target"
                    )
            return super().loglikelihood(requests, disable_tqdm=True)

    return LanguageModel()


@dataclasses.dataclass(eq=False)
class Requests:
    """What answers requests: methods and properties that lm-eval's `TemplateLM` asks for.

    Attributes:
      config: of the model.
      encoder: its tokenizer.
      load: gives model and weights, on a device or a mesh; called once, if a request needs it.
      max_length: tokens that are read at once, and of a prompt with its continuation; default the
        trained context.
      batch_size: rows at a time; defaults as in `likelihoods` and `continuations`.
      seed: of requests that ask for sampling.
      journal: takes answers, and has those of a run before.

    Raises:
      ValueError: lengths or sizes out of range; a configuration without EOS.
    """

    config: BTLMConfig
    encoder: Tokenizer
    load: Callable[[], tuple[BTLM, Params]]
    max_length: int | None = None
    batch_size: int | None = None
    seed: int = 0
    journal: Journal = dataclasses.field(default_factory=Journal)

    def __post_init__(self) -> None:
        c, found = self.config, self.max_length
        if found is not None and (found < 2 or (found > c.n_positions and not c.alibi)):
            most = "" if c.alibi else f", at most the {c.n_positions} learned positions"
            raise ValueError(f"max_length: found {found}, expected at least 2 tokens{most}")
        if found is not None and found > c.n_positions and c.alibi_scaling is None:
            logger.warning(
                "max_length: %d tokens exceed the trained context of %d and alibi_scaling is not "
                "set: quality falls off beyond it", found, c.n_positions,
            )  # fmt: skip
        check_batch_size(self.batch_size, None)
        if not end_tokens("config", c):
            raise ValueError(
                "eos_token_id: found none in the configuration, expected one: texts start after it"
            )

    @property
    def _length(self) -> int:
        return self.config.n_positions if self.max_length is None else self.max_length

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return end_tokens("config", self.config)[0]

    @property
    def prefix_token_id(self) -> int:
        """What a text without context comes after: BOS, or EOS where there is none."""
        first, size = self.config.bos_token_id, self.config.vocab_size
        return self.eot_token_id if first is None or not 0 <= first < size else first

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; the tokenizer's own special tokens by default, but not before one of them."""
        if add_special_tokens is None:
            first = self._special(self.prefix_token_id)
            add_special_tokens = not (first and string.startswith(first))
        return self.encoder.encode(string, add_special_tokens=add_special_tokens).ids

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """The log-probability of whole texts, in windows; every token is predicted once."""
        utils = lm_eval("utils")
        windows: list[list[Pair]] = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            cut = utils.get_rolling_token_windows(ids, self.prefix_token_id, self._length, 1)
            windows.append([Pair(*map(tuple, utils.make_disjoint_window(w))) for w in cut])
        found = self._likelihoods([pair for each in windows for pair in each], "rolling")
        return [sum(found[pair][0] for pair in each) for each in windows]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Pair(tuple(before), tuple(after)) for _, before, after in requests]
        found = self._likelihoods(pairs, "loglikelihood")
        return [found[pair] for pair in pairs]

    def _likelihoods(self, pairs: Sequence[Pair], title: str) -> dict[Pair, tuple[float, bool]]:
        numbers = {pair: _number("loglikelihood", pair) for pair in pairs}
        known = self.journal.known
        asked = rows({p: p for p, n in numbers.items() if n not in known}, self._length)
        done = self._done(numbers.values())
        with Progress(len(numbers), "request", title, done=done) as progress:
            if asked:
                model, params = self._loaded
                for pair, found in likelihoods(model, params, asked, batch_size=self.batch_size):
                    self.journal.add(numbers[pair], found._asdict())
                    progress.update(1)
        answers = {pair: known[number] for pair, number in numbers.items()}
        return {pair: (x["logprob"], x["is_greedy"]) for pair, x in answers.items()}

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Continuations up to given texts or EOS, without them."""
        seen: collections.Counter[Prompt] = collections.Counter()
        prompts: dict[int, Prompt] = {}
        numbers = []
        for context, named in (request.args for request in requests):
            ids = self.tok_encode(context) or [self.prefix_token_id]
            prompt = Prompt(tuple(ids), self.rules(named))
            # The same asked again is the same, unless it is drawn.
            again = seen[prompt] if prompt.rules.options.get("do_sample") else 0
            seen[prompt] += 1
            numbers.append(_number("generate_until", prompt, again))
            prompts[numbers[-1]] = prompt
        known = self.journal.known
        asked = {n: prompt for n, prompt in prompts.items() if n not in known}
        with Progress(len(prompts), "text", "generate", done=self._done(prompts)) as progress:
            if asked:
                model, params = self._loaded
                sizes = dict(max_length=self._length, batch_size=self.batch_size, seed=self.seed)
                found = continuations(model, params, self.encoder, asked, **sizes)
                for number, text in found:
                    self.journal.add(number, {"text": text})
                    progress.update(1)
        return [known[number]["text"] for number in numbers]

    def rules(self, named: Mapping[str, Any]) -> Rules:
        """What a task's `generation_kwargs` mean.

        Raises:
          ValueError: as `until.rules`.
        """
        utils = lm_eval("models.utils")
        options: dict[str, Any] = dict(utils.normalize_gen_kwargs(dict(named), _NEW_TOKENS))
        until = utils.handle_stop_sequences(
            options.pop("until", None), self._special(self.eot_token_id)
        )
        return rules(until, options.pop("max_gen_toks"), options, self._length)

    def _done(self, numbers: Iterable[int]) -> int:
        return sum(number in self.journal.known for number in numbers)

    def _special(self, token: int) -> str:
        return self.encoder.decode([token], skip_special_tokens=False)

    @functools.cached_property
    def _loaded(self) -> tuple[BTLM, Params]:
        return self.load()


def evaluate(
    lm: Any, tasks: Tasks, *, num_fewshot: int | None = None, limit: int | float | None = None
) -> dict[str, Any]:
    """Runs tasks.

    Args:
      lm: from `language_model`.
      tasks: from `tasks.load`.
      num_fewshot: examples before each question; default each task's own number.
      limit: of documents of each task: so many, or below 1 this part of them.

    Returns:
      What `lm_eval.simple_evaluate` returns, without the documents.

    Raises:
      ValueError: options of generation that are not known; the message names the task.
    """
    for name, task in tasks.leaves.items():
        if task.OUTPUT_TYPE == "generate_until":
            try:
                lm.rules(task.config.generation_kwargs or {})
            except ValueError as e:
                raise ValueError(f"task {name}: {e}") from None
    # Its bootstrap would fork, which a process with JAX's threads must not.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    return lm_eval("evaluator").simple_evaluate(
        model=lm,
        tasks=list(tasks.asked),
        task_manager=tasks.manager,
        num_fewshot=num_fewshot,
        limit=limit,
        log_samples=False,
    )


def to_json(report: Mapping[str, Any]) -> bytes:
    """A report as a file; what JSON cannot hold (functions of tasks) as the harness shows it."""
    shown = lm_eval("utils").handle_non_serializable
    text = json.dumps(finite_json(report), indent=2, default=shown, allow_nan=False)
    return text.encode() + b"\n"


def table(results: Mapping[str, Any]) -> str:
    """What the harness prints."""
    make_table = lm_eval("utils").make_table
    groups = [make_table(results, "groups")] if results.get("groups") else []
    return "\n".join([make_table(results), *groups])


def _number(kind: str, *asked: Any) -> int:
    """Tells a request from others."""
    text = json.dumps([kind, *asked])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())
