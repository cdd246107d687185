"""Hugging Face checkpoints to Orbax and back, checked, and straight onto a mesh."""

from .onto_mesh import load_hf
from .to_hf import export
from .to_orbax import convert
from .to_quantised import quantise
from .verify import verify

__all__ = ["convert", "export", "load_hf", "quantise", "verify"]
