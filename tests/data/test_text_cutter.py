"""Long texts are cut where the tokenizer begins a word: the ids are those of the whole text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from btlm_jax.data import text_cutter
from btlm_jax.data.encoder import Encoder, encode_documents
from btlm_jax.data.text_cutter import NoCutError, TextCutter
from btlm_jax.data.text_reader import DocumentCounts, ReadPosition, TextPiece

TEXT = "It's 2023, isn't it?  We'll see:\n\n\tnaïve café — 東京都 has 14,000 people 👩‍👩‍👧. "
# What moves the boundaries of words: blanks, contractions, digits, marks that combine, no blanks.
FRAGMENTS = [
    " ", "  ", "\n", "\r\n", "\t", "'s", "'", "12", "3", "a", "word", " word", "é", "e\u0301",
    "\u0301", "東京", "👩\u200d👧", "!", "...", "_", "\u00a0", "\ufeff", "\x00",
    "<|endoftext|>", "ﬁ",
]  # fmt: skip


def trained(pre_tokenizer, normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT * 3, " ".join(FRAGMENTS)], trainer)
    return tokenizer


KINDS = {
    "GPT-2": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prefix space": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "NFKC": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFKC()),
    "digits": lambda: trained(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "Metaspace": lambda: trained(pre_tokenizers.Metaspace()),
    "one word": lambda: trained(None),
}


@pytest.fixture(scope="module", params=list(KINDS))
def tokenizer(request):
    tokenizer = KINDS[request.param]()
    tokenizer.encode_special_tokens = True  # as `Encoder` has it
    return tokenizer


def encode_in_pieces(tokenizer, text, block=7, size=40, limit=400):
    """Encodes a text as `Encoder` does; None if it is refused."""
    encoder = object.__new__(Encoder)
    encoder._tokenizer, encoder.eos_id, encoder.dtype = tokenizer, 0, np.dtype(np.int32)
    encoder._beyond = []
    blocks = (text[i : i + block] for i in range(0, len(text), block))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_cutter, "PIECE_CHARACTERS", size)
        patch.setattr(text_cutter, "LIMIT_CHARACTERS", limit)
        patch.setattr(text_cutter, "_SURROUNDINGS", ((16, 32), (64, 4), (limit, 2)))
        try:
            pieces = list(TextCutter(tokenizer).cut(blocks))
        except NoCutError:
            return None
        assert "".join(piece.text for piece in pieces) == text
        texts = [
            TextPiece(p.text, p.context, i == len(pieces) - 1, True, ReadPosition(),
                      DocumentCounts())
            for i, p in enumerate(pieces)
        ]  # fmt: skip
        try:
            parts = [ids for _, ids in encode_documents(texts, encoder, 1)]
        except ValueError:
            return None
    assert parts[-1][-1] == 0  # the only EOS is at the end
    return np.concatenate(parts)[:-1].tolist(), len(pieces)


@settings(max_examples=150)
@given(st.lists(st.sampled_from(FRAGMENTS), min_size=10, max_size=150).map("".join))
@example(" " * 300)
@example("x" * 300)
@example("<|endoftext|>" * 30)
@example("e\u0301" * 120)
@example("a \u0301" * 120)
@example("\r\n" * 150)
def test_ids_in_pieces_are_those_of_the_whole_text_or_it_is_refused(tokenizer, text):
    found = encode_in_pieces(tokenizer, text)
    if found is not None:
        assert found[0] == tokenizer.encode(text, add_special_tokens=False).ids


def test_ordinary_text_is_cut_by_every_tokenizer_with_words(tokenizer):
    text = TEXT * 20
    found = encode_in_pieces(tokenizer, text)
    if tokenizer.pre_tokenizer is None:
        assert found is None  # the whole text is one word
        return
    ids, pieces = found
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert pieces > len(text) / 100


def test_a_text_without_words_is_refused_with_the_limit(tokenizer):
    with pytest.raises(NoCutError, match=r"no place to cut the text within 2,097,152 characters"):
        list(TextCutter(tokenizer).cut("x" * (1 << 20) for _ in range(4)))
