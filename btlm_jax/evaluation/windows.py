"""Documents cut into windows in which every token is predicted exactly once.

The windows are those of lm-evaluation-harness (`get_rolling_token_windows` of its
`loglikelihood_rolling`). A document starts after a prefix token, its EOS, so that its first token
is predicted too. The first window reads N tokens and predicts N; every later one ends M tokens (the
stride) further on and predicts those, each after at least N - M + 1 others; the last ends with the
document and still reads N. M = N is what the harness does; M = N // 2 gives tokens more to go by,
for twice the work, as in Hugging Face's guide to the perplexity of fixed-length models (which has
no prefix, and leaves the first token out).
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from btlm_jax.config import BTLMConfig
from btlm_jax.model import alibi
from btlm_jax.model.chunked_loss import IGNORE

logger = logging.getLogger(__name__)


class TokenizedDocument(NamedTuple):
    """A text to evaluate."""

    ids: np.ndarray  # integers [n], without any EOS
    text_bytes: int  # of the text, in UTF-8


class Window(NamedTuple):
    """What is read at once."""

    inputs: np.ndarray  # int32 [t]
    targets: np.ndarray  # int32 [t], what follows; `IGNORE` where another window predicts it


class Batch(NamedTuple):
    """Windows filled up to one shape."""

    inputs: np.ndarray  # int32 [B, T]
    targets: np.ndarray  # int32 [B, T], `IGNORE` in the filling
    length: int  # of the longest window


@dataclasses.dataclass(frozen=True)
class Windows:
    """Documents and how to cut them; made by `cut`. Iterating yields every `Window`.

    Attributes:
      documents: in order.
      prefix: the token that each starts after.
      length: tokens that a window reads, at most.
      stride: tokens that a window predicts, but for the first of a document.
    """

    documents: tuple[TokenizedDocument, ...]
    prefix: int
    length: int
    stride: int

    def __iter__(self) -> Iterator[Window]:
        return itertools.chain.from_iterable(map(self._of, self.documents))

    def __len__(self) -> int:
        return sum(len(self._ends(document)) for document in self.documents)

    @property
    def tokens(self) -> int:
        """That are predicted: all of the documents."""
        return sum(len(document.ids) for document in self.documents)

    @property
    def text_bytes(self) -> int:
        """Of all documents."""
        return sum(document.text_bytes for document in self.documents)

    def batches(self, rows: int, width: int, config: BTLMConfig) -> Iterator[Batch]:
        """Yields all windows, `rows` at a time, filled up to `width` tokens.

        With an ALiBi that depends on the length, windows of one length only share a batch.
        """
        depends = alibi.scale_varies(config.alibi_scaling, self.length)
        for _, alike in itertools.groupby(self, lambda w: len(w.inputs) if depends else None):
            while some := list(itertools.islice(alike, rows)):
                inputs = np.zeros((rows, width), np.int32)
                targets = np.full((rows, width), IGNORE, np.int32)
                for i, window in enumerate(some):
                    inputs[i, : len(window.inputs)] = window.inputs
                    targets[i, : len(window.targets)] = window.targets
                yield Batch(inputs, targets, max(len(window.inputs) for window in some))

    def _ends(self, document: TokenizedDocument) -> Sequence[int]:
        """How many tokens of the document have been predicted after each of its windows."""
        n = len(document.ids)
        return [*range(self.length, n, self.stride), n] if n else []

    def _of(self, document: TokenizedDocument) -> Iterator[Window]:
        tokens = np.concatenate([[self.prefix], document.ids]).astype(np.int32)
        done = 0
        for end in self._ends(document):
            start = max(0, end - self.length)
            targets = tokens[start + 1 : end + 1].copy()
            targets[: done - start] = IGNORE
            yield Window(tokens[start:end], targets)
            done = end


def cut(
    config: BTLMConfig,
    documents: Sequence[TokenizedDocument],
    prefix: int,
    *,
    length: int | None = None,
    stride: int | None = None,
) -> Windows:
    """The windows of documents, for a model.

    Args:
      config: the model.
      documents: their ids are of its vocabulary.
      prefix: the token that documents start after, as they did in training: EOS.
      length: tokens that a window reads; default the trained context, or the longest document if
        that is shorter.
      stride: tokens by which windows move on; default `length`.

    Raises:
      ValueError: fewer than two tokens, length < 2, more than the learned positions, or a stride
        that is not from 1 to `length`.
    """
    total = sum(len(document.ids) for document in documents)
    if total < 2:
        raise ValueError(f"the text: found {total} tokens, expected at least 2: give a longer one")
    if length is not None and length < 2:
        raise ValueError(f"length: found {length}, expected at least 2 tokens")
    if length is not None and length > config.n_positions:
        if not config.alibi:
            raise ValueError(
                f"length: found {length}, expected at most the model's {config.n_positions} "
                "learned positions"
            )
        if config.alibi_scaling is None:
            logger.warning(
                "windows of %d tokens exceed the trained context of %d and alibi_scaling is not "
                "set: quality falls off beyond it", length, config.n_positions,
            )  # fmt: skip
    longest = max(2, *(len(document.ids) for document in documents))
    # No longer than a document fills: the rest would be computed and thrown away.
    used = min(longest, config.n_positions if length is None else length)
    if stride is not None and not 1 <= stride <= (length or used):
        raise ValueError(
            f"stride: found {stride}, expected from 1 to the length of a window, {length or used}: "
            "beyond it tokens would be left out"
        )
    return Windows(tuple(documents), prefix, used, min(stride or used, used))
