"""Stop strings as a finite automaton over tokens, so that matching runs inside jit.

The Aho-Corasick automaton of the strings' bytes, run over the bytes of every token from every
state: after a token, whether any string has just been completed is one look-up. A string counts
when it ends within the new token, wherever it began, in the prompt too (transformers'
`StopStringCriteria`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers


def build_stop_table(
    stop_strings: str | Sequence[str], tokenizer: Any, vocab_size: int
) -> np.ndarray:
    """The automaton. int32 [states, vocab_size]: twice the next state, plus 1 if a string ends.

    Args:
      stop_strings: one or several.
      tokenizer: of the `tokenizers` library (`btlm.load_tokenizer`) or of transformers.

    Raises:
      ValueError: no strings, an empty one, or no tokenizer.
    """
    strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    if not strings or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(
            f"stop_strings: found {stop_strings!r}, expected strings that are not empty"
        )
    if tokenizer is None:
        raise ValueError("stop_strings: found no tokenizer: pass tokenizer=load_tokenizer(...)")
    following, ends = _automaton([s.encode() for s in strings])
    states = len(following)
    state = np.tile(np.arange(states, dtype=np.int32)[:, None], vocab_size)
    hit = np.zeros(state.shape, bool)
    tokens = _token_bytes(getattr(tokenizer, "backend_tokenizer", tokenizer))
    by_length = sorted((t for t in tokens.items() if t[0] < vocab_size), key=lambda t: len(t[1]))
    ids = np.array([i for i, _ in by_length])
    lengths = np.array([len(b) for _, b in by_length])
    for place in range(lengths.max(initial=0)):
        first = np.searchsorted(lengths, place, "right")  # the tokens from here on are longer
        longer = ids[first:]
        byte = np.array([b[place] for _, b in by_length[first:]])
        state[:, longer] = following[state[:, longer], byte]
        hit[:, longer] |= ends[state[:, longer]]
    return 2 * state + hit


def advance_stop_state(table: Any, state: Any, token: Any) -> tuple[Any, Any]:
    """(next state, whether a string has ended), of any shape."""
    entry = table[state, token]
    return entry // 2, entry % 2 == 1


def stop_state_after_prompt(table: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The state of every row after its prompt [B, T]; padding is passed over. int32 [B]."""
    state = np.zeros(len(ids), np.int32)
    for token, real in zip(ids.T, mask.T, strict=True):
        state = np.where(real != 0, advance_stop_state(table, state, token)[0], state)
    return state


def _automaton(strings: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(next state [states, 256], whether a string ends there [states]); 0 is the start."""
    following, ends = [{}], [False]
    for string in strings:
        state = 0
        for byte in string:
            if byte not in following[state]:
                following[state][byte] = len(following)
                following.append({})
                ends.append(False)
            state = following[state][byte]
        ends[state] = True
    complete = np.zeros((len(following), 256), np.int32)
    # Breadth first: the state to fall back to is nearer the start, and complete already.
    queue = [(child, byte, 0) for byte, child in following[0].items()]
    for byte, child in following[0].items():
        complete[0, byte] = child
    while queue:
        state, _, fallback = queue.pop(0)
        ends[state] |= ends[fallback]
        complete[state] = complete[fallback]
        for byte, child in following[state].items():
            queue.append((child, byte, int(complete[fallback, byte])))
            complete[state, byte] = child
    return complete, np.array(ends)


def _token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """What every token adds to the text."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        letters = _byte_letters()
        return {
            i: bytes(letters[c] for c in token) if set(token) <= letters.keys() else token.encode()
            for token, i in vocab.items()
        }
    # After another token, or some decoders would drop a leading space.
    before = tokenizer.encode("a", add_special_tokens=False).ids
    skipped = len(tokenizer.decode(before, skip_special_tokens=False))
    texts = (tokenizer.decode([*before, i], skip_special_tokens=False) for i in vocab.values())
    return {i: t[skipped:].encode() for i, t in zip(vocab.values(), texts, strict=True)}


def _byte_letters() -> dict[str, int]:
    """The letter by which GPT-2's byte-level BPE writes every byte, and the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    assert set(letters) == set(pre_tokenizers.ByteLevel.alphabet())
    return letters
