"""Retrieval: prompts fill the length, and scores are exact."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import binomtest

from btlm_jax import load_tokenizer
from btlm_jax.evaluation import retrieval, retrieval_report
from btlm_jax.evaluation.retrieval_texts import MAX_ENTRIES, RetrievalRecord, RetrievalText
from support import golden

TASKS = ("lines", "topics")


@pytest.fixture(scope="module")
def tokenizer(of_bytes):
    return of_bytes[2]


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_as_large_as_fits(task, tokenizer):
    record = RetrievalRecord(task, 0, 0)

    def tokens(size):
        return len(tokenizer.encode(record.text(size).prompt).ids)

    for length in (tokens(1), tokens(1) + 1, tokens(2) - 1, tokens(2), tokens(6), 5000, 20_011):
        prompt = retrieval.fit_prompt(record, task, tokenizer, length)
        assert len(prompt.ids) == tokens(prompt.size) <= length < tokens(prompt.size + 1)
        assert tokenizer.decode(prompt.ids) == prompt.text.prompt == record.text(prompt.size).prompt


def test_impossible_lengths_are_refused(tokenizer, monkeypatch):
    with pytest.raises(ValueError, match=r"found 50 tokens, expected at least 572, which one of"):
        retrieval.retrieval_prompts("lines", tokenizer, 50, 3)
    with pytest.raises(ValueError, match="samples: found 0"):
        retrieval.retrieval_prompts("lines", tokenizer, 5000, 0)
    monkeypatch.setitem(MAX_ENTRIES, "topics", 3)
    with pytest.raises(ValueError, match=r"expected at most \d+, which all 3 topics take"):
        retrieval.retrieval_prompts("topics", tokenizer, 50_000, 1)


def test_a_tokenizer_without_digits_is_refused(tmp_path):
    golden.write_tokenizer(tmp_path, 20)
    with pytest.raises(ValueError, match="a vocabulary of all its characters"):
        retrieval.retrieval_prompts("lines", load_tokenizer(tmp_path), 5000, 1)


@given(st.integers(10_000, 99_999), st.text(), st.text())
def test_the_first_number_counts_after_a_lead(number, before, after):
    assume(not re.search("[0-9]", before))
    assume(not re.match("[0-9]", after))
    text = RetrievalText("", str(number), ("12345",), lead=True)
    assert retrieval.is_correct("lines", text, f"{before}{number}{after}")
    assert not retrieval.is_correct("lines", text, f"{before}{number}7{after}")
    assert not retrieval.is_correct("lines", text, f"{before}{number - 1} {number}{after}")
    assert not retrieval.is_correct("lines", text, before)


@given(st.integers(10_000, 99_999), st.text(), st.text())
def test_the_last_number_counts_without_a_lead(number, before, after):
    """`int(re.findall(r"\\d+", output)[-1])` in LongEval's `test_lines_one_sample`."""
    assume(not re.search("[0-9]$", before))
    assume(not re.search("[0-9]", after))
    text = RetrievalText("", str(number), ("12345",), lead=False)
    assert retrieval.is_correct("lines", text, f"{before}{number}{after}")
    assert retrieval.is_correct("lines", text, f"{before}{number - 1} {number}{after}")
    assert not retrieval.is_correct("lines", text, f"{before}{number} {number - 1}{after}")
    assert not retrieval.is_correct("lines", text, after)


@given(st.integers(0, 30), st.data())
def test_the_first_named_topic_counts(index, data):
    text = RetrievalRecord("topics", 1, index).text(4)
    other = data.draw(st.sampled_from(text.others))
    cased = data.draw(st.sampled_from([str.lower, str.upper, str.title]))
    mark = data.draw(st.sampled_from([".", '"', "\n", "!?", " - "]))
    named = cased(text.answer).replace(" ", mark + " ")
    assert retrieval.is_correct("topics", text, f" {mark}{named}{mark} Then {other}.")
    assert not retrieval.is_correct("topics", text, f"{other}, {named}")
    assert not retrieval.is_correct("topics", text, f"x{named}s")
    assert not retrieval.is_correct("topics", text, "")


@pytest.mark.parametrize(
    "successes, trials", [(0, 20), (1, 20), (13, 20), (20, 20), (0, 1), (977, 1000)]
)
def test_intervals_are_those_of_wilson(successes, trials):
    expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert retrieval.wilson_interval(successes, trials) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


@pytest.mark.parametrize("task", TASKS)
def test_an_oracle_is_correct_and_wrong_answers_are_not(task, tokenizer, tmp_path):
    prompts = retrieval.retrieval_prompts(task, tokenizer, 6000, 5)
    by_ids = {tuple(p.ids): p for p in prompts}

    def oracle(ids):
        return [f"{by_ids[tuple(x)].text.answer}> of course" for x in ids]

    def wrong(ids):
        return [by_ids[tuple(x)].text.others[0] for x in ids]

    def half(ids):
        return [(oracle if i % 2 else wrong)([x])[0] for i, x in enumerate(ids)]

    outcomes = [
        retrieval.evaluate_retrieval(task, "none", n, prompts, answer)
        for n, answer in ((1000, oracle), (2000, wrong), (4000, half))
    ]
    assert [x.accuracy for x in outcomes] == [1.0, 0.0, 0.4]
    line = retrieval_report.format_retrieval(task, outcomes[2])
    assert line.startswith("none") and "2 of 5 right, 40% (12% to 77%)" in line
    report = json.loads(json.dumps(retrieval_report.retrieval_json(outcomes)))
    assert [x["right"] for x in report] == [5, 0, 2]
    assert [a["right"] for a in report[2]["answers"]] == [False, True, False, True, False]
    retrieval_report.plot_retrieval(tmp_path / "r.png", outcomes, 2000, "title")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
