"""Trees of parameters: initial values, padding, flattening, checks."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

from btlm_jax import BTLM, BTLMConfig, make_mesh
from btlm_jax.model import weights
from btlm_jax.model.params import (
    check_params,
    flatten_tree,
    init_params,
    is_unstacked,
    unflatten_tree,
    unstack_params,
)


@pytest.mark.parametrize("base_layers", [None, 1])
def test_init_has_the_mean_and_std_of_the_table(base_layers):
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


def test_padding_is_zero_and_changes_no_value():
    c = BTLMConfig.preset("tiny")
    plain = flatten_tree(init_params(jax.random.key(1), c))
    padded = flatten_tree(init_params(jax.random.key(1), c, padding={"mlp": 192, "vocab": 640}))
    for path, x in plain.items():
        inner = tuple(slice(n) for n in x.shape)
        np.testing.assert_array_equal(padded[path][inner], x)
        outside = np.array(padded[path])
        outside[inner] = 0
        assert not outside.any() or path[-1] == "scale"


def test_unflatten_inverts_flatten():
    tree = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert flatten_tree(tree) == {("a",): 1, ("b", "c"): 2, ("b", "d", "e"): 3}
    assert unflatten_tree(flatten_tree(tree)) == tree


def test_check_lists_all_problems():
    c = BTLMConfig.preset("tiny")
    params = init_params(jax.random.key(0), c)
    assert check_params(params, c) == {}
    params["extra"] = params.pop("ln_f")
    params["blocks"]["attn"]["c_proj"]["bias"] = np.zeros((2, 65))
    with pytest.raises(ValueError) as error:
        check_params(params, c)
    for problem in (
        "missing: ln_f/scale",
        "missing: ln_f/bias",
        "unexpected: extra/scale",
        "(2, 65)",
    ):
        assert problem in str(error.value)


def test_truncated_init_is_that_of_the_original_training():
    """All values are within 2 sigma, which reduces the variance to 0.7737 of the plain normal's."""
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


def test_unstacked_layers_are_slices_of_the_stacked_ones():
    c = BTLMConfig.preset("tiny")
    params = init_params(jax.random.key(0), c)
    unstacked = unstack_params(c, params)
    assert is_unstacked(unstacked) and not is_unstacked(params)
    assert check_params(unstacked, c) == {}
    flat = flatten_tree(params)
    for leaf in weights.disk_leaves(c):
        x = flat[leaf.weight.path]
        x = x if leaf.layer is None else x[leaf.layer]
        np.testing.assert_array_equal(flatten_tree(unstacked)[leaf.path], x)
