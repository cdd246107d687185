"""Hugging Face checkpoints to Orbax and back."""

from .to_hf import export
from .to_orbax import convert

__all__ = ["convert", "export"]
