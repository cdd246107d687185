"""The train step: the same on every mesh, and without a trace where gradients are not finite."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from btlm_jax import BTLM, BTLMConfig, make_mesh
from btlm_jax.model import mup
from btlm_jax.model.params import flatten_tree
from btlm_jax.train.recipe_build import build_config, build_optimizer
from btlm_jax.train.step import init_state, make_step
from support.runs import same_bits


def test_steps_agree_on_a_mesh():
    config = dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=97)
    model, tx = BTLM(config), mup.adamw(1e-2, config)
    step = make_step(model, tx)
    ids = np.random.default_rng(0).integers(0, 97, (8, 16))
    curves = []
    for mesh in (None, make_mesh(fsdp=4, tensor=2)):
        state = init_state(model.init(jax.random.key(0), mesh=mesh), tx)
        losses = []
        for _ in range(5):
            state, metrics = step(state, ids[None])
            losses.append(float(metrics["loss"]))
        curves.append(losses)
        adam = state.opt_state[1]
        for moment, param in zip(
            jax.tree.leaves(adam.mu), jax.tree.leaves(state.params), strict=True
        ):
            assert moment.sharding == param.sharding
    assert curves[0][-1] < curves[0][0] - 0.5
    # Adam divides small gradients by their size, so rounding grows a little with every step.
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


def test_dropout_is_refused():
    config = dataclasses.replace(BTLMConfig.preset("tiny"), attn_pdrop=0.1)
    with pytest.raises(ValueError, match="dropout is not implemented"):
        make_step(BTLM(config), mup.adamw(1e-2, config))


def test_gradients_that_are_not_finite_leave_the_state_unchanged(load_tiny):
    """The step is skipped and counted."""
    recipe = load_tiny()
    model = BTLM(build_config(recipe))
    params = model.init(jax.random.key(0))
    params["ln_f"]["scale"] = params["ln_f"]["scale"].at[0].set(np.inf)
    before = jax.tree.map(np.asarray, params)
    tx = build_optimizer(recipe, model.config)
    step, state = make_step(model, tx), init_state(params, tx)
    for i in (1, 2):
        state, metrics = step(state, np.ones((1, 8, 9), np.int32))
        assert (int(state.step), int(state.skipped), int(state.bad_in_a_row)) == (i, i, i)
        assert not np.isfinite(metrics["loss"])
    assert same_bits(flatten_tree(before), flatten_tree(state.params))
    assert all(not np.any(x) for x in jax.tree.leaves(state.opt_state))
