"""The quickstart's text: Python's language reference, found on every machine with Python."""

from __future__ import annotations

from pydoc_data.topics import topics


def read_sample_text() -> str:
    """The pages of `pydoc_data.topics`, in the order of their names; paragraphs end in blank lines.

    Pages quote one another at length, so each paragraph is kept once only: none that is held out
    has been trained on.
    """
    paragraphs = (p for name in sorted(topics) for p in topics[name].strip().split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs)) + "\n"
