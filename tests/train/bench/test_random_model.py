"""Models with random weights for the benchmarks of generation."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from btlm_jax.train.bench.random_model import make_random_model


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_weights_are_packed_and_give_finite_logits(scheme):
    model, params = make_random_model("tiny", 1, scheme)
    kernel = params["blocks"]["0"]["mlp"]["c_fc"]["kernel"]
    assert kernel.values.dtype == {"int8": "int8", "int4": "uint8"}[scheme]
    logits = model.apply(params, [[1, 2, 3]])
    assert bool(jnp.isfinite(logits).all())
