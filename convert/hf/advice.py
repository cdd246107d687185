"""Phrases that the error messages about Hugging Face files share."""

from __future__ import annotations

from collections.abc import Sequence

REDOWNLOAD = "Fix: download the file again."
RESAVE = "Fix: re-save it with torch.save(model.state_dict(), path), or convert it to safetensors."
UNQUANTIZED = "Fix: use the model in float32, bfloat16 or float16 (cast or dequantize it)."


def join_first(items: Sequence[str], limit: int = 8) -> str:
    """Joins up to `limit` items with commas, and adds the number of the others."""
    omitted = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {omitted} more" if omitted > 0 else "")
