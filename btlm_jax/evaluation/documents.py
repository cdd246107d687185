"""Documents to evaluate: text files of the command line to token ids."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from btlm_jax.data.encoder import Encoder, encode_documents
from btlm_jax.data.text_files import OnError, expand_inputs
from btlm_jax.data.text_reader import TextReader


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
      eos: the token that precedes documents; None takes the tokenizer's EOS.
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

    def documents(self, encoder: Encoder) -> Iterator[TokenizedDocument]:
        """Returns an iterator over the documents of all files, texts first.

        Raises:
          FileNotFoundError, ValueError: as in `expand_inputs`, or no files; while iterating, as in
            `TextReader.documents`.
        """
        inputs = {".txt": self.text, ".jsonl": self.jsonl}
        files = [
            file
            for kind, names in inputs.items()
            if names
            for file in expand_inputs(names, kind=kind, on_error=self.on_error)
        ]
        if not files:
            raise ValueError("found neither --text nor --jsonl, expected files to evaluate on")
        texts = TextReader(files, self.field, on_error=self.on_error).documents()
        encoded = encode_documents(texts, encoder, os.cpu_count() or 1)
        return (TokenizedDocument(ids[:-1], len(x.text.encode())) for x, ids in encoded)
