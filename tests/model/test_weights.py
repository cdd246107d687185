"""The table of weights: counts, names, shapes and initial scales."""

from __future__ import annotations

import dataclasses
import math

import pytest

from btlm_jax import BTLMConfig
from btlm_jax.model import weights
from support import golden

B3 = BTLMConfig.preset("btlm-3b-8k")


def test_released_model_has_its_published_parameter_count():
    assert weights.count_parameters(B3) == 2_646_255_744
    names = [leaf.hf_name for leaf in weights.disk_leaves(B3)]
    assert len(names) == len(set(names)) == 451  # 452 keys with the slopes
    shapes = {leaf.hf_name: leaf.weight.hf_shape for leaf in weights.disk_leaves(B3)}
    assert shapes["transformer.h.31.mlp.c_proj.weight"] == (6826, 2560)
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (2560, 7680)
    assert shapes["transformer.h.0.attn.c_attn.bias"] == (7680,)


def test_names_and_shapes_are_those_of_the_original(case):
    names = {leaf.hf_name: leaf.weight.hf_shape for leaf in weights.disk_leaves(case.config)}
    expected = {k: v.shape for k, v in case.weights.items() if k != golden.SLOPES}
    assert names == expected


def test_init_scales_of_the_released_model():
    std = {w.hf_name: w.std for w in weights.weight_table(B3)}
    assert std["transformer.wte.weight"] == 0.073
    assert std["transformer.h.{layer}.attn.c_attn.weight"] == pytest.approx(0.0230846, rel=1e-5)
    for name in ("attn", "mlp"):
        key = f"transformer.h.{{layer}}.{name}.c_proj.weight"
        assert std[key] == pytest.approx(0.00288558, rel=1e-5)
    untied = weights.weights_by_path(dataclasses.replace(B3, tie_word_embeddings=False))
    assert untied[("lm_head",)].std == pytest.approx(0.0230846, rel=1e-5)


def test_init_scales_under_completep():
    """Out-projections start like other kernels, without 1 / sqrt(2 L); nothing else changes."""
    deep = weights.weights_by_path(dataclasses.replace(B3, completep_base_layers=2))
    for w in weights.weight_table(B3):
        std = w.std * math.sqrt(64) if w.path[-2:] == ("c_proj", "kernel") else w.std
        assert deep[w.path] == dataclasses.replace(w, std=pytest.approx(std, rel=1e-12))
