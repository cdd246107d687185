"""Requests of lm-evaluation-harness, answered without it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from btlm_jax.evaluation import harness
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
