"""Streamed text is the text of all tokens, in pieces of whole characters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from btlm_jax.generation.detokenize import detokenize_continuation, detokenize_stream

# Bytes, and tokens that end within a character, such as a space and the first of three bytes; GPT-2
# has such tokens.
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
def test_pieces_join_to_the_whole_text(ids, size):
    """For any bytes and special tokens, after a prompt and without one."""
    groups = [ids[i : i + size] for i in range(0, len(ids), size)]
    for prompt in ([], TOKENIZER.encode(TEXT).ids):
        pieces = list(detokenize_stream(TOKENIZER, prompt, groups))
        assert all(pieces)
        assert (
            "".join(pieces)
            == TOKENIZER.decode(ids)
            == detokenize_continuation(TOKENIZER, prompt, ids)
        )


def test_characters_are_never_split():
    ids = TOKENIZER.encode(TEXT).ids
    pieces = list(detokenize_stream(TOKENIZER, [], ([i] for i in ids)))
    assert "".join(pieces) == TEXT and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(TEXT)  # each is yielded as soon as it is complete


def test_an_incomplete_character_is_yielded_at_the_end():
    ids = TOKENIZER.encode("a世").ids[:-1]
    assert list(detokenize_stream(TOKENIZER, [], ([i] for i in ids))) == ["a", "\ufffd"]


def test_a_character_may_begin_in_the_prompt():
    """The prompt's text has a replacement character for it, so the rest adds no text."""
    *prompt, last = TOKENIZER.encode("a世").ids
    assert list(detokenize_stream(TOKENIZER, prompt, [[last], TOKENIZER.encode("b").ids])) == ["b"]


@pytest.mark.parametrize("count", [1, 30])
def test_leading_spaces_of_other_tokenizers_are_kept(count):
    tokenizer = Tokenizer(models.BPE({"▁a": 0, "b": 1, "▁": 2, "a": 3}, []))
    tokenizer.decoder = decoders.Metaspace()
    pieces = list(detokenize_stream(tokenizer, [1], [[0]] * count))
    assert pieces == [" a"] * count  # without the prompt, the first token would lose its space
