"""Documents cut into windows in which every token is predicted exactly once.

The windows are those of lm-evaluation-harness (`get_rolling_token_windows` of its
`loglikelihood_rolling`). A document starts after a prefix token, its EOS, so that its first token
is predicted too. The first window reads N tokens and predicts N. Every later window ends M tokens
(the stride) further on and predicts those M, each after at least N - M + 1 others. The last window
ends with the document and still reads N. M = N is the harness's choice; M = N // 2 gives tokens
more context, for twice the work, as in Hugging Face's guide to the perplexity of fixed-length
models (which has no prefix, and leaves the first token out).

Joined documents are cut as one long document, with the prefix token between them too. It gives
context but is not predicted, so that both readings measure the same tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from btlm_jax.config import BTLMConfig
from btlm_jax.evaluation.documents import TokenizedDocument
from btlm_jax.model import alibi
from btlm_jax.model.chunked_loss import IGNORE
from btlm_jax.model.positions import check_length

logger = logging.getLogger(__name__)


class RollingWindow(NamedTuple):
    """Tokens that are read in one forward pass, and the tokens to predict."""

    inputs: np.ndarray  # int32 [t]
    targets: np.ndarray  # int32 [t], the next tokens; `IGNORE` where another window predicts them


class WindowBatch(NamedTuple):
    """Windows padded to one shape."""

    inputs: np.ndarray  # int32 [B, T]
    targets: np.ndarray  # int32 [B, T], `IGNORE` in the padding
    length: int  # of the longest window


@dataclasses.dataclass(frozen=True)
class RollingWindows:
    """Documents and how to cut them; see `cut_rolling_windows`. Iterates over `RollingWindow`s.

    Attributes:
      documents: the documents, in order; a single one if they are joined.
      prefix: the token that precedes each document.
      length: maximum number of tokens that a window reads.
      stride: number of tokens that a window predicts, except the first window of a document.
      joined: whether the prefix also stands between documents, and is not predicted there.
    """

    documents: tuple[TokenizedDocument, ...]
    prefix: int
    length: int
    stride: int
    joined: bool = False

    def __iter__(self) -> Iterator[RollingWindow]:
        return itertools.chain.from_iterable(map(self._document_windows, self.documents))

    def __len__(self) -> int:
        return sum(len(self._window_ends(document)) for document in self.documents)

    @property
    def tokens(self) -> int:
        """Number of predicted tokens: all tokens of the documents."""
        return sum(len(x.ids) - self._num_separators(x) for x in self.documents)

    @property
    def text_bytes(self) -> int:
        """Bytes of all documents' text, in UTF-8."""
        return sum(document.text_bytes for document in self.documents)

    def batches(self, rows: int, width: int, config: BTLMConfig) -> Iterator[WindowBatch]:
        """Yields all windows, `rows` at a time, padded to `width` tokens.

        If ALiBi depends on the length, only windows of equal length share a batch.
        """
        by_length = alibi.scale_varies(config.alibi_scaling, self.length)
        for _, group in itertools.groupby(self, lambda w: len(w.inputs) if by_length else None):
            while windows := list(itertools.islice(group, rows)):
                inputs = np.zeros((rows, width), np.int32)
                targets = np.full((rows, width), IGNORE, np.int32)
                for i, window in enumerate(windows):
                    inputs[i, : len(window.inputs)] = window.inputs
                    targets[i, : len(window.targets)] = window.targets
                yield WindowBatch(inputs, targets, max(len(window.inputs) for window in windows))

    def _num_separators(self, document: TokenizedDocument) -> int:
        return int(np.sum(document.ids == self.prefix)) if self.joined else 0

    def _window_ends(self, document: TokenizedDocument) -> Sequence[int]:
        """Returns how many tokens of the document are predicted by the end of each window."""
        n = len(document.ids)
        return [*range(self.length, n, self.stride), n] if n else []

    def _document_windows(self, document: TokenizedDocument) -> Iterator[RollingWindow]:
        ids, predicted = document.ids, 0
        for end in self._window_ends(document):
            start = max(0, end - self.length)
            # Slices of the ids, because a copy with the prefix would double a long document.
            inputs = ids[max(0, start - 1) : end - 1].astype(np.int32)
            if not start:
                inputs = np.concatenate([np.array([self.prefix], np.int32), inputs])
            targets = ids[start:end].astype(np.int32)
            targets[: predicted - start] = IGNORE
            if self.joined:
                targets[targets == self.prefix] = IGNORE
            yield RollingWindow(inputs, targets)
            predicted = end


def cut_rolling_windows(
    config: BTLMConfig,
    documents: Sequence[TokenizedDocument],
    prefix: int,
    *,
    length: int | None = None,
    stride: int | None = None,
    joined: bool = False,
) -> RollingWindows:
    """Cuts documents into windows for a model.

    Args:
      config: configuration of the model.
      documents: documents with ids of the model's vocabulary.
      prefix: the token that precedes documents, as in training: EOS.
      length: tokens per window; default the trained context, or the longest document if that is
        shorter.
      stride: distance between the ends of windows, in tokens; default `length`.
      joined: read the documents as one, each after the prefix, as in training without
        `data.mask_documents`.

    Raises:
      ValueError: fewer than two tokens, length < 2, more than the learned positions, or a stride
        that is not from 1 to `length`.
    """
    total = sum(len(document.ids) for document in documents)
    if total < 2:
        raise ValueError(f"the text: found {total} tokens, expected at least 2: give a longer one")
    if joined:
        documents = [_join(documents, prefix)]
    if length is not None and length < 2:
        raise ValueError(f"length: found {length}, expected at least 2 tokens")
    if length is not None:
        check_length(config, length, "length", "shorten the windows")
    longest = max(2, *(len(document.ids) for document in documents))
    # Not longer than the longest document: the rest would be padding.
    window_length = min(longest, config.n_positions if length is None else length)
    max_stride = length or window_length
    if stride is not None and not 1 <= stride <= max_stride:
        raise ValueError(
            f"stride: found {stride}, expected from 1 to the length of a window, {max_stride}: a "
            "larger stride would leave tokens out"
        )
    stride = min(stride or window_length, window_length)
    return RollingWindows(tuple(documents), prefix, window_length, stride, joined)


def _join(documents: Sequence[TokenizedDocument], separator: int) -> TokenizedDocument:
    """Returns one document: the texts, with the separator between them."""
    first, *others = (np.asarray(document.ids, np.int32) for document in documents)
    parts = [first, *(part for ids in others for part in (np.array([separator], np.int32), ids))]
    return TokenizedDocument(np.concatenate(parts), sum(x.text_bytes for x in documents))
