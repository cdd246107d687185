"""The bodies of OpenAI's responses, whole and in pieces."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import numpy as np

from btlm_jax.generation import scoring
from btlm_jax.generation.detokenize import Detokenizer
from btlm_jax.serving.prompt_encoding import PromptIds
from btlm_jax.serving.service import EngineService, TokenStream
from btlm_jax.serving.stop_trimmer import StopTrimmer
from btlm_jax.serving.token_texts import TokenTexts


@dataclasses.dataclass(frozen=True)
class Piece:
    """New text of a continuation.

    Attributes:
      text: the text.
      tokens, logprobs: the new tokens, whose text may come later, and their log-probabilities.
      finish_reason: "stop" or "length" in the last piece; otherwise None.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str | None = None


class Continuation:
    """One continuation of a prompt."""

    def __init__(
        self, stream: TokenStream, tokenizer: Any, prompt: PromptIds, stops: Sequence[str]
    ):
        """Wraps the tokens of a request.

        Args:
          stream: the tokens.
          tokenizer: the tokenizer.
          prompt: the prompt.
          stops: texts that end it.
        """
        self._stream, self._tokenizer, self._stops = stream, tokenizer, stops
        self.prompt = prompt
        self.tokens: list[int] = []
        self.logprobs: list[float] = []

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields its pieces. Closing the iterator cancels it."""
        detokenizer = Detokenizer(self._tokenizer, self.prompt.ids)
        trimmer = StopTrimmer(self._stops)
        try:
            while True:
                tokens, logprobs = await self._stream.next_tokens()
                self.tokens += tokens
                self.logprobs += logprobs
                if tokens:
                    text = trimmer.push(detokenizer.push(tokens))
                    reason = "stop" if trimmer.stopped else None
                else:
                    text = trimmer.push(detokenizer.flush())
                    is_length = self._stream.finish_reason == "length" and not trimmer.stopped
                    reason = "length" if is_length else "stop"
                    text += "" if trimmer.stopped else trimmer.flush()
                yield Piece(text, tokens, logprobs, reason)
                if reason is not None:
                    return
        finally:
            self._stream.close()

    async def finish(self) -> Piece:
        """Returns the whole continuation as one piece."""
        text, reason = "", None
        async for piece in self.pieces():
            text, reason = text + piece.text, piece.finish_reason
        return Piece(text, self.tokens, self.logprobs, reason)

    def close(self) -> None:
        """Cancels it, if it has not ended."""
        self._stream.close()


async def merge_pieces(
    continuations: Sequence[Continuation],
) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yields (index, piece) of several continuations as they come."""
    merged: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue()

    async def forward(i: int, continuation: Continuation) -> None:
        try:
            async for piece in continuation.pieces():
                await merged.put((i, piece))
        except BaseException as e:
            await merged.put((i, e))

    tasks = [asyncio.create_task(forward(i, c)) for i, c in enumerate(continuations)]
    try:
        unfinished = len(continuations)
        while unfinished:
            i, piece = await merged.get()
            if isinstance(piece, BaseException):
                raise piece
            yield i, piece
            unfinished -= piece.finish_reason is not None
    finally:
        for task in tasks:
            task.cancel()


class Answer:
    """The frame of a response: its id, when it was created, and the model."""

    def __init__(self, kind: str, prefix: str, model: str):
        self.frame = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def body(self, choices: list[Any], usage: dict[str, int] | None = None) -> dict[str, Any]:
        """Returns a response, or a piece of one."""
        return self.frame | {"choices": choices} | ({} if usage is None else {"usage": usage})


def usage(continuations: Sequence[Continuation], copies: int) -> dict[str, int]:
    """Returns the numbers of tokens.

    Args:
      continuations: `copies` neighbors for each prompt.
      copies: continuations of each prompt.
    """
    prompt_tokens = sum(len(c.prompt.ids) for c in continuations[::copies])
    new_tokens = sum(len(c.tokens) for c in continuations)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


def top_of_text(service: EngineService, ids: list[int], k: int) -> scoring.TopTokens:
    """Returns the predictions of a text; it runs in the engine's thread."""
    return scoring.top_tokens(service.engine.model, service.engine.params, np.array(ids), max(k, 1))


def completion_logprobs(
    texts_of: TokenTexts,
    tokens: Sequence[int],
    logprobs: Sequence[float | None],
    top: Sequence[dict[str, float] | None] | None,
) -> dict[str, Any]:
    """Returns the field `logprobs` of a choice of /v1/completions."""
    texts = [texts_of(token) for token in tokens]
    offsets, position = [], 0
    for text in texts:
        offsets.append(position)
        position += len(text)
    return {
        "tokens": texts,
        "token_logprobs": list(logprobs),
        "top_logprobs": None if top is None else list(top),
        "text_offset": offsets,
    }


def chat_logprobs(
    texts_of: TokenTexts,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    top: Sequence[Sequence[tuple[int, float]]] | None,
) -> dict[str, Any]:
    """Returns the field `logprobs` of a choice of /v1/chat/completions."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = list(texts_of.to_bytes(token))
        return {"token": texts_of(token), "logprob": logprob, "bytes": data}

    content = []
    for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        best = [] if top is None else [entry(*pair) for pair in top[i]]
        content.append(entry(token, logprob) | {"top_logprobs": best})
    return {"content": content}
