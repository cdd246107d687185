"""Retrieval: prompts that are what they say, scores that are exact, and the whole path."""

from __future__ import annotations

import hashlib
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import binomtest

from btlm_jax import cli, load_tokenizer, save
from btlm_jax.config import AlibiScaling
from btlm_jax.evaluation import retrieval, retrieval_report, retrieval_texts
from btlm_jax.evaluation.context_extension import with_scaling_kind
from btlm_jax.evaluation.retrieval_texts import MAX_ENTRIES, RetrievalRecord, RetrievalText
from support import golden

TASKS = ("lines", "topics")
# Of prompts, made on Python 3.11.
DIGESTS = ["d4430c8e59ad497b", "561e6a726850352b"]


@pytest.fixture(scope="module")
def tokenizer(of_bytes):
    return of_bytes[2]


# Prompts ------------------------------------------------------------------------------------------


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
            asked = re.search(r"in line ([a-z-]+)\? I need the number\.", text.prompt)[1]
            record = dict(re.findall(r"line ([a-z-]+): REGISTER_CONTENT is <(\d{5})>", text.prompt))
            assert len(record) == size and record[asked] == text.answer
        else:
            topics = re.findall(r"USER: I would like to discuss the topic of (.*)\.", text.prompt)
            assert topics == [text.answer, *text.others]
            assert f"on {size} different topics" in text.prompt


def test_no_topic_is_within_another():
    text = RetrievalRecord("topics", 0, 0).text(MAX_ENTRIES["topics"])
    found = [f" {topic} " for topic in (text.answer, *text.others)]
    assert len(found) == MAX_ENTRIES["topics"]
    assert not any(a in b for a, b in itertools.permutations(found, 2))


def test_all_lines_there_are():
    text = RetrievalRecord("lines", 0, 0).text(MAX_ENTRIES["lines"])
    assert len({text.answer, *text.others}) == MAX_ENTRIES["lines"] == 9120


def test_the_line_asked_for_is_anywhere():
    places = []
    for index in range(100):
        text = RetrievalRecord("lines", 3, index).text(5)
        numbers = re.findall(r"<(\d{5})>", text.prompt)
        places.append(numbers.index(text.answer))
    # Of 100 draws from five places each is found 20 times, give or take 4.
    assert np.abs(np.bincount(places, minlength=5) - 20).max() < 4 * 4


def test_larger_prompts_ask_the_same():
    record = RetrievalRecord("lines", 0, 0)
    a, b = record.text(5), record.text(50)
    assert a.answer == b.answer and a.prompt.splitlines()[-1] == b.prompt.splitlines()[-1]


def test_prompts_follow_from_the_seed():
    """From one Python to the next, too: results of other machines stay comparable."""
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
def test_as_much_as_fits(task, tokenizer):
    record = RetrievalRecord(task, 0, 0)

    def tokens(size):
        return len(tokenizer.encode(record.text(size).prompt).ids)

    for length in (tokens(1), tokens(1) + 1, tokens(2) - 1, tokens(2), tokens(6), 5000, 20_011):
        found = retrieval.fit_prompt(record, task, tokenizer, length)
        assert len(found.ids) == tokens(found.size) <= length < tokens(found.size + 1)
        assert tokenizer.decode(found.ids) == found.text.prompt == record.text(found.size).prompt


def test_lengths_that_cannot_be(tokenizer, monkeypatch):
    with pytest.raises(ValueError, match=r"found 50 tokens, expected at least 572, which one of"):
        retrieval.retrieval_prompts("lines", tokenizer, 50, 3)
    with pytest.raises(ValueError, match="samples: found 0"):
        retrieval.retrieval_prompts("lines", tokenizer, 5000, 0)
    monkeypatch.setitem(MAX_ENTRIES, "topics", 3)
    with pytest.raises(ValueError, match=r"expected at most \d+, which all 3 topics take"):
        retrieval.retrieval_prompts("topics", tokenizer, 50_000, 1)


def test_a_tokenizer_without_digits(tmp_path):
    golden.write_tokenizer(tmp_path, 20)
    with pytest.raises(ValueError, match="a vocabulary of all its characters"):
        retrieval.retrieval_prompts("lines", load_tokenizer(tmp_path), 5000, 1)


# Scores -------------------------------------------------------------------------------------------


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
def test_the_last_number_counts_without(number, before, after):
    """`int(re.findall(r"\\d+", output)[-1])` in LongEval's `test_lines_one_sample`."""
    assume(not re.search("[0-9]$", before))
    assume(not re.search("[0-9]", after))
    text = RetrievalText("", str(number), ("12345",), lead=False)
    assert retrieval.is_correct("lines", text, f"{before}{number}{after}")
    assert retrieval.is_correct("lines", text, f"{before}{number - 1} {number}{after}")
    assert not retrieval.is_correct("lines", text, f"{before}{number} {number - 1}{after}")
    assert not retrieval.is_correct("lines", text, after)


@pytest.mark.parametrize("task", TASKS)
def test_texts_say_whether_they_lead(task):
    for lead in (True, False):
        assert RetrievalRecord(task, 0, 0, lead=lead).text(3).lead is lead


@given(st.integers(0, 30), st.data())
def test_the_first_topic_counts(index, data):
    text = RetrievalRecord("topics", 1, index).text(4)
    other = data.draw(st.sampled_from(text.others))
    cased = data.draw(st.sampled_from([str.lower, str.upper, str.title]))
    mark = data.draw(st.sampled_from([".", '"', "\n", "!?", " - "]))
    said = cased(text.answer).replace(" ", mark + " ")
    assert retrieval.is_correct("topics", text, f" {mark}{said}{mark} Then {other}.")
    assert not retrieval.is_correct("topics", text, f"{other}, {said}")
    assert not retrieval.is_correct("topics", text, f"x{said}s")
    assert not retrieval.is_correct("topics", text, "")


@pytest.mark.parametrize("right, of", [(0, 20), (1, 20), (13, 20), (20, 20), (0, 1), (977, 1000)])
def test_intervals(right, of):
    expected = binomtest(right, of).proportion_ci(0.95, method="wilson")
    assert retrieval.wilson_interval(right, of) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


@pytest.mark.parametrize("task", TASKS)
def test_an_oracle_is_right_and_others_are_not(task, tokenizer, tmp_path):
    asked = retrieval.retrieval_prompts(task, tokenizer, 6000, 5)
    known = {tuple(p.ids): p for p in asked}

    def oracle(ids):
        return [f"{known[tuple(x)].text.answer}> of course" for x in ids]

    def wrong(ids):
        return [known[tuple(x)].text.others[0] for x in ids]

    def half(ids):
        return [(oracle if i % 2 else wrong)([x])[0] for i, x in enumerate(ids)]

    outcomes = [
        retrieval.evaluate_retrieval(task, "none", n, asked, how)
        for n, how in ((1000, oracle), (2000, wrong), (4000, half))
    ]
    assert [x.accuracy for x in outcomes] == [1.0, 0.0, 0.4]
    line = retrieval_report.format_retrieval(task, outcomes[2])
    assert line.startswith("none") and "2 of 5 right, 40% (12% to 77%)" in line
    found = json.loads(json.dumps(retrieval_report.retrieval_json(outcomes)))
    assert [x["right"] for x in found] == [5, 0, 2]
    assert [a["right"] for a in found[2]["answers"]] == [False, True, False, True, False]
    retrieval_report.plot_retrieval(tmp_path / "r.png", outcomes, 2000, "title")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


# The command --------------------------------------------------------------------------------------


def run(capsys, *argv):
    code = cli.main(["eval", "retrieval", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command(capsys, of_bytes, bytes_checkpoint, tmp_path):
    model, params, tokenizer = of_bytes
    files = tmp_path / "out" / "r.json", tmp_path / "out" / "r.png"
    argv = [bytes_checkpoint, "--lengths", "700,600", "--samples", 3, "--max-new-tokens", 6]
    options = ["--scaling", "none", "fixed", "--json", files[0], "--plot", files[1]]
    code, out, _ = run(capsys, *argv, *options)
    assert code == 0 and len(out.splitlines()) == 4
    assert files[1].stat().st_size > 10_000
    found = json.loads(files[0].read_text())
    assert [(x["scaling"], x["length"]) for x in found["outcomes"]] == [
        ("none", 700), ("fixed", 700), ("none", 600), ("fixed", 600)
    ]  # fmt: skip
    asked = retrieval.retrieval_prompts("lines", tokenizer, 700, 3)
    for x in found["outcomes"][:2]:
        used = with_scaling_kind(model, x["scaling"], 256, 700)
        continued = retrieval.greedy_continuation(
            used, params, tokenizer, new_tokens=6, batch_size=4
        )
        assert [a["found"] for a in x["answers"]] == continued([p.ids for p in asked])
        assert [a["expected"] for a in x["answers"]] == [p.text.answer for p in asked]
    none, fixed = ([a["found"] for a in x["answers"]] for x in found["outcomes"][:2])
    assert none != fixed


def test_weights_in_half_are_computed_as_they_rest(
    capsys, of_bytes, bytes_checkpoint, tmp_path, monkeypatch
):
    """As `load` says: on a CPU every step would else copy them into float32."""
    model, params, _ = of_bytes
    assets = [bytes_checkpoint / "tokenizer" / "tokenizer.json"]
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    save(tmp_path / "half", model.config, half, assets=assets)
    seen = []

    def continuation(used, params, *_, **__):
        seen.append((str(used.runtime(params).dtype), used.config.alibi_scaling))
        return lambda ids: [""] * len(ids)

    monkeypatch.setattr(retrieval, "greedy_continuation", continuation)
    argv = [tmp_path / "half", "--lengths", "600", "--samples", 1, "--json", tmp_path / "r.json"]
    for options, expected in (([], "bfloat16"), (["--dtype", "float32"], "float32")):
        assert run(capsys, *argv, "--scaling", "none", "fixed", *options)[0] == 0
        (none, fixed), seen[:] = seen[:], []
        assert none == (expected, None) and fixed[0] == expected and fixed[1] is not None
        assert json.loads((tmp_path / "r.json").read_text())["compute_dtype"] == expected


def test_dynamic_at_the_trained_length(capsys, bytes_checkpoint, monkeypatch):
    """What is generated there is beyond it, though the prompt is not."""
    used = []

    def continuation(model, *args, new_tokens, **options):
        used.append(model.config.alibi_scaling)
        return lambda ids: [""] * len(ids)

    monkeypatch.setattr(retrieval, "greedy_continuation", continuation)
    argv = [bytes_checkpoint, "--lengths", "640,700", "--trained-length", 700, "--samples", 1]
    code, _, err = run(capsys, *argv, "--scaling", "dynamic", "--max-new-tokens", 8)
    assert code == 0, err
    assert used == [None, AlibiScaling(train_seq_len=700)]


def test_bad_input(capsys, of_bytes, bytes_checkpoint, tmp_path, monkeypatch):
    model, params, _ = of_bytes
    save(tmp_path / "bare", model.config, params)
    learned = golden.load("f_learned_gelu_mup")
    golden.write_tokenizer(tmp_path, learned.config.vocab_size)
    assets = [tmp_path / "tokenizer.json"]
    save(tmp_path / "learned", learned.config, learned.params, assets=assets)
    few = golden.load("a2_btlm_mup_h32")
    golden.write_tokenizer(tmp_path, 20)
    save(tmp_path / "few", few.config, few.params, assets=assets)
    monkeypatch.setattr(
        "btlm_jax.checkpoint.checkpoint.load", lambda *a, **k: pytest.fail("the weights were read")
    )
    for argv, message in {
        (tmp_path / "bare",): "no tokenizer.json",
        (tmp_path / "nowhere",): "nowhere",
        (tmp_path / "learned",): "found 'learned', expected 'alibi'",
        (tmp_path / "few",): "a vocabulary of all its characters",
        (bytes_checkpoint,): "lengths: found 64 tokens, expected at least",
        (bytes_checkpoint, "--lengths", "2000,9"): "lengths: found 9 tokens, expected at least",
        (bytes_checkpoint, "--samples", "0"): "samples: found 0",
        (bytes_checkpoint, "--batch-size", "0"): "batch_size: found 0, expected at least 1",
        (bytes_checkpoint, "--max-new-tokens", "0"): "max_new_tokens: found 0",
        (bytes_checkpoint, "--json", tmp_path): "is a directory: choose another name",
        (bytes_checkpoint, "--plot", tmp_path / "a.pdf"): "found the suffix '.pdf'",
    }.items():
        code, out, err = run(capsys, *argv)
        assert code == 2 and message in err and "Traceback" not in out + err, err


def test_words_are_listed_once():
    for words in (retrieval_texts._ADJECTIVES, retrieval_texts._NOUNS,
                  retrieval_texts._ASPECTS, retrieval_texts._SUBJECTS):  # fmt: skip
        assert len(set(words)) == len(words)
