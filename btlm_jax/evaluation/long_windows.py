"""Windows of many tokens out of a stream of documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from btlm_jax.evaluation.windows import TokenizedDocument


class Window(NamedTuple):
    """T tokens that are read, and the next of each."""

    inputs: np.ndarray  # int32 [T]
    targets: np.ndarray  # int32 [T]
    group: int  # windows of one document, or of one stream, share it


class LongWindows:
    """Whole windows of a stream of documents, each read once and none kept.

    A document is its EOS and its tokens, as in `windows.cut`, cut into as many windows of T as it
    has; what is left over is not read. Iterating yields every `Window`, once.

    Args:
      documents: in order.
      prefix: the token that each starts after: EOS.
      length: T.
      most: windows to stop after.
      each: windows of a document, at most, from its beginning.
      concatenate: instead, cut one stream of all documents, each after its EOS, as training does.
        Its windows are neighbours, and so one group.

    Attributes:
      length, most, each: as given.
      short: documents of fewer than T tokens, which were left out so far.

    Raises:
      ValueError: T or `most` out of range, or no window in all the documents.
    """

    def __init__(
        self,
        documents: Iterable[TokenizedDocument],
        prefix: int,
        length: int,
        *,
        most: int | None = None,
        each: int | None = None,
        concatenate: bool = False,
    ) -> None:
        for name, value, least in (
            ("length", length, 2),
            ("windows", most, 1),
            ("windows per document", each, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}: found {value}, expected at least {least}")
        self.length, self.most, self.each, self.short = length, most, each, 0
        self._longest = self._tokens = 0
        cut = self._joined if concatenate else self._apart
        windows = itertools.islice(cut(documents, prefix), most)
        first = next(windows, None)
        if first is None:
            how = "give longer ones, or a shorter length"
            if not concatenate and self._tokens >= length:
                how += ", or concatenate them (--concatenate)"
            raise ValueError(
                f"length: found {length} tokens and documents of at most {self._longest}, "
                f"{self._tokens} in all: {how}"
            )
        self._windows = itertools.chain([first], windows)

    def __iter__(self) -> Iterator[Window]:
        return self._windows

    def _apart(self, documents: Iterable[TokenizedDocument], prefix: int) -> Iterator[Window]:
        for group, document in enumerate(documents):
            n = self._seen(document)
            tokens = np.concatenate([[prefix], document.ids]).astype(np.int32)
            self.short += n < self.length
            starts = range(0, n - self.length + 1, self.length)
            yield from (self._at(tokens, start, group) for start in starts[: self.each])

    def _joined(self, documents: Iterable[TokenizedDocument], prefix: int) -> Iterator[Window]:
        tokens = np.zeros(0, np.int32)
        for document in documents:
            self._seen(document)
            tokens = np.concatenate([tokens, [prefix], document.ids]).astype(np.int32)
            whole = (len(tokens) - 1) // self.length * self.length
            for start in range(0, whole, self.length):
                yield self._at(tokens, start, 0)
            tokens = tokens[whole:]

    def _seen(self, document: TokenizedDocument) -> int:
        n = len(document.ids)
        self._longest, self._tokens = max(self._longest, n), self._tokens + n
        return n

    def _at(self, tokens: np.ndarray, start: int, group: int) -> Window:
        end = start + self.length
        return Window(tokens[start:end], tokens[start + 1 : end + 1], group)
