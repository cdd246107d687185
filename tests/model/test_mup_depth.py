"""CompleteP in the optimizers, and how far steps move models of several depths."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

from btlm_jax import BTLM, BTLMConfig, next_token_loss
from btlm_jax.model import mup, weights
from btlm_jax.model.params import flatten_tree, unflatten_tree
from support import golden as golden_lib
from support import reference_numpy
from support.optimizer_steps import (
    MAKES,
    SMALL,
    assert_equal,
    descend,
    partition,
    run,
    start,
)

# Four times the base depth, where the vectors of the layers learn half as fast.
DEEP = dataclasses.replace(SMALL, n_layer=4, completep_base_layers=1, completep_alpha=0.5)


def test_completep_equals_a_partition():
    """With a large eps: 0.01 / (m * 4 ** alpha)."""
    scaled = {"hidden": 0.1 * 0.5, "layer vector": 0.5, "head": 0.1}

    def kind(w):
        if w.role == "hidden":
            return "hidden" if w.stacked else "head"
        return "layer vector" if w.role == "vector" and w.stacked else w.role

    def reference(kind):
        decay = {"hidden": 1.0, "head": 1.0, "embedding": 0.1}.get(kind, 0.0)
        rate = 1e-2 * scaled.get(kind, 1.0)
        return optax.adamw(rate, 0.9, 0.95, 0.01 * 0.1 * 0.5, weight_decay=decay)

    tx = mup.adamw(1e-2, DEEP, eps=0.01, decay="coupled", clip_norm=None)
    ours, _ = run(tx, start(DEEP), 10)
    assert_equal(ours, run(partition(DEEP, reference, kind), start(DEEP), 10)[0], 1e-6)

    groups = mup.param_groups(DEEP, 1e-2, 0.1, "coupled")
    assert sum(g.count for g in groups) == weights.count_parameters(DEEP)
    rates = {name: g.lr for g in groups for name in g.params}
    assert rates["transformer.h.3.ln_2.weight"] == pytest.approx(1e-2 * 0.5)
    assert rates["transformer.ln_f.weight"] == rates["transformer.wte.weight"] == 1e-2
    # "independent" undoes the depth as well.
    independent = mup.param_groups(DEEP, 1e-2, 0.1, "independent")
    assert independent[0].lr * independent[0].weight_decay == pytest.approx(1e-3)


@pytest.mark.parametrize("make", MAKES)
def test_completep_slows_the_weights_of_layers(make):
    """First steps are 4 ** (alpha - 1) times those at alpha = 1, under every optimizer."""
    options = dict(weight_decay=0.0, decay="coupled", clip_norm=None)
    slow, full = (
        make(1e-2, dataclasses.replace(DEEP, completep_alpha=alpha), **options)
        for alpha in (0.5, 1.0)
    )

    @jax.jit
    def updates(params):
        grads = descend(params, 0)
        return [tx.update(grads, tx.init(params), params)[0] for tx in (slow, full)]

    a, b = (flatten_tree(x) for x in updates(start(DEEP)))
    for w in weights.weight_table(DEEP):
        # Updates of about the learning rate; eps, which differs too, is 1e-8 of gradients of 0.1.
        assert golden_lib.max_error(a[w.path], (0.5 if w.stacked else 1.0) * b[w.path]) < 1e-7, (
            w.name
        )


def movement(n_layer, base_layers):
    """Returns how far 1 and 10 steps of AdamW move the residual stream, averaged over entries.

    The stream after the last layer is computed in float64 by the NumPy reference.
    """
    config = dataclasses.replace(
        BTLMConfig.preset("tiny"),
        vocab_size=64,
        n_layer=n_layer,
        mup_width_scale=1.0,
        initializer_range=0.1,
        mup_embeddings_scale=10.0,
        mup_output_alpha=1.0,
        completep_base_layers=base_layers,
    )
    model, ids = BTLM(config), np.random.default_rng(0).integers(64, size=(4, 32))
    tx = mup.adamw(2.0**-5, config, decay="coupled")

    @jax.jit
    def after(params, steps):
        def step(_, carry):
            params, state = carry
            grads = jax.grad(lambda p: next_token_loss(model, p, ids).mean)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, step, (params, tx.init(params)))[0]

    def stream(params):
        named = golden_lib.by_hf_name(config, params)
        return reference_numpy.forward(named, golden_lib.reference_config(config), ids)["streams"][
            -1
        ]

    # Drawn from the table without compiling `init`.
    rng = np.random.default_rng(1)
    draws = {
        w.path: (w.mean + w.std * rng.normal(size=weights.stacked_shape(w, config))).astype("f4")
        for w in weights.weight_table(config)
    }
    params = unflatten_tree(draws)
    before = stream(params)
    return [np.abs(stream(after(params, steps)) - before).mean() for steps in (1, 10)]


@pytest.mark.parametrize(
    "base_layers, lowest, highest",
    [(None, 0.6, 1.4), (2, -0.25, 0.25)],
    ids=["muP", "CompleteP"],
)
def test_depth_coordinate_check(base_layers, lowest, highest):
    """The slope of log2 movement over log2 depth: about 1 for muP, 0 for CompleteP.

    After 1 and 10 steps, measured 0.88 and 1.23, -0.08 and -0.12. Three more seeds gave 0.70 to
    1.06 and -0.20 to -0.07.
    """
    depths = (2, 16)
    moved = np.log2([movement(depth, base_layers) for depth in depths])
    slopes = np.polyfit(np.log2(depths), moved, 1)[0]
    assert all(lowest <= slope <= highest for slope in slopes), slopes
