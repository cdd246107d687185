"""The quickstart's text: Python's language reference, which every Python installation contains."""

from __future__ import annotations

from pydoc_data.topics import topics


def read_sample_text() -> str:
    """Returns the pages of `pydoc_data.topics`, sorted by name; paragraphs end in blank lines.

    Pages quote one another at length, so each paragraph appears only once: no held-out paragraph
    has been trained on.
    """
    paragraphs = (p for name in sorted(topics) for p in topics[name].strip().split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs)) + "\n"
