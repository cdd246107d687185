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
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    ids = list(prompt[-_CONTEXT:])
    text = yielded = tokenizer.decode(ids)
    for tokens in groups:
        ids += tokens
        text = tokenizer.decode(ids)
        whole_characters = text.rstrip(_REPLACEMENT)
        if len(whole_characters) > len(yielded):
            yield whole_characters[len(yielded) :]
            yielded = whole_characters
        if text == yielded and len(ids) > 2 * _CONTEXT:
            ids = ids[-_CONTEXT:]
            text = yielded = tokenizer.decode(ids)
    if len(text) > len(yielded):
        yield text[len(yielded) :]
