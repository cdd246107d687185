"""The automaton of stop strings agrees with a search in the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from btlm_jax.generation import stop_automaton

# "é" is two bytes, each of which is a token; GPT-2 writes "Ġ" for a space.
TOKENS = ["a", "b", "Ġ", "ab", "ba", "aab", "bĠ", "Ġab", "Ã", "©", "<|end|>"]
TEXTS = [t.replace("Ġ", " ").encode() for t in TOKENS[:8]] + [b"\xc3", b"\xa9", b"<|end|>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(TOKENS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@given(
    st.lists(st.text("ab é", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(0, len(TOKENS) - 1), min_size=1, max_size=14),
)
@example(["aba", "b"], [0, 1])  # one string lies within the beginning of another
def test_ends_with_the_token_that_completes_a_string(stops, ids):
    table = stop_automaton.build_stop_table(stops, byte_level(), len(TOKENS) + 1)
    state, text = 0, b""
    for token in ids:
        old_length, text = len(text), text + TEXTS[token]
        state, completed = stop_automaton.advance_stop_state(table, state, token)
        # A string somewhere in the text, whose last byte is one of the new ones.
        window = (text[max(0, old_length - len(s.encode()) + 1) :].find(s.encode()) for s in stops)
        assert completed == any(position >= 0 for position in window)


def test_strings_may_begin_in_the_prompt_but_not_in_padding():
    table = stop_automaton.build_stop_table("ab", byte_level(), len(TOKENS))
    ids, mask = np.array([[1, 0], [0, 0], [0, 1]]), np.array([[1, 1], [0, 1], [1, 1]])
    state = stop_automaton.stop_state_after_prompt(table, ids, mask)
    assert [bool(stop_automaton.advance_stop_state(table, s, 1)[1]) for s in state] == [
        True,
        True,
        False,
    ]
    state = stop_automaton.stop_state_after_prompt(table, np.array([[0, 2]]), np.array([[1, 0]]))
    assert stop_automaton.advance_stop_state(table, state, np.array([1]))[1].tolist() == [True]


def test_tokens_of_other_tokenizers_are_decoded():
    tokenizer = Tokenizer(models.BPE({"▁a": 0, "b": 1, "▁": 2, "a": 3}, []))
    tokenizer.decoder = decoders.Metaspace()
    table = stop_automaton.build_stop_table([" a"], tokenizer, 4)
    assert [bool(stop_automaton.advance_stop_state(table, 0, t)[1]) for t in range(4)] == [
        True,
        False,
        False,
        False,
    ]


def test_bad_stop_strings_are_named():
    for stops in ("", [], ["a", ""], [1]):
        with pytest.raises(ValueError, match="stop_strings: found"):
            stop_automaton.build_stop_table(stops, byte_level(), 11)
