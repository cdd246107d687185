"""Prompts of requests to token ids, and back to text."""

from __future__ import annotations

import dataclasses
from typing import Any

from btlm_jax.data.tokenizer import check_text, encode_prompt
from btlm_jax.serving.protocol import ApiError


@dataclasses.dataclass(frozen=True)
class PromptIds:
    """A prompt: its text, if it was given as one, and its tokens."""

    text: str | None
    ids: list[int]


class PromptEncoder:
    """Encodes the prompts of requests."""

    def __init__(self, tokenizer: Any, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def prompt_ids(self, prompt: str | list[int]) -> PromptIds:
        """Returns a text, or token ids, as a prompt.

        Raises:
          ApiError: the text cannot be encoded, or an id is outside the vocabulary.
        """
        if isinstance(prompt, str):
            try:
                return PromptIds(prompt, encode_prompt(self._tokenizer, prompt))
            except ValueError as e:
                raise ApiError(400, f"prompt: {e}", "prompt") from None
        if (highest := max(prompt)) >= self._vocab_size:
            last = self._vocab_size - 1
            message = f"prompt: found the token id {highest}, expected 0 to {last}"
            raise ApiError(400, message, "prompt")
        return PromptIds(None, prompt)

    def chat_ids(self, text: str) -> PromptIds:
        """Returns the text of a chat template, which has its special tokens already.

        Raises:
          ApiError: the text cannot be encoded.
        """
        try:
            check_text(text)
        except ValueError as e:
            raise ApiError(400, f"messages: {e}", "messages") from None
        return PromptIds(text, self._tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, prompt: PromptIds) -> str:
        """Returns the text of a prompt."""
        return self._tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text
