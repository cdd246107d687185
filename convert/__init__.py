"""Conversion between Hugging Face and Orbax checkpoints, verification, and loading onto a mesh."""

from btlm_jax.convert.to_hf import export
from btlm_jax.convert.to_mesh import load_hf
from btlm_jax.convert.to_orbax import convert
from btlm_jax.convert.to_quantized import quantize
from btlm_jax.convert.verify import verify

__all__ = ["convert", "export", "load_hf", "quantize", "verify"]
