"""Phrases that the error messages about Hugging Face files share."""

from __future__ import annotations

from collections.abc import Sequence

REDOWNLOAD = "Fix: download the file again."
RESAVE = "Fix: re-save it with torch.save(model.state_dict(), path), or convert it to safetensors."


def join_first(items: Sequence[str], limit: int = 20) -> str:
    """Joins up to `limit` items with commas, and adds the number of the others."""
    omitted = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {omitted} more" if omitted > 0 else "")
