"""Optimizer steps on made-up gradients, and references for muP made of `optax.partition`."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from btlm_jax import BTLM, BTLMConfig
from btlm_jax.model import mup, weights
from btlm_jax.model.params import unflatten_tree
from support import golden as golden_lib

# One of every kind of weight, and awkward sizes; m = 10.
SMALL = dataclasses.replace(
    BTLMConfig.preset("tiny"),
    vocab_size=31,
    n_embd=24,
    n_head=2,
    n_inner=38,
    mup_width_scale=0.1,
    tie_word_embeddings=False,
)


MAKES = (mup.adamw, mup.lion, mup.muon)


@functools.cache
def start(config):
    return BTLM(config).init(jax.random.key(0))


def descend(params, i):
    """Returns gradients towards zero, with a disturbance that differs per entry and step."""

    def leaf(p):
        entry = jnp.arange(p.size, dtype=jnp.float32).reshape(p.shape)
        return p + 0.1 * jnp.cos(0.7 * entry + 1.3 * i)

    return jax.tree.map(leaf, params)


def shrink(params, i):
    """Returns gradients proportional to the weights, so that zeros have none."""
    return jax.tree.map(lambda p: p * (1.5 + jnp.cos(1.3 * i)), params)


def run(tx, params, steps, grads=descend):
    """Returns the weights after `steps` steps, and the optimizer's state."""

    def step(i, carry):
        params, state = carry
        updates, state = tx.update(grads(params, i), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(lambda p: jax.lax.fori_loop(0, steps, step, (p, tx.init(p))))(params)


def assert_equal(a, b, tolerance=0.0):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if tolerance:
            assert golden_lib.max_error(x, y) < tolerance
        else:
            np.testing.assert_array_equal(x, y)


def partition(config, make, kind=lambda w: w.role):
    """Returns a reference: optax.partition with the optimizer make(kind) for each kind."""
    kinds = {w.path: kind(w) for w in weights.weight_table(config)}
    return optax.partition({k: make(k) for k in set(kinds.values())}, unflatten_tree(kinds))


def is_matrix(w):
    """Returns whether Muon updates the weight."""
    return w.role == "hidden" and w.stacked
