"""Documents to evaluate: joined from their pieces, and refused where memory could not hold them."""

from __future__ import annotations

import numpy as np
import pytest

from btlm_jax.data import text_cutter
from btlm_jax.data.encoder import Encoder
from btlm_jax.evaluation import documents as documents_lib
from btlm_jax.evaluation.documents import TextInputs, hold_documents
from support import golden


@pytest.fixture
def encoder(tmp_path):
    (tmp_path / "bpe").mkdir()
    golden.write_tokenizer(tmp_path / "bpe", 96)
    return Encoder(tmp_path / "bpe", None, None)


def test_a_long_document_is_one_document(encoder, tmp_path, monkeypatch):
    text = "some words and 12 numbers. " * 40
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("short")
    inputs = TextInputs(text=(f"{tmp_path}/*.txt",))
    whole = hold_documents(inputs.documents(encoder))
    monkeypatch.setattr(text_cutter, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(text_cutter, "_SURROUNDINGS", ((32, 32),))
    pieces = hold_documents(inputs.documents(encoder))
    assert [d.text_bytes for d in pieces] == [d.text_bytes for d in whole] == [len(text), 5]
    for a, b in zip(pieces, whole, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)


@pytest.mark.parametrize("texts", [["x" * 60], ["x" * 30, "y" * 30]])
def test_more_tokens_than_memory_holds_are_refused(encoder, tmp_path, monkeypatch, texts):
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    monkeypatch.setattr(documents_lib, "MAX_TOKENS", 50)
    inputs = TextInputs(text=(f"{tmp_path}/*.txt",))
    with pytest.raises(ValueError, match=r"found more than 50 tokens, .* evaluate a part of it"):
        hold_documents(inputs.documents(encoder))
