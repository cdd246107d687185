"""Phrases that the error messages about Hugging Face files share."""

from __future__ import annotations

REDOWNLOAD = "Fix: download the file again."
RESAVE = "Fix: re-save it with torch.save(model.state_dict(), path), or convert it to safetensors."
UNQUANTIZED = "Fix: use the model in float32, bfloat16 or float16 (cast or dequantize it)."
