"""Models with random weights in any scheme, without the memory of their weights in fp32."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from btlm_jax.checkpoint import quantization, unstacked
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.config import BTLMConfig
from btlm_jax.model.btlm import BTLM
from btlm_jax.train.bench import measure


def make_random_model(preset: str, layers: int | None, scheme: str) -> tuple[BTLM, Any]:
    """Returns a model and random unstacked weights; quantized ones are drawn in packed form.

    Args:
      preset: preset of the model.
      layers: replaces the preset's number of layers, unless None.
      scheme: "float32", "bfloat16", "int8", "int4" or "int4:128".

    Raises:
      ValueError: the preset or scheme is unknown, or layers < 1.
    """
    config = BTLMConfig.preset(preset)
    if layers is not None:
        measure.require_positive(layers=layers)
        config = dataclasses.replace(config, n_layer=layers)
    floats = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
    quantize = None if scheme in floats else Quantization.parse(scheme)
    dtype = floats.get(scheme, floats["bfloat16"])
    packed = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    normal = (0.02 * np.random.default_rng(0).standard_normal(1 << 20)).astype(dtype)

    def read(leaf, index) -> np.ndarray:
        shape = [s.stop - s.start for s in index]
        if leaf.part in ("int8", "int4"):
            return np.resize(packed, shape).view(leaf.dtype)
        if leaf.part == "scales":
            return np.full(shape, 0.02 / (64 if leaf.dtype == "float32" else 4), leaf.dtype)
        return np.resize(normal, shape)

    dtypes = {leaf.path: dtype for leaf in quantization.stored_leaves(config, quantize)}
    params = unstacked.load_unstacked(config, read, dtypes, quantization=quantize)
    return BTLM(config, compute_dtype=dtype.name), params
