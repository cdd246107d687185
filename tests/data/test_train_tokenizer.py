"""Tokenizers that are trained: lossless, reproducible, from a bounded amount of text."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btlm_jax.data import sample_text
from btlm_jax.data.split import SplitPart
from btlm_jax.data.text_files import expand_inputs
from btlm_jax.data.train_tokenizer import sample_texts, train_bpe


@pytest.fixture(scope="module")
def trained():
    return train_bpe([sample_text.read_sample_text()[:50_000]], 512)


@given(text=st.text())
def test_encoding_is_lossless(trained, text):
    assert trained.decode(trained.encode(text).ids) == text


def test_the_vocabulary_has_the_given_size_if_the_text_allows(trained, caplog):
    assert trained.get_vocab_size() == 512 and trained.token_to_id("<|endoftext|>") == 0
    assert (
        len(trained.encode(sample_text.read_sample_text()[:50_000]).ids) < 50_000 / 2
    )  # merges were learned
    assert train_bpe(["ab" * 9], 257).get_vocab_size() == 257  # bytes alone
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    few = train_bpe(["abab"], 300).get_vocab_size()
    assert f"gives the tokenizer {few} tokens, not 300" in caplog.text and few < 260
    with pytest.raises(ValueError, match="new_tokenizer: found 256, expected at least 257"):
        train_bpe(["abab"], 256)


TRAIN_AGAIN = """
from btlm_jax.data import sample_text
from btlm_jax.data.train_tokenizer import train_bpe
print(train_bpe([sample_text.read_sample_text()[:50_000]], 512).to_str())
"""


@pytest.mark.parametrize("threads", ["1", "5"])
def test_the_same_text_gives_the_same_tokenizer(trained, threads):
    """In another process, whose hashes have other seeds, and with any number of threads."""
    env = os.environ | {"RAYON_NUM_THREADS": threads}
    command = [sys.executable, "-c", TRAIN_AGAIN]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    assert out.rstrip("\n") == trained.to_str()


def test_the_sample_is_spread_over_the_files(tmp_path):
    sizes = {"a": 10, "b": 1000, "c": 1000, "d": 1000}
    for name, size in sizes.items():
        (tmp_path / f"{name}.txt").write_text(name * size)
    lines = [json.dumps({"text": "e" * 70}) for _ in range(9)]
    (tmp_path / "e.jsonl").write_text("\n".join(lines))
    files = expand_inputs([str(tmp_path / "*.txt"), str(tmp_path / "e.jsonl")])
    text = "".join(sample_texts(files, "text", characters=1000))
    # a.txt leaves 190 of its share of 200 to the other four: 990 // 4, 743 // 3, 496 // 2, 248
    assert [text.count(c) for c in "abcde"] == [10, 247, 247, 248, 248]
    assert (
        "".join(sample_texts(files, "text")) == "".join(c * n for c, n in sizes.items()) + "e" * 630
    )


def test_the_sample_is_taken_from_one_part(tmp_path):
    documents = [f"document {i}" for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    for held_out in (False, True):
        part = SplitPart(0.2, held_out, one_document=False)
        texts = list(sample_texts(expand_inputs(tmp_path / "a.jsonl"), "text", part=part))
        assert texts == [d for d in documents if part.select(d)] and 5 < len(texts) < 95
