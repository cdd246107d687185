"""Full windows of many tokens, cut from a stream of documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from btlm_jax.evaluation.documents import TokenizedDocument


class LongWindow(NamedTuple):
    """T input tokens, and the token after each."""

    inputs: np.ndarray  # int32 [T]
    targets: np.ndarray  # int32 [T]
    group: int  # shared by the windows of one document, or of one stream


class LongWindows:
    """Full windows of a stream of documents, which are not kept in memory.

    A document is its EOS and its tokens, as in `cut_rolling_windows`, cut into as many full windows
    of T tokens as it has; the remainder is not read. Iterates over every `LongWindow` once.

    Args:
      documents: the documents, in order.
      prefix: the token that precedes each document: EOS.
      length: T.
      max_windows: maximum number of windows.
      max_per_document: maximum number of windows of a document, from its beginning.
      concatenate: instead, cut one stream of all documents, each after its EOS, as training does.
        Its windows are neighbors, and so form one group.

    Attributes:
      length, max_windows: as given.
      short_documents: number of documents of fewer than T tokens, left out so far.

    Raises:
      ValueError: T or a maximum out of range, or no window in all the documents.
    """

    def __init__(
        self,
        documents: Iterable[TokenizedDocument],
        prefix: int,
        length: int,
        *,
        max_windows: int | None = None,
        max_per_document: int | None = None,
        concatenate: bool = False,
    ) -> None:
        for name, value, minimum in (
            ("length", length, 2),
            ("windows", max_windows, 1),
            ("windows per document", max_per_document, 1),
        ):
            if value is not None and value < minimum:
                raise ValueError(f"{name}: found {value}, expected at least {minimum}")
        self.length, self.max_windows, self.short_documents = length, max_windows, 0
        self._max_per_document = max_per_document
        self._longest = self._tokens = 0
        cut = self._cut_stream if concatenate else self._cut_documents
        windows = itertools.islice(cut(documents, prefix), max_windows)
        first = next(windows, None)
        if first is None:
            fix = "give longer ones, or a shorter length"
            if not concatenate and self._tokens >= length:
                fix += ", or join them (--documents joined)"
            raise ValueError(
                f"length: found {length} tokens and documents of at most {self._longest}, "
                f"{self._tokens} in all: {fix}"
            )
        self._windows = itertools.chain([first], windows)

    def __iter__(self) -> Iterator[LongWindow]:
        return self._windows

    def _cut_documents(
        self, documents: Iterable[TokenizedDocument], prefix: int
    ) -> Iterator[LongWindow]:
        for group, document in enumerate(documents):
            n = self._count(document)
            tokens = np.concatenate([[prefix], document.ids], dtype=np.int32, casting="unsafe")
            self.short_documents += n < self.length
            starts = range(0, n - self.length + 1, self.length)[: self._max_per_document]
            yield from (self._window(tokens, start, group) for start in starts)

    def _cut_stream(
        self, documents: Iterable[TokenizedDocument], prefix: int
    ) -> Iterator[LongWindow]:
        tokens = np.zeros(0, np.int32)
        for document in documents:
            self._count(document)
            parts = (tokens, [prefix], document.ids)
            tokens = np.concatenate(parts, dtype=np.int32, casting="unsafe")
            end = (len(tokens) - 1) // self.length * self.length
            for start in range(0, end, self.length):
                yield self._window(tokens, start, 0)
            tokens = tokens[end:]

    def _count(self, document: TokenizedDocument) -> int:
        """Returns the document's number of tokens, and counts them for error messages."""
        n = len(document.ids)
        self._longest, self._tokens = max(self._longest, n), self._tokens + n
        return n

    def _window(self, tokens: np.ndarray, start: int, group: int) -> LongWindow:
        end = start + self.length
        return LongWindow(tokens[start:end], tokens[start + 1 : end + 1], group)
