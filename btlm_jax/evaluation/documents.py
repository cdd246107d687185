"""Documents to evaluate: text files of the command line to token ids."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from btlm_jax.checkpoint.trained_documents import TrainedDocuments
from btlm_jax.data.encoder import Encoder, encode_documents
from btlm_jax.data.text_files import OnError, expand_inputs
from btlm_jax.data.text_reader import TextReader

logger = logging.getLogger(__name__)


MAX_TOKENS = 128 << 20  # held in memory, in at most 1 GiB


class TokenizedDocument(NamedTuple):
    """A text to evaluate."""

    ids: np.ndarray  # integers [n], without any EOS
    text_bytes: int  # of the text, in UTF-8


@dataclasses.dataclass(frozen=True)
class TextInputs:
    """Text files, and how to read them.

    Attributes:
      text: files or globs; each file is a document.
      jsonl: files or globs of JSON lines; each line is a document.
      field: field of the JSON objects that holds the text.
      on_error: "raise", or "skip" records that cannot be used.
      eos: the token that precedes documents; None takes the one that training used, or else the
        tokenizer's EOS.
    """

    text: tuple[str, ...] = ()
    jsonl: tuple[str, ...] = ()
    field: str = "text"
    on_error: OnError = "raise"
    eos: str | None = None

    def encoder(self, checkpoint: str, vocab_size: int) -> Encoder:
        """Returns the tokenizer of a checkpoint.

        Raises:
          FileNotFoundError, ValueError: as in `Encoder`.
        """
        return Encoder(checkpoint, self.eos, vocab_size)

    def prefix(self, encoder: Encoder, trained: TrainedDocuments) -> int:
        """Returns the id of the token that precedes documents."""
        return encoder.eos_id if self.eos or trained.eos_id is None else trained.eos_id

    def documents(self, encoder: Encoder) -> Iterator[TokenizedDocument]:
        """Returns an iterator over the documents of all files, texts first.

        Raises:
          FileNotFoundError, ValueError: as in `expand_inputs`, or no files; while iterating, as in
            `TextReader.pieces`, or a document of more than `MAX_TOKENS`.
        """
        inputs = {"text": (".txt", self.text), "jsonl": (".jsonl", self.jsonl)}
        files = [
            file
            for argument, (kind, names) in inputs.items()
            if names
            for file in expand_inputs(names, kind=kind, on_error=self.on_error, argument=argument)
        ]
        if not files:
            raise ValueError("found neither --text nor --jsonl, expected files to evaluate on")
        if self.field != "text" and not self.jsonl:
            raise ValueError(
                f"--field: found {self.field!r} without --jsonl, whose objects have fields: leave "
                "it out, or name JSON lines"
            )
        reader = TextReader(files, self.field, encoder.cutter, on_error=self.on_error)
        return self._tokenize(reader, encoder)

    def _tokenize(self, reader: TextReader, encoder: Encoder) -> Iterator[TokenizedDocument]:
        pieces: list[np.ndarray] = []
        text_bytes = tokens = 0
        for piece, ids in encode_documents(reader.pieces(), encoder, os.cpu_count() or 1):
            pieces.append(ids)
            text_bytes += len(piece.text.encode())
            tokens += len(ids)
            _check_tokens(tokens)
            if piece.ends:
                if piece.kept:
                    yield TokenizedDocument(np.concatenate(pieces)[:-1], text_bytes)
                pieces, text_bytes, tokens = [], 0, 0
        if (total := reader.total).empty + total.skipped:
            logger.warning(
                "left out %d documents without text and %d records that cannot be used",
                total.empty, total.skipped,
            )  # fmt: skip


def hold_documents(documents: Iterable[TokenizedDocument]) -> list[TokenizedDocument]:
    """Returns all documents.

    Raises:
      ValueError: more than `MAX_TOKENS`.
    """
    held: list[TokenizedDocument] = []
    tokens = 0
    for document in documents:
        tokens += len(document.ids)
        _check_tokens(tokens)
        held.append(document)
    return held


def _check_tokens(tokens: int) -> None:
    if tokens > MAX_TOKENS:
        raise ValueError(
            f"the text: found more than {MAX_TOKENS:,} tokens, which are all held in memory: "
            "evaluate a part of it, such as its beginning (head -c 400M)"
        )
