"""Text as it comes is the text of all tokens, in pieces of whole characters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from btlm_jax.generation.detokenize import detokenize_continuation, detokenize_stream

# Bytes, and tokens that end within a character, as GPT-2 has some: " " and the first of three.
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_SPLIT = ["Ġä", "ðŁ", "ab"]
TEXT = "né 世界 👩\u200d🚀, ok 🏳️"


def byte_level() -> Tokenizer:
    vocab = {token: i for i, token in enumerate([*_BYTES, *_SPLIT])}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "ä"), ("ð", "Ł"), ("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


TOKENIZER = byte_level()


@given(st.lists(st.integers(0, len(_BYTES) + len(_SPLIT)), max_size=40), st.integers(1, 4))
def test_pieces_are_the_whole(ids, size):
    """Of any bytes, special tokens among them; after text, and from the beginning."""
    groups = [ids[i : i + size] for i in range(0, len(ids), size)]
    for before in ([], TOKENIZER.encode(TEXT).ids):
        found = list(detokenize_stream(TOKENIZER, before, groups))
        assert all(found)
        assert (
            "".join(found)
            == TOKENIZER.decode(ids)
            == detokenize_continuation(TOKENIZER, before, ids)
        )


def test_characters_are_never_split():
    ids = TOKENIZER.encode(TEXT).ids
    found = list(detokenize_stream(TOKENIZER, [], ([i] for i in ids)))
    assert "".join(found) == TEXT and not any("\ufffd" in piece for piece in found)
    assert len(found) == len(TEXT)  # none is held back for longer than it needs


def test_half_a_character_comes_at_the_end():
    ids = TOKENIZER.encode("a世").ids[:-1]
    assert list(detokenize_stream(TOKENIZER, [], ([i] for i in ids))) == ["a", "\ufffd"]


def test_a_character_may_begin_in_the_prompt():
    """Its place is taken by what the prompt showed for it."""
    *before, last = TOKENIZER.encode("a世").ids
    assert list(detokenize_stream(TOKENIZER, before, [[last], TOKENIZER.encode("b").ids])) == ["b"]


@pytest.mark.parametrize("count", [1, 30])
def test_spaces_of_other_tokenizers(count):
    tokenizer = Tokenizer(models.BPE({"▁a": 0, "b": 1, "▁": 2, "a": 3}, []))
    tokenizer.decoder = decoders.Metaspace()
    found = list(detokenize_stream(tokenizer, [1], [[0]] * count))
    assert found == [" a"] * count  # the first of all tokens would lose its space
