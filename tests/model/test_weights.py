"""The table of weights, and what follows from it."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

from btlm_jax import BTLM, BTLMConfig, make_mesh
from btlm_jax.model import weights
from btlm_jax.model.params import check_params, flatten_tree, init_params, unflatten_tree
from support import golden

B3 = BTLMConfig.preset("btlm-3b-8k")


def test_released_model_has_its_parameters():
    assert weights.count_parameters(B3) == 2_646_255_744
    names = [leaf.hf_name for leaf in weights.disk_leaves(B3)]
    assert len(names) == len(set(names)) == 451  # 452 keys with the slopes
    shapes = {leaf.hf_name: leaf.weight.hf_shape for leaf in weights.disk_leaves(B3)}
    assert shapes["transformer.h.31.mlp.c_proj.weight"] == (6826, 2560)
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (2560, 7680)
    assert shapes["transformer.h.0.attn.c_attn.bias"] == (7680,)


def test_names_and_shapes_are_the_originals(case):
    got = {leaf.hf_name: leaf.weight.hf_shape for leaf in weights.disk_leaves(case.config)}
    expected = {k: v.shape for k, v in case.weights.items() if k != golden.SLOPES}
    assert got == expected


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
    """Out-projections as every other kernel: no 1 / sqrt(2 L). Nothing else changes."""
    deep = weights.weights_by_path(dataclasses.replace(B3, completep_base_layers=2))
    for w in weights.weight_table(B3):
        std = w.std * math.sqrt(64) if w.path[-2:] == ("c_proj", "kernel") else w.std
        assert deep[w.path] == dataclasses.replace(w, std=pytest.approx(std, rel=1e-12))


@pytest.mark.parametrize("base_layers", [None, 1])
def test_init_draws_what_the_table_says(base_layers):
    c = dataclasses.replace(
        BTLMConfig.preset("tiny"),
        tie_word_embeddings=False,
        completep_base_layers=base_layers,
    )
    flat = flatten_tree(BTLM(c).init(jax.random.key(0)))
    for w in weights.weight_table(c):
        x = np.asarray(flat[w.path], np.float64)
        assert x.shape == weights.stacked_shape(w, c)
        if w.std == 0:
            assert np.all(x == w.mean)
        else:  # 5 sigma of the sample statistics of a normal
            assert abs(x.mean()) < 5 * w.std / math.sqrt(x.size)
            assert abs(x.std() / w.std - 1) < 5 / math.sqrt(2 * x.size)
    # Independent draws: no two arrays, nor two layers, repeat each other.
    kernel = np.asarray(flat[("blocks", "mlp", "c_fc", "kernel")])
    gate = np.asarray(flat[("blocks", "mlp", "c_fc2", "kernel")])
    for a, b in ((kernel, gate), (kernel[0], kernel[1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.05


def test_padding_changes_no_value():
    c = BTLMConfig.preset("tiny")
    plain = flatten_tree(init_params(jax.random.key(1), c))
    padded = flatten_tree(init_params(jax.random.key(1), c, padding={"mlp": 192, "vocab": 640}))
    for path, x in plain.items():
        inner = tuple(slice(n) for n in x.shape)
        np.testing.assert_array_equal(padded[path][inner], x)
        rest = np.array(padded[path])
        rest[inner] = 0
        assert not rest.any() or path[-1] == "scale"


def test_flatten_inverts():
    tree = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert flatten_tree(tree) == {("a",): 1, ("b", "c"): 2, ("b", "d", "e"): 3}
    assert unflatten_tree(flatten_tree(tree)) == tree


def test_check_lists_everything():
    c = BTLMConfig.preset("tiny")
    params = init_params(jax.random.key(0), c)
    assert check_params(params, c) == {}
    params["extra"] = params.pop("ln_f")
    params["blocks"]["attn"]["c_proj"]["bias"] = np.zeros((2, 65))
    with pytest.raises(ValueError) as error:
        check_params(params, c)
    for part in ("missing: ln_f/scale", "missing: ln_f/bias", "unexpected: extra/scale", "(2, 65)"):
        assert part in str(error.value)


def test_truncated_init_is_the_original_trainings():
    """Within 2 sigma of the untruncated normal, whose variance shrinks: 0.7737 of it at 2."""
    model = BTLM(BTLMConfig.preset("tiny"))
    flat = flatten_tree(model.init(jax.random.key(0), truncation=2.0))
    for w in weights.weight_table(model.config):
        x = np.asarray(flat[w.path], np.float64)
        assert np.abs(x - w.mean).max() <= 2 * w.std * (1 + 1e-6)
        if w.std:
            assert abs(x.std() / w.std - math.sqrt(0.773741)) < 5 / math.sqrt(2 * x.size)
    many = model.init(jax.random.key(0), mesh=make_mesh(fsdp=4, tensor=2), truncation=2.0)
    for path, x in flatten_tree(many).items():
        np.testing.assert_array_equal(np.asarray(x), flat[path])
