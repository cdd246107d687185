"""The split into training and held-out text: a function of the text alone, so always the same."""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class SplitPart(NamedTuple):
    """One of the two parts of a split text; together they hold all of it, in order.

    Whole documents are assigned by a hash of their text: whatever else the input contains, a
    document stays in its part, and so do its copies. A larger fraction holds out the same documents
    and more. An input that is a single document is cut instead, and its end is held out.

    Attributes:
      fraction: fraction of the text to hold out, in (0, 1).
      held_out: whether this is the held-out part, rather than the training part.
      one_document: whether to cut each document, rather than to assign whole documents.
    """

    fraction: float
    held_out: bool
    one_document: bool

    def select(self, text: str) -> str:
        """Returns the portion of a document that belongs to this part, "" if there is none."""
        if self.one_document:
            return text[self.portion(len(text))]
        digest = new_document_hash(text.encode())
        return text if self.has_document(digest) else ""

    def portion(self, characters: int) -> slice:
        """Returns the portion of a document of that many characters, for `one_document`."""
        start = characters - round(characters * self.fraction)
        return slice(start, characters) if self.held_out else slice(0, start)

    def has_document(self, digest: hashlib.blake2b) -> bool:
        """Returns whether a document belongs to this part, from the `new_document_hash` of it."""
        is_held_out = int.from_bytes(digest.digest(), "big") < self.fraction * 2**64
        return is_held_out == self.held_out

    def empty_message(self, documents: int) -> str:
        """Returns the error message for a part that contains none of the input's documents.

        Args:
          documents: number of documents in the input.
        """
        fix = (
            "give more text"
            if self.one_document
            else "join them into one .txt file, whose end is then held out"
        )
        return (
            f"held_out: found {self.fraction}, at which nothing of {documents} document(s) is "
            f"{'held out' if self.held_out else 'left to train on'}; pass another fraction, or "
            f"{fix}"
        )


def new_document_hash(data: bytes = b"") -> hashlib.blake2b:
    """Returns the hash that assigns documents to parts: of their text in UTF-8."""
    return hashlib.blake2b(data, digest_size=8)


def check_fraction(fraction: float) -> None:
    """Raises ValueError unless the fraction leaves some text in both parts."""
    if not 0 < fraction < 1:
        raise ValueError(
            f"held_out: found {fraction}, expected more than 0 and less than 1, such as 0.1"
        )
