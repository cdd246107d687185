"""CompleteP: against float64, its cost, and folding it into the weights."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btlm_jax import BTLM, BTLMConfig, fold_completep, make_mesh, next_token_loss
from support import golden, reference_numpy
from support.golden import max_error, random_weights


def completep_model(**changes):
    """Returns (config, random weights, ids); the factor (2/3)**0.75 is exact in no dtype."""
    config = dict(n_layer=3, completep_base_layers=2, completep_alpha=0.75) | changes
    c, rng = dataclasses.replace(BTLMConfig.preset("tiny"), **config), np.random.default_rng(0)
    return c, random_weights(c, rng), rng.integers(0, c.vocab_size, (2, 12))


def test_completep_logits_and_gradients_equal_float64():
    """Gradients by central differences, in a random direction for every array."""
    c, params, ids = completep_model()
    model, raw, named = BTLM(c), golden.reference_config(c), golden.by_hf_name(c, params)
    wide = {k: v.astype(np.float64) for k, v in named.items()}

    def loss(changed):
        logits = reference_numpy.forward(wide | changed, raw, ids)["logits"]
        return reference_numpy.cross_entropy(logits, ids)

    cache = model.init_cache(params, 2, 12)
    _, cache = model.apply(params, ids[:, :9], cache=cache)
    last, _ = model.apply(params, ids[:, 9:], cache=cache)
    expected = reference_numpy.forward(named, raw, ids)["logits"]
    for got, wanted in ((model.apply(params, ids), expected), (last, expected[:, 9:])):
        # Measured 2.2e-7.
        assert max_error(got, wanted) < 1e-5 * np.abs(expected).max()

    value, grads = jax.jit(jax.value_and_grad(lambda p: next_token_loss(model, p, ids).mean))(
        params
    )
    assert abs(float(value) - loss({})) < 1e-5
    rng, step = np.random.default_rng(1), 1e-6
    for name, got in golden.by_hf_name(c, grads).items():
        u = rng.normal(size=got.shape)
        up, down = (loss({name: wide[name] + sign * step * u}) for sign in (1, -1))
        error = abs((got * u).sum() - (up - down) / (2 * step))
        assert error < 2e-5 * np.linalg.norm(got), name  # measured 2e-6


def test_completep_is_two_multiplications_per_layer():
    """There are none if the factor is 1: then the program is that without CompleteP."""

    def program(**config):
        c, params, ids = completep_model(**config)
        text = str(jax.make_jaxpr(lambda p: BTLM(c).apply(p, ids))(params))
        return re.sub("0x[0-9a-f]+", "", text)

    off = program(completep_base_layers=None, completep_alpha=1.0)
    assert program(completep_base_layers=3) == off
    assert program().count(" = mul ") == off.count(" = mul ") + 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_folding_completep_changes_no_logits(dtype):
    """Exactly if the factor is a power of two, else to rounding (measured 2e-7, 4e-3)."""
    for base_layers, tolerance in ((3, 0.0), (4, 1e-5 if dtype == jnp.float32 else 0.05)):
        c, params, ids = completep_model(
            n_layer=6, completep_base_layers=base_layers, completep_alpha=1.0
        )
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        plain, folded = fold_completep(c, params)
        assert plain == dataclasses.replace(c, completep_base_layers=None)
        assert {str(x.dtype) for x in jax.tree.leaves(folded)} == {jnp.dtype(dtype).name}
        expected = BTLM(c, compute_dtype=dtype).apply(params, ids)
        got = BTLM(plain, compute_dtype=dtype).apply(folded, ids)
        assert max_error(got, expected) <= tolerance * np.abs(expected).max()
    again, unchanged = fold_completep(plain, folded)
    assert again == plain
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, folded, unchanged))


def test_completep_can_be_folded_on_a_mesh():
    c, _, ids = completep_model(
        vocab_size=509, n_layer=2, completep_base_layers=1, completep_alpha=1.0
    )
    model, mesh = BTLM(c), make_mesh(fsdp=2, tensor=4)
    many = model.init(jax.random.key(0), mesh=mesh)
    got = model.apply(many, ids)
    assert max_error(got, model.apply(model.init(jax.random.key(0)), ids)) < 1e-5
    plain, folded = fold_completep(c, many)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, many, folded))
    np.testing.assert_array_equal(BTLM(plain).apply(folded, ids), got)
