"""A request that an engine runs, and its result."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from btlm_jax.generation import decode, stop_automaton
from btlm_jax.generation.request import GenerationRequest, RowRequest

if TYPE_CHECKING:
    from btlm_jax.generation.engine import Engine


@dataclasses.dataclass(frozen=True, eq=False)
class GenerationResult:
    """One continuation.

    Attributes:
      tokens: int32 [n], the new tokens, including an EOS.
      logprobs: fp32 [n], as in `generate`'s `GenerateOutput`.
      finish_reason: "eos", "stop" (a stop string was completed) or "length".
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: str


@dataclasses.dataclass(eq=False)
class Handle:
    """A request that was submitted to an engine. Iterate it for its tokens as they come.

    Attributes:
      request: the request, of one row.
      tokens, logprobs: the new tokens so far, and the model's log-probabilities of them.
      finish_reason: None until the row has ended; then "eos", "stop" (a stop string was completed),
        "length", "cancelled" or "error".
      error: why it failed.
    """

    engine: Engine
    request: GenerationRequest
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    stop_state: int = 0  # of the stop automaton after the last token

    @property
    def row(self) -> RowRequest:
        """The row."""
        return self.request.rows[0]

    @property
    def finished(self) -> bool:
        """Whether there will be no more tokens."""
        return self.finish_reason is not None

    def __iter__(self) -> Iterator[int]:
        position = 0
        while True:
            while position < len(self.tokens):
                yield self.tokens[position]
                position += 1
            if self.error is not None:
                raise self.error
            if self.finished:
                return
            if not self.engine.step() and not self.finished and position == len(self.tokens):
                raise RuntimeError("the engine does not run this request: submit it again")

    def result(self) -> GenerationResult:
        """Runs the engine until the row has ended.

        Raises:
          FloatingPointError: its logits were NaN.
        """
        collections.deque(self, maxlen=0)
        assert self.finish_reason is not None
        tokens, logprobs = np.array(self.tokens, np.int32), np.array(self.logprobs, np.float32)
        return GenerationResult(tokens, logprobs, self.finish_reason)

    def add_tokens(self, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Takes new tokens up to the one that ends the row."""
        request = self.request
        for token, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True):
            try:
                decode.check_logprobs(request.options, np.array(logprob))
            except FloatingPointError as e:
                self.finish_reason, self.error = "error", e
                return
            self.tokens.append(token)
            self.logprobs.append(logprob)
            completed = False
            if request.stop_table is not None:
                self.stop_state, completed = stop_automaton.advance_stop_state(
                    request.stop_table, self.stop_state, token
                )
            if token in request.eos:
                self.finish_reason = "eos"
            elif completed:
                self.finish_reason = "stop"
            elif len(self.tokens) == self.row.max_new_tokens:
                self.finish_reason = "length"
            if self.finished:
                return
