"""Text of new tokens, all at once or as they arrive. A token may be a part of a character."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# Number of preceding tokens that are decoded too: the text of a token may depend on them, because
# of a space or the rest of a character.
_CONTEXT = 8
# Tokenizers decode bytes that are no character, or not yet one, to this.
_REPLACEMENT = "\ufffd"


def detokenize_continuation(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Returns the text that tokens add to the text of a prompt, without special tokens.

    Args:
      tokenizer: from the `tokenizers` library (`btlm.load_tokenizer`) or from transformers.
      prompt: token ids before the new ones.
      tokens: the new token ids.
    """
    return "".join(detokenize_stream(tokenizer, prompt, [tokens]))


def detokenize_stream(
    tokenizer: Any, prompt: Sequence[int], groups: Iterable[Sequence[int]]
) -> Iterator[str]:
    """Yields the text of each group of tokens, as far as it is whole characters.

    Bytes that never become a character are yielded at the end, as replacement characters. Empty
    pieces are not yielded. Arguments are as for `detokenize_continuation`.
    """
    detokenizer = Detokenizer(tokenizer, prompt)
    for tokens in groups:
        if text := detokenizer.push(tokens):
            yield text
    if text := detokenizer.flush():
        yield text


class Detokenizer:
    """Text of tokens as they arrive; arguments are as for `detokenize_continuation`."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]):
        self._tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._ids = list(prompt[-_CONTEXT:])
        self._text = self._returned = self._tokenizer.decode(self._ids)

    def push(self, tokens: Sequence[int]) -> str:
        """Takes tokens, and returns the text that has become whole characters."""
        self._ids += tokens
        self._text = self._tokenizer.decode(self._ids)
        whole_characters, new = self._text.rstrip(_REPLACEMENT), ""
        if len(whole_characters) > len(self._returned):
            new = whole_characters[len(self._returned) :]
            self._returned = whole_characters
        if self._text == self._returned and len(self._ids) > 2 * _CONTEXT:
            self._ids = self._ids[-_CONTEXT:]
            self._text = self._returned = self._tokenizer.decode(self._ids)
        return new

    def flush(self) -> str:
        """Returns what is left at the end: replacement characters for bytes that are none."""
        new, self._returned = self._text[len(self._returned) :], self._text
        return new
