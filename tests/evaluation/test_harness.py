"""Requests of lm-evaluation-harness, answered without it."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors

from btlm_jax.evaluation import harness
from btlm_jax.evaluation.tasks import HarnessTasks
from btlm_jax.generation import result_journal
from support import gpt2


def make_answerer(of_bytes, journal):
    model, params, tokenizer = of_bytes
    return harness.RequestAnswerer(
        model.config, tokenizer, lambda: (model, params), journal=journal
    )


def test_an_interrupted_run_resumes_with_the_remaining_requests(of_bytes, tmp_path):
    """Equal requests are answered once."""
    requests = [(None, [1, 2, 3, i], [i, 7]) for i in range(6)]
    requests.append(requests[0])
    expected = make_answerer(of_bytes, result_journal.ResultJournal())._loglikelihood_tokens(
        requests
    )
    assert expected[0] == expected[-1]

    def check_answers(answers):  # up to the shapes of batches
        np.testing.assert_allclose(answers, expected, atol=1e-4)

    target = tmp_path / "out.json"

    class Killed(result_journal.ResultJournal):
        def add(self, number, fields):
            if len(self.results) == 4:
                raise KeyboardInterrupt
            super().add(number, fields)

    with (
        pytest.raises(KeyboardInterrupt),
        result_journal.open_journal(target, {}, overwrite=False) as journal,
    ):
        killed = Killed(journal.results, journal._file)
        make_answerer(of_bytes, killed)._loglikelihood_tokens(requests)
    with result_journal.open_journal(target, {}, overwrite=False) as journal:
        added = []
        again = make_answerer(of_bytes, journal)
        add = journal.add
        object.__setattr__(journal, "add", lambda *x: (added.append(x), add(*x)))
        assert len(journal.results) == 4
        check_answers(again._loglikelihood_tokens(requests))
        assert len(added) == 2
        # All answers are known now, so nothing is loaded.
        unused = dataclasses.replace(again, load=lambda: pytest.fail("loaded"))
        check_answers(unused._loglikelihood_tokens(requests))
        result_journal.finish_journal(target, b"done\n")
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_the_eos_that_a_tokenizer_adds_is_not_between_context_and_continuation(of_bytes):
    model, params, tokenizer = of_bytes
    special = [("<|endoftext|>", 256)]
    both = Tokenizer.from_str(tokenizer.to_str())
    both.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=special
    )
    answerer = harness.RequestAnswerer(model.config, both, lambda: (model, params))
    assert answerer.tok_encode("ab") == [256, *tokenizer.encode("ab").ids]
    assert answerer.tok_encode("") == []
    assert answerer.tok_encode("ab", add_special_tokens=False) == tokenizer.encode("ab").ids


def test_texts_start_after_bos_or_eos(of_bytes):
    model, _, tokenizer = of_bytes
    answerer = make_answerer(of_bytes, result_journal.ResultJournal())
    assert answerer.prefix_token_id == answerer.eot_token_id == 256
    assert answerer.tok_encode("a<|endoftext|>") == [*tokenizer.encode("a").ids, 256]
    for value, prefix in (
        (None, 256),
        (258, 256),
        (7, 7),
    ):  # a BOS outside the vocabulary is ignored
        config = dataclasses.replace(model.config, bos_token_id=value)
        assert dataclasses.replace(answerer, config=config).prefix_token_id == prefix


def make_request(context, continuation):
    """A request of the task "m" about document 4."""
    return types.SimpleNamespace(args=(context, continuation), task_name="m", doc_id=4)


def make_bpe(*merges: str) -> Tokenizer:
    """A tokenizer of the letters a and b, spaces and EOS, with merges such as "ab"."""
    vocab = {token: i for i, token in enumerate(["E", "a", "b", " ", *merges])}
    tokenizer = Tokenizer(models.BPE(vocab, [(x[:-1], x[-1]) for x in merges]))
    tokenizer.add_special_tokens(["E"])
    return tokenizer


def make_lm(of_bytes, tokenizer, **options):
    model, _, _ = of_bytes
    config = dataclasses.replace(model.config, bos_token_id=0, eos_token_id=0)
    return harness.make_language_model(config, tokenizer, lambda: pytest.fail("loaded"), **options)


def test_pairs_are_encoded_as_lm_eval_encodes_them(lm_eval, of_bytes, monkeypatch):
    """Where a token spans context and continuation, and after trailing spaces."""
    from lm_eval.api.model import TemplateLM

    lm, encoded = make_lm(of_bytes, make_bpe("ab", "ba", "aba")), []
    monkeypatch.setattr(lm, "_loglikelihood_tokens", lambda x, **_: encoded.append(x))
    texts = ["a", "ab", "b a", " b", "abab", "Eab"]
    pairs = [("", x) for x in texts] + [(x + s, y) for x in texts for y in texts for s in ("", " ")]
    # Where no token is left of the continuation, lm-eval fails later.
    scored = [x for x in pairs if not x[0] or TemplateLM._encode_pair(lm, *x)[1]]
    assert 50 < len(scored) < len(pairs)
    requests = [make_request(*pair) for pair in scored]
    lm.loglikelihood(requests)
    TemplateLM.loglikelihood(lm, requests, disable_tqdm=True)
    assert encoded[0] == encoded[1]


@pytest.mark.parametrize(
    "pair, expected",
    [
        (("a", "b"), "found the context 'a' with the continuation 'b': no token is left"),
        (("", "E"), "no token is left"),
        (("a", ""), "the continuation is empty"),
        (("  ", "a"), "the context holds only spaces"),
        (("a", " " * 9), "the continuation has 9 tokens, expected at most the 8 .*--max-length"),
    ],
)
def test_a_request_that_cannot_be_scored_is_named(lm_eval, of_bytes, pair, expected):
    lm = make_lm(of_bytes, make_bpe("ab"), max_length=8)
    with pytest.raises(ValueError, match=f"task m: document 4: .*{expected}"):
        lm.loglikelihood([make_request("a", "a"), make_request(*pair)])


def test_errors_of_lm_eval_name_the_tasks(lm_eval, monkeypatch):
    """Nor does it run git, which complains outside a repository."""
    from lm_eval import evaluator

    def simple_evaluate(**_):
        assert evaluator.get_git_commit_hash() is None
        raise IndexError("list index out of range")

    monkeypatch.setattr(evaluator, "simple_evaluate", simple_evaluate)
    tasks = HarnessTasks(None, (), {"m": types.SimpleNamespace(OUTPUT_TYPE="loglikelihood")})
    message = r"failed on the tasks m \(IndexError: list index out of range\): check the metrics"
    with pytest.raises(ValueError, match=message):
        harness.run_tasks(None, tasks)


def test_an_empty_text_is_named(lm_eval, of_bytes):
    with pytest.raises(ValueError, match="task m: document 4 has an empty text"):
        make_lm(of_bytes, make_bpe()).loglikelihood_rolling([make_request("", "")])


def test_the_token_before_texts_is_that_of_training(of_bytes):
    answerer = make_answerer(of_bytes, result_journal.ResultJournal())
    assert dataclasses.replace(answerer, prefix=7).prefix_token_id == 7


def test_log_likelihoods_that_are_not_finite_are_refused(of_bytes):
    model, params, tokenizer = of_bytes
    params = params | {"ln_f": {k: v * np.nan for k, v in params["ln_f"].items()}}
    answerer = harness.RequestAnswerer(model.config, tokenizer, lambda: (model, params))
    with pytest.raises(FloatingPointError, match="log-likelihood: found nan"):
        answerer._loglikelihood_tokens([(None, [1, 2, 3, 4], [5, 7])])


@pytest.mark.parametrize(
    "named, expected",
    [
        (dict(max_length=1), "max_length: found 1, expected at least 2"),
        (dict(batch_size=0), "batch_size: found 0"),
    ],
)
def test_bad_sizes_are_refused(of_bytes, named, expected):
    model, params, tokenizer = of_bytes
    with pytest.raises(ValueError, match=expected):
        harness.RequestAnswerer(model.config, tokenizer, lambda: (model, params), **named)
    config = dataclasses.replace(model.config, eos_token_id=None)
    with pytest.raises(ValueError, match="eos_token_id: found none"):
        harness.RequestAnswerer(config, tokenizer, lambda: (model, params))
    config = dataclasses.replace(gpt2.ours()[0].config, eos_token_id=1)
    with pytest.raises(ValueError, match="exceed the 64 learned positions"):
        harness.RequestAnswerer(config, tokenizer, lambda: (model, params), max_length=65)
