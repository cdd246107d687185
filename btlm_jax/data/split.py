"""Which part of the text is held out: a function of the text itself, so always the same."""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class SplitPart(NamedTuple):
    """One of the two parts of a split text; both together are all of it, in order.

    Whole documents, chosen by a hash of their text: whatever else is in the input, a document stays
    on its side, and so do its copies. A larger fraction holds out more documents and the same ones.
    An input that is a single document is cut instead, and its end held out.

    Attributes:
      fraction: to hold out, in (0, 1).
      held_out: whether this is the held-out part or that to train on.
      one_document: whether to cut each document rather than to choose whole ones.
    """

    fraction: float
    held_out: bool
    one_document: bool

    def select(self, text: str) -> str:
        """What of a document is in this part; "" if nothing is."""
        if self.one_document:
            start = len(text) - round(len(text) * self.fraction)
            return text[start:] if self.held_out else text[:start]
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        chosen = int.from_bytes(digest, "big") < self.fraction * 2**64
        return text if chosen == self.held_out else ""

    def empty_message(self, documents: int) -> str:
        """What to tell the user if no document is in this part.

        Args:
          documents: how many there are.
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


def check_fraction(fraction: float) -> None:
    """Raises ValueError unless the fraction leaves something on both sides."""
    if not 0 < fraction < 1:
        raise ValueError(
            f"held_out: found {fraction}, expected more than 0 and less than 1, such as 0.1"
        )
