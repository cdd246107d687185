"""The text of single tokens, as OpenAI's interface shows it."""

from __future__ import annotations

from typing import Any

from btlm_jax.generation.stop_automaton import token_bytes


class TokenTexts:
    """Texts of the tokens of a vocabulary. A part of a character is "bytes:" and its bytes."""

    def __init__(self, tokenizer: Any):
        self._bytes = token_bytes(getattr(tokenizer, "backend_tokenizer", tokenizer))

    def to_bytes(self, token: int) -> bytes:
        """Returns the bytes of a token; none for an id that the tokenizer does not know."""
        return self._bytes.get(token, b"")

    def __call__(self, token: int) -> str:
        data = self.to_bytes(token)
        if token not in self._bytes:
            return f"<token {token}>"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
