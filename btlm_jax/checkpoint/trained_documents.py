"""How a training run reads documents, as its checkpoints record it for evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

# "separate": each document is read alone, after EOS, as in training with `data.mask_documents`.
# "joined": documents follow each other in one stream, an EOS between them, as without it.
Reading = Literal["separate", "joined"]

KEY = "documents"  # of the record in a checkpoint's origin


class TrainedDocuments(NamedTuple):
    """How documents were read in training.

    Attributes:
      reading: separate or joined; None if not recorded, as in converted checkpoints.
      eos_id: the token before and after documents; None if not recorded.
      first_tokens: whether the first token of a separate document was predicted. Older versions
        left it out.
    """

    reading: Reading | None = None
    eos_id: int | None = None
    first_tokens: bool = True

    def describe(self, measured: Reading) -> str:
        """Returns how documents are measured, beside how they were trained, for reports."""
        if self.reading is None:
            trained = "how it was trained is not recorded"
        else:
            trained = "as trained" if measured == self.reading else f"trained {self.reading}"
            if not self.first_tokens:
                trained += ", by a version that did not train the first token of a document"
        return f"documents: {measured} ({trained})"


def describe(mask_documents: bool, eos_id: int) -> dict[str, Any]:
    """Returns the record of a run for the origin of its checkpoints."""
    return {KEY: {"reading": "separate" if mask_documents else "joined", "eos_id": eos_id}}


def read_trained_documents(origin: Mapping[str, Any]) -> TrainedDocuments:
    """Returns the record in a checkpoint's origin.

    Older versions recorded only the recipe, and did not predict the first tokens of documents when
    `data.mask_documents` was set.
    """
    if record := origin.get(KEY):
        try:
            return TrainedDocuments(record["reading"], record["eos_id"])
        except (TypeError, KeyError):
            raise ValueError(
                f"{KEY}: found {record!r} in the record of a run, expected reading and eos_id"
            ) from None
    masked = origin.get("recipe", {}).get("data", {}).get("mask_documents")
    if masked is None:
        return TrainedDocuments()
    return TrainedDocuments("separate" if masked else "joined", None, not masked)
