"""An adapter for EleutherAI's lm-evaluation-harness: a checkpoint as one of its language models.

Encoding, prefix token, truncation and stop texts are those of its Hugging Face backend. Requests go
through `likelihood` and `generate_until`, and every answer goes into a journal at once, so that a
killed run can be resumed. Weights are loaded when the first request needs them: the harness refuses
bad tasks before.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
from tokenizers import Tokenizer

from btlm_jax.config import BTLMConfig
from btlm_jax.data.tokenizer import encode_prompt
from btlm_jax.evaluation.batch_shapes import check_batch_size
from btlm_jax.evaluation.generate_until import (
    UntilPrompt,
    UntilRules,
    generate_continuations,
    until_rules,
)
from btlm_jax.evaluation.likelihood import ContinuationPair, group_by_inputs, score_rows
from btlm_jax.evaluation.tasks import HarnessTasks, describe_error, import_lm_eval
from btlm_jax.generation.prompts import resolve_eos_ids
from btlm_jax.generation.result_journal import ResultJournal
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params
from btlm_jax.model.positions import check_length
from btlm_jax.utils.format import finite_json
from btlm_jax.utils.progress import Progress

logger = logging.getLogger(__name__)

# New tokens where a task does not say, as in the harness.
_DEFAULT_NEW_TOKENS = 256
# The results of lm-eval that do not depend on the machine.
_REPORTED = (
    "results", "groups", "group_subtasks", "n-shot", "n-samples", "higher_is_better", "versions",
    "configs",
)  # fmt: skip


def make_language_model(*args: Any, **named: Any) -> Any:
    """Returns an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate`.

    Imports the harness, which takes seconds. Arguments and errors are those of `RequestAnswerer`.
    """
    base: Any = import_lm_eval("api.model").TemplateLM

    class LanguageModel(RequestAnswerer, base):
        def __init__(self) -> None:
            base.__init__(self)
            RequestAnswerer.__init__(self, *args, **named)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            pairs = [self._encode_request(request) for request in requests]
            return self._loglikelihood_tokens(pairs)

        def _encode_request(self, request: Any) -> tuple[Any, list[int], list[int]]:
            """Returns a pair as lm-eval encodes it, and refuses one that it would fail on."""
            context, continuation = request.args
            found = _request_problem(request)
            if not continuation:
                raise ValueError(
                    f"{found}: the continuation is empty, expected at least one character: see its "
                    "doc_to_choice and doc_to_target"
                )
            if context:
                ids, continuation_ids = self._encode_pair(context, continuation)
            else:  # as lm-eval: a continuation that begins with the prefix has no second one
                ids = [self.prefix_token_id]
                continuation_ids = self.tok_encode(continuation, add_special_tokens=False)
                if continuation_ids[:1] == ids:
                    continuation_ids = continuation_ids[1:]
            if not ids:
                raise ValueError(
                    f"{found}: the context holds only spaces, which belong to the continuation: "
                    "see its doc_to_text"
                )
            if not continuation_ids:
                raise ValueError(
                    f"{found}: no token is left of the continuation, because the tokenizer merges "
                    "it with the end of the context: end the context where a word ends, or begin "
                    "the continuation with a space (target_delimiter, doc_to_choice)"
                )
            if len(continuation_ids) > self._length:
                raise ValueError(
                    f"{found}: the continuation has {len(continuation_ids)} tokens, expected at "
                    f"most the {self._length} that are read at once: raise --max-length, or use "
                    "output_type: loglikelihood_rolling"
                )
            return (context, continuation), ids, continuation_ids

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = True
        ) -> list[float]:
            for request in requests:
                if not request.args[0]:
                    raise ValueError(
                        f"task {request.task_name}: document {request.doc_id} has an empty text: "
                        "see its doc_to_target, or leave such documents out"
                    )
            return RequestAnswerer.loglikelihood_rolling(self, requests)

    return LanguageModel()


@dataclasses.dataclass(eq=False)
class RequestAnswerer:
    """Answers requests: the methods and properties that lm-eval's `TemplateLM` requires.

    Attributes:
      config: configuration of the model.
      encoder: its tokenizer.
      load: returns model and weights, on a device or a mesh; called once, if a request needs it.
      max_length: maximum tokens per forward pass, and of a prompt with its continuation; default
        the trained context.
      batch_size: rows per batch; defaults as in `score_rows` and `generate_continuations`.
      seed: seed of requests that ask for sampling.
      journal: takes answers, and holds those of an interrupted run.
      prefix: the token before a text without context, if training recorded it.

    Raises:
      ValueError: lengths or sizes out of range; a configuration without EOS.
    """

    config: BTLMConfig
    encoder: Tokenizer
    load: Callable[[], tuple[BTLM, Params]]
    max_length: int | None = None
    batch_size: int | None = None
    seed: int = 0
    journal: ResultJournal = dataclasses.field(default_factory=ResultJournal)
    prefix: int | None = None

    def __post_init__(self) -> None:
        c, length = self.config, self.max_length
        if length is not None and length < 2:
            raise ValueError(f"max_length: found {length}, expected at least 2 tokens")
        if length is not None:
            check_length(c, length, "max_length", "choose a smaller one")
        check_batch_size(self.batch_size, None)
        if not resolve_eos_ids("config", c):
            raise ValueError(
                "eos_token_id: found none in the configuration, expected one: texts start after it"
            )

    @property
    def _length(self) -> int:
        return self.config.n_positions if self.max_length is None else self.max_length

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return resolve_eos_ids("config", self.config)[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: that of training, else BOS, else EOS."""
        if self.prefix is not None:
            return self.prefix
        bos, size = self.config.bos_token_id, self.config.vocab_size
        return self.eot_token_id if bos is None or not 0 <= bos < size else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns token ids.

        By default the tokenizer adds its special tokens before the text (`encode_prompt`), unless
        the text starts with the prefix.
        """
        if add_special_tokens is None:
            prefix = self._token_text(self.prefix_token_id)
            if string and not (prefix and string.startswith(prefix)):
                return encode_prompt(self.encoder, string)
            add_special_tokens = False
        return self.encoder.encode(string, add_special_tokens=add_special_tokens).ids

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """Returns the log-probability of full texts, in windows that predict each token once."""
        utils = import_lm_eval("utils")
        texts: list[list[ContinuationPair]] = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, self._length, 1)
            disjoint = map(utils.make_disjoint_window, windows)
            texts.append([ContinuationPair(*map(tuple, window)) for window in disjoint])
        scores = self._score_pairs([pair for pairs in texts for pair in pairs], "rolling")
        return [sum(scores[pair][0] for pair in pairs) for pairs in texts]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [
            ContinuationPair(tuple(context), tuple(continuation))
            for _, context, continuation in requests
        ]
        scores = self._score_pairs(pairs, "loglikelihood")
        return [scores[pair] for pair in pairs]

    def _score_pairs(
        self, pairs: Sequence[ContinuationPair], title: str
    ) -> dict[ContinuationPair, tuple[float, bool]]:
        numbers = {pair: _request_number("loglikelihood", pair) for pair in pairs}
        known = self.journal.results
        unanswered = {pair: pair for pair, number in numbers.items() if number not in known}
        rows = group_by_inputs(unanswered, self._length)
        done = self._count_answered(numbers.values())
        with Progress(len(numbers), "request", title, done=done) as progress:
            if rows:
                model, params = self._model_and_params
                for pair, score in score_rows(model, params, rows, batch_size=self.batch_size):
                    _check_number(score.logprob)
                    self.journal.add(numbers[pair], score._asdict())
                    progress.update(1)
        answers = {pair: known[number] for pair, number in numbers.items()}
        return {pair: (x["logprob"], x["is_greedy"]) for pair, x in answers.items()}

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Returns continuations that end before given texts or EOS."""
        seen: collections.Counter[UntilPrompt] = collections.Counter()
        prompts: dict[int, UntilPrompt] = {}
        numbers = []
        for context, generation_kwargs in (request.args for request in requests):
            ids = self.tok_encode(context) or [self.prefix_token_id]
            prompt = UntilPrompt(tuple(ids), self.parse_rules(generation_kwargs))
            # Equal requests have equal answers, unless these are sampled.
            repetition = seen[prompt] if prompt.rules.options.get("do_sample") else 0
            seen[prompt] += 1
            numbers.append(_request_number("generate_until", prompt, repetition))
            prompts[numbers[-1]] = prompt
        known = self.journal.results
        unanswered = {n: prompt for n, prompt in prompts.items() if n not in known}
        done = self._count_answered(prompts)
        with Progress(len(prompts), "text", "generate", done=done) as progress:
            if unanswered:
                model, params = self._model_and_params
                answers = generate_continuations(
                    model,
                    params,
                    self.encoder,
                    unanswered,
                    max_length=self._length,
                    batch_size=self.batch_size,
                    seed=self.seed,
                )
                for number, text in answers:
                    self.journal.add(number, {"text": text})
                    progress.update(1)
        return [known[number]["text"] for number in numbers]

    def parse_rules(self, generation_kwargs: Mapping[str, Any]) -> UntilRules:
        """Returns the rules that a task's `generation_kwargs` stand for.

        Raises:
          ValueError: as in `until_rules`.
        """
        utils = import_lm_eval("models.utils")
        options: dict[str, Any] = dict(
            utils.normalize_gen_kwargs(dict(generation_kwargs), _DEFAULT_NEW_TOKENS)
        )
        until = utils.handle_stop_sequences(
            options.pop("until", None), self._token_text(self.eot_token_id)
        )
        return until_rules(until, options.pop("max_gen_toks"), options, self._length)

    def _count_answered(self, numbers: Iterable[int]) -> int:
        return sum(number in self.journal.results for number in numbers)

    def _token_text(self, token: int) -> str:
        return self.encoder.decode([token], skip_special_tokens=False)

    @functools.cached_property
    def _model_and_params(self) -> tuple[BTLM, Params]:
        return self.load()


def run_tasks(
    lm: Any,
    tasks: HarnessTasks,
    *,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
) -> dict[str, Any]:
    """Runs tasks.

    Args:
      lm: from `make_language_model`.
      tasks: from `load_tasks`.
      num_fewshot: examples before each question; default each task's own number.
      limit: number of documents of each task, or below 1 the fraction of them.

    Returns:
      The results of `lm_eval.simple_evaluate`, without the documents.

    Raises:
      ValueError: unknown options of generation, a request that cannot be answered, or an error of
        lm-eval; the message names the task.
      FloatingPointError: a log-likelihood is not finite.
    """
    for name, task in tasks.leaves.items():
        if task.OUTPUT_TYPE == "generate_until":
            try:
                lm.parse_rules(task.config.generation_kwargs or {})
            except ValueError as e:
                raise ValueError(f"task {name}: {e}") from None
    # Its bootstrap would fork, which a process with JAX's threads must not.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    evaluator = import_lm_eval("evaluator")
    # It would run git in the current directory, whose complaints users would read as ours.
    with mock.patch.object(evaluator, "get_git_commit_hash", lambda: None):
        try:
            return evaluator.simple_evaluate(
                model=lm,
                tasks=list(tasks.requested),
                task_manager=tasks.manager,
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=False,
            )
        except (FloatingPointError, MemoryError, OSError, ValueError):
            raise
        except Exception as e:  # of lm-eval, Jinja or a function of a task file
            if isinstance(e, jax.errors.JaxRuntimeError):
                raise
            raise ValueError(
                f"lm-eval failed on the tasks {', '.join(tasks.leaves)} ({describe_error(e)}): "
                "check the metrics, filters and functions of their files"
            ) from e


def encode_report(header: Mapping[str, Any], results: Mapping[str, Any]) -> bytes:
    """Returns a report as the bytes of a JSON file.

    Values that JSON cannot hold (functions of tasks) are written as the harness writes them.

    Args:
      header: the facts about the run.
      results: from `run_tasks`; those that depend on the machine are left out.
    """
    report = dict(header) | {name: results[name] for name in _REPORTED if name in results}
    default = import_lm_eval("utils").handle_non_serializable
    text = json.dumps(finite_json(report), indent=2, default=default, allow_nan=False)
    return text.encode() + b"\n"


def format_results(results: Mapping[str, Any]) -> str:
    """Returns the tables that the harness prints."""
    make_table = import_lm_eval("utils").make_table
    groups = [make_table(results, "groups")] if results.get("groups") else []
    return "\n".join([make_table(results), *groups])


def _request_problem(request: Any) -> str:
    """Returns the beginning of a message about a request."""
    context, continuation = (
        text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}" for text in request.args[:2]
    )
    where = f"task {request.task_name}: document {request.doc_id}"
    return f"{where}: found the context {context!r} with the continuation {continuation!r}"


def _check_number(logprob: float) -> None:
    if not math.isfinite(logprob):
        raise FloatingPointError(
            f"log-likelihood: found {logprob}, expected a finite number: check that the weights "
            "are finite, and try --dtype float32 in case the computation overflows"
        )


def _request_number(kind: str, *request: Any) -> int:
    """Returns a number that identifies a request in the journal."""
    text = json.dumps([kind, *request])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest())
