"""Prompts for retrieval: the answer is in them once, and they follow from a seed."""

from __future__ import annotations

import hashlib
import itertools
import re

import numpy as np
import pytest

from btlm_jax.evaluation import retrieval_texts
from btlm_jax.evaluation.retrieval_texts import MAX_ENTRIES, RetrievalRecord

TASKS = ("lines", "topics")


DIGESTS = ["d4430c8e59ad497b", "561e6a726850352b"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("lead", [True, False])
@pytest.mark.parametrize("size", [1, 2, 7, 300])
def test_the_answer_is_in_the_prompt_once(task, lead, size):
    for index in range(5):
        text = RetrievalRecord(task, 0, index, lead=lead).text(size)
        assert text.prompt.count(text.answer) == 1 and len(text.others) == size - 1
        assert len({text.answer, *text.others}) == size
        assert all(text.prompt.count(other) == 1 for other in text.others)
        if task == "lines":
            target = re.search(r"in line ([a-z-]+)\? I need the number\.", text.prompt)[1]
            record = dict(re.findall(r"line ([a-z-]+): REGISTER_CONTENT is <(\d{5})>", text.prompt))
            assert len(record) == size and record[target] == text.answer
        else:
            topics = re.findall(r"USER: I would like to discuss the topic of (.*)\.", text.prompt)
            assert topics == [text.answer, *text.others]
            assert f"on {size} different topics" in text.prompt


def test_no_topic_contains_another():
    text = RetrievalRecord("topics", 0, 0).text(MAX_ENTRIES["topics"])
    topics = [f" {topic} " for topic in (text.answer, *text.others)]
    assert len(topics) == MAX_ENTRIES["topics"]
    assert not any(a in b for a, b in itertools.permutations(topics, 2))


def test_the_largest_record_has_distinct_lines():
    text = RetrievalRecord("lines", 0, 0).text(MAX_ENTRIES["lines"])
    assert len({text.answer, *text.others}) == MAX_ENTRIES["lines"] == 9120


def test_the_requested_line_is_anywhere_in_the_record():
    places = []
    for index in range(100):
        text = RetrievalRecord("lines", 3, index).text(5)
        numbers = re.findall(r"<(\d{5})>", text.prompt)
        places.append(numbers.index(text.answer))
    # Each of five places is drawn 20 times out of 100, with a standard deviation of 4.
    assert np.abs(np.bincount(places, minlength=5) - 20).max() < 4 * 4


def test_larger_prompts_ask_the_same_question():
    record = RetrievalRecord("lines", 0, 0)
    a, b = record.text(5), record.text(50)
    assert a.answer == b.answer and a.prompt.splitlines()[-1] == b.prompt.splitlines()[-1]


def test_prompts_follow_from_the_seed():
    """Also on other versions of Python, so that results of other machines stay comparable."""
    texts = [RetrievalRecord(task, 7, 2, lead=False).text(20).prompt for task in TASKS]
    digests = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
    assert digests == DIGESTS
    again = [RetrievalRecord(task, 7, 2).text(20).prompt for task in TASKS]
    assert all(a.startswith(b) for a, b in zip(again, texts, strict=True))
    assert (
        len({RetrievalRecord("lines", s, i).text(20).prompt for s in range(3) for i in range(3)})
        == 9
    )


@pytest.mark.parametrize("task", TASKS)
def test_texts_record_whether_they_lead_to_the_answer(task):
    for lead in (True, False):
        assert RetrievalRecord(task, 0, 0, lead=lead).text(3).lead is lead


def test_word_lists_have_no_duplicates():
    for words in (retrieval_texts._ADJECTIVES, retrieval_texts._NOUNS,
                  retrieval_texts._ASPECTS, retrieval_texts._SUBJECTS):  # fmt: skip
        assert len(set(words)) == len(words)
