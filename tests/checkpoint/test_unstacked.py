"""Unstacked weights; `test_to_quantized` compares them on every mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import btlm_jax as btlm
from btlm_jax import BTLMConfig
from btlm_jax.checkpoint import unstacked

CONFIG = dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=509)


def test_unstacked_weights_on_a_cpu_are_computed_in_their_own_dtype(tmp_path, monkeypatch):
    params = btlm.BTLM(CONFIG).init(jax.random.key(0))
    for dtype in ("float32", "bfloat16", "float16"):
        cast = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        btlm.save(tmp_path / dtype, CONFIG, cast)
    for stored, requested in (("float32", None), ("bfloat16", None), ("float16", "bfloat16")):
        model, loaded = btlm.load(tmp_path / stored, dtype=requested, unstacked=True)
        assert model.compute_dtype == model.runtime(loaded).dtype == jnp.dtype(requested or stored)
    # The dtype is checked before any weight is read.
    monkeypatch.setattr(unstacked, "load_unstacked", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="weights in float16: CPUs decode in bfloat16 or float32"):
        btlm.load(tmp_path / "float16", unstacked=True)
