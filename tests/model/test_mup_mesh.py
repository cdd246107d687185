"""The muP optimizers on a mesh that pads the weights."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from btlm_jax import BTLM, BTLMConfig, make_mesh, next_token_loss
from btlm_jax.model import mup, weights
from btlm_jax.model.params import check_params, flatten_tree
from support import golden as golden_lib
from support.optimizer_steps import (
    MAKES,
    SMALL,
    run,
    shrink,
    start,
)

# Padded by the mesh below from 509 to 512 tokens and from 170 to 172 units.
PADDED = dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=509)


@functools.cache
def on_mesh():
    """Returns a mesh, weights on it, and a function that returns the gradients of a loss."""
    mesh = make_mesh(fsdp=2, tensor=4)
    model = BTLM(PADDED, compute_dtype=jnp.float32)
    ids = jax.random.randint(jax.random.key(1), (4, 16), 0, 509)
    grads = jax.jit(jax.grad(lambda params: next_token_loss(model, params, ids).mean))
    return mesh, model.init(jax.random.key(0), mesh=mesh), grads


def split(tree):
    """Yields (true entries, padding) for every array of a padded tree."""
    for w in weights.weight_table(PADDED):
        x = np.array(flatten_tree(tree)[w.path])
        true = tuple(slice(n) for n in weights.stacked_shape(w, PADDED))
        inside = x[true].copy()
        x[true] = 0.0
        yield inside, x


@pytest.mark.parametrize("make", MAKES)
def test_padding_stays_zero(make):
    mesh, params, grads = on_mesh()
    assert check_params(params, PADDED) == {"vocab": 512, "mlp": 172}
    tx = make(1e-2, PADDED)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        after, state = params, jax.jit(tx.init)(params)
        for _ in range(2):
            after, state = step(after, state, grads(after))
    for (inside, padding), (before, _) in zip(split(after), split(params), strict=True):
        assert not padding.any()
        assert np.abs(inside - before).mean() > 1e-4


@pytest.mark.parametrize("make", MAKES)
def test_sharded_steps_equal_those_of_a_single_device(make):
    mesh, params, _ = on_mesh()
    tx = make(1e-2, PADDED)
    with jax.set_mesh(mesh):
        sharded, _ = run(tx, params, 3, shrink)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, sharded, params))
    single, _ = run(tx, start(PADDED), 3, shrink)
    for w, (inside, padding) in zip(weights.weight_table(PADDED), split(sharded), strict=True):
        assert golden_lib.max_error(inside, flatten_tree(single)[w.path]) < 1e-6, w.name
        assert not padding.any()


def test_group_norms_leave_out_padding_and_masked_weights():
    mesh, params, grads = on_mesh()
    norms = jax.jit(lambda tree: mup.group_norms(tree, PADDED))
    with jax.set_mesh(mesh):
        tree = grads(params)
        got = norms(tree)
    squares = dict.fromkeys(("hidden", "embedding", "vector"), 0.0)
    for w, (inside, _) in zip(weights.weight_table(PADDED), split(tree), strict=True):
        squares[w.role] += np.square(inside.astype(np.float64)).sum()
    assert set(got) == set(squares)
    for role, norm in got.items():
        assert norm.dtype == jnp.float32 and norm.sharding.is_fully_replicated
        assert float(norm) == pytest.approx(np.sqrt(squares[role]), rel=1e-5)
    whole = np.sqrt(sum(float(n) ** 2 for n in got.values()))
    assert whole == pytest.approx(float(optax.tree.norm(jax.device_get(tree))), rel=1e-5)

    # bf16 gradients are summed in fp32; masked weights are left out.
    half = jax.tree.map(lambda x: np.ones(x.shape, jnp.bfloat16), start(SMALL))
    half["wte"] = optax.MaskedNode()
    got = mup.group_norms(half, SMALL)
    assert float(got["embedding"]) == 0.0
    hidden = sum(g.count for g in mup.param_groups(SMALL, 1.0, 0.1) if g.name == "hidden")
    assert float(got["hidden"]) == pytest.approx(np.sqrt(hidden), rel=1e-6)
