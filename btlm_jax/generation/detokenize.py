"""The text of new tokens, whole or as they come. A token may be a part of a character."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# Tokens before the new ones that their text may depend on: a space, the rest of a character.
_BEFORE = 8
# What tokenizers show for bytes that are no character, or not yet.
_UNKNOWN = "\ufffd"


def detokenize_continuation(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that tokens add to the text of those before, special tokens left out.

    Args:
      tokenizer: of the `tokenizers` library (`btlm.load_tokenizer`) or of transformers.
    """
    return "".join(detokenize_stream(tokenizer, before, [tokens]))


def detokenize_stream(
    tokenizer: Any, before: Sequence[int], groups: Iterable[Sequence[int]]
) -> Iterator[str]:
    """The same, piece by piece: of every group of tokens, what has become whole characters.

    What is no character at the end comes last, as replacement characters. Pieces are not empty.
    """
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    ids = list(before[-_BEFORE:])
    text = shown = tokenizer.decode(ids)
    for tokens in groups:
        ids += tokens
        text = tokenizer.decode(ids)
        whole = text.rstrip(_UNKNOWN)
        if len(whole) > len(shown):
            yield whole[len(shown) :]
            shown = whole
        if text == shown and len(ids) > 2 * _BEFORE:
            ids = ids[-_BEFORE:]
            text = shown = tokenizer.decode(ids)
    if len(text) > len(shown):
        yield text[len(shown) :]
