"""Stop strings as a finite automaton over tokens, so that matching runs inside jit.

The Aho-Corasick automaton of the strings' bytes is run over the bytes of every token from every
state. Whether a token completes a string is then one table look-up. A string is completed if it
ends within the new token, wherever it begins, also in the prompt (as transformers'
`StopStringCriteria`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers

from btlm_jax.data.tokenizer import check_text, encode_fragment

_MIN_STATES = 16


def build_stop_table(
    stop_strings: str | Sequence[str], tokenizer: Any, vocab_size: int
) -> np.ndarray:
    """Returns the automaton's transition table.

    Args:
      stop_strings: one string or several.
      tokenizer: from the `tokenizers` library (`btlm.load_tokenizer`) or from transformers.
      vocab_size: number of token ids.

    Returns:
      int32 [states, vocab_size]: twice the next state, plus 1 if the token completes a string. The
      number of states is padded to 16, 32, 64, ..., because each is a program.

    Raises:
      ValueError: no strings, an empty string, or no tokenizer.
    """
    is_one = isinstance(stop_strings, str) or not isinstance(stop_strings, Iterable)
    strings = [stop_strings] if is_one else list(stop_strings)
    if not strings:
        raise ValueError("stop_strings: found none, expected at least one")
    for string in strings:
        try:
            check_text(string)
        except ValueError as e:
            raise ValueError(f"stop_strings: {e}") from None
    if tokenizer is None:
        raise ValueError("stop_strings: found no tokenizer: pass tokenizer=load_tokenizer(...)")
    transitions, completes = _build_automaton([s.encode() for s in strings])
    num_states = len(transitions)
    state = np.tile(np.arange(num_states, dtype=np.int32)[:, None], vocab_size)
    completed = np.zeros(state.shape, bool)
    tokens = token_bytes(getattr(tokenizer, "backend_tokenizer", tokenizer))
    by_length = sorted((t for t in tokens.items() if t[0] < vocab_size), key=lambda t: len(t[1]))
    ids = np.array([i for i, _ in by_length])
    lengths = np.array([len(b) for _, b in by_length])
    for position in range(lengths.max(initial=0)):
        first = np.searchsorted(lengths, position, "right")  # tokens from here on are longer
        longer = ids[first:]
        byte = np.array([b[position] for _, b in by_length[first:]])
        state[:, longer] = transitions[state[:, longer], byte]
        completed[:, longer] |= completes[state[:, longer]]
    table = 2 * state + completed
    padded = max(_MIN_STATES, 1 << (num_states - 1).bit_length())
    return np.pad(table, ((0, padded - num_states), (0, 0)))


def advance_stop_state(table: Any, state: Any, token: Any) -> tuple[Any, Any]:
    """Returns the next state and whether the token completes a string; of any shape."""
    entry = table[state, token]
    return entry // 2, entry % 2 == 1


def stop_state_after_prompt(table: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the state after each prompt [B, T], skipping tokens where `mask` is 0. int32 [B]."""
    state = np.zeros(len(ids), np.int32)
    for token, valid in zip(ids.T, mask.T, strict=True):
        state = np.where(valid != 0, advance_stop_state(table, state, token)[0], state)
    return state


def _build_automaton(strings: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the automaton over bytes.

    Returns:
      The next state [states, 256], and whether a string is complete in a state [states]. State 0 is
      the start.
    """
    trie, completes = [{}], [False]
    for string in strings:
        state = 0
        for byte in string:
            if byte not in trie[state]:
                trie[state][byte] = len(trie)
                trie.append({})
                completes.append(False)
            state = trie[state][byte]
        completes[state] = True
    transitions = np.zeros((len(trie), 256), np.int32)
    # Breadth first, because a state copies the transitions of its fallback, which is less deep.
    queue = [(child, byte, 0) for byte, child in trie[0].items()]
    for byte, child in trie[0].items():
        transitions[0, byte] = child
    while queue:
        state, _, fallback = queue.pop(0)
        completes[state] |= completes[fallback]
        transitions[state] = transitions[fallback]
        for byte, child in trie[state].items():
            queue.append((child, byte, int(transitions[fallback, byte])))
            transitions[state, byte] = child
    return transitions, np.array(completes)


def token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Returns the bytes that each token adds to the text."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        letters = _byte_letters()
        return {
            i: bytes(letters[c] for c in token) if set(token) <= letters.keys() else token.encode()
            for token, i in vocab.items()
        }
    # Decoded after another token, because some decoders drop a leading space of the text.
    prefix = encode_fragment(tokenizer, "a")
    prefix_length = len(tokenizer.decode(prefix, skip_special_tokens=False))
    texts = (tokenizer.decode([*prefix, i], skip_special_tokens=False) for i in vocab.values())
    return {i: t[prefix_length:].encode() for i, t in zip(vocab.values(), texts, strict=True)}


def _byte_letters() -> dict[str, int]:
    """Returns the byte for each letter with which GPT-2's byte-level BPE writes bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    assert set(letters) == set(pre_tokenizers.ByteLevel.alphabet())
    return letters
