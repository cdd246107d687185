"""The muP optimizer against the original's groups and steps, and optax.partition."""

from __future__ import annotations

import dataclasses
import json

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from btlm_jax import BTLM, BTLMConfig, mup, next_token_loss, weights

B3 = BTLMConfig.preset("btlm-3b-8k")


def test_released_model_has_160_scaled_layer_weights():
    scales = weights.flatten(mup.multipliers(B3))
    per_layer = [scales[leaf.weight.path] for leaf in weights.disk_leaves(B3)]
    assert per_layer.count(0.1) == 160
    assert per_layer.count(1.0) == len(per_layer) - 160


def test_groups_are_the_originals(case):
    """Learning rates and decays per name, as `get_mup_param_groups` printed them."""
    golden = json.loads(str(case["groups_json"]))
    expected = {
        name: (group["lr"] / golden["lr"], group["weight_decay"] > 0)
        for group in golden["decoupled_wd_true"]
        for name in group["params"]
    }
    scales = weights.flatten(mup.multipliers(case.config))
    decays = weights.flatten(mup.decay_mask(case.config))
    got = {
        leaf.hf_name: (scales[leaf.weight.path], decays[leaf.weight.path])
        for leaf in weights.disk_leaves(case.config)
    }
    assert set(got) == set(expected)
    for name, (scale, decay) in expected.items():
        assert got[name] == (pytest.approx(scale, rel=1e-12), decay), name


def test_three_steps_of_the_original(case):
    golden = json.loads(str(case["groups_json"]))
    b1, b2 = golden["betas"]
    tx = mup.adamw(
        golden["lr"],
        case.config,
        b1=b1,
        b2=b2,
        eps=golden["eps"],
        weight_decay=golden["weight_decay"],
        clip_norm=None,
    )

    @jax.jit
    def step(params, state, ids):
        def loss_fn(p):
            return next_token_loss(case.model, p, ids).mean

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, state = case.params, tx.init(case.params)
    for i in range(3):
        params, state, loss = step(params, state, case[f"train/adam/input_ids_{i}"])
        # fp32 losses of about 5 to 20; measured 7.2e-6.
        assert abs(float(loss) - case["train/adam/losses"][i]) < 2e-5
    compared = 0
    for name, got in cases.by_hf_name(case.config, params).items():
        expected = case[f"train/adam/param/{name}"]
        stable = case[f"train/adam/stable/{name}"].astype(bool)
        compared += stable.sum()
        # A step is at most lr = 2e-3; Adam turns rounding of small gradients into more than
        # rounding of the weights. Measured 1.0e-6.
        if stable.any():
            assert cases.max_error(cases.sample(got), expected, stable) < 5e-6, name
    assert compared > 1000


def quadratic(config, key):
    """Gradients to descend, of the shape of the weights and with noise."""
    params = BTLM(config).init(key)
    leaves, tree = jax.tree.flatten(params)
    keys = list(jax.random.split(key, len(leaves)))

    def grads(params, step):
        noise = [
            jax.random.normal(jax.random.fold_in(k, step), x.shape)
            for k, x in zip(keys, leaves, strict=True)
        ]
        return jax.tree.map(lambda p, n: p + 0.1 * n, params, jax.tree.unflatten(tree, noise))

    return params, grads


def run(tx, params, grads, steps):
    @jax.jit
    def step(params, state, i):
        updates, state = tx.update(grads(params, i), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, i)
    return params


def test_equals_partition_after_50_steps():
    config = dataclasses.replace(BTLMConfig.preset("tiny"), mup_width_scale=0.1)
    params, grads = quadratic(config, jax.random.key(0))
    schedule = optax.linear_schedule(1e-2, 1e-3, 50)
    scales, decays = mup.multipliers(config), mup.decay_mask(config)
    labels = jax.tree.map(lambda s, d: f"{s} {d}", scales, decays)
    groups = {
        f"{s} {d}": optax.adamw(
            lambda i, s=s: s * schedule(i), 0.9, 0.95, 1e-8, weight_decay=0.1 if d else 0.0
        )
        for s in (0.1, 1.0)
        for d in (True, False)
    }
    reference = optax.partition(groups, labels)
    ours = mup.adamw(schedule, config, clip_norm=None)
    a, b = run(ours, params, grads, 50), run(reference, params, grads, 50)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert cases.max_error(x, y) < 1e-6


def test_multipliers_of_one_are_the_identity_bitwise():
    config = dataclasses.replace(BTLMConfig.preset("tiny"), mup_width_scale=1.0)
    params, grads = quadratic(config, jax.random.key(1))
    ours = mup.adamw(1e-2, config, clip_norm=None)
    plain = optax.adamw(1e-2, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=mup.decay_mask(config))
    a, b = run(ours, params, grads, 5), run(plain, params, grads, 5)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_before_adam_it_does_nothing():
    """The documented trap, so that the documentation stays true."""
    config = dataclasses.replace(BTLMConfig.preset("tiny"), mup_width_scale=0.1)
    params, grads = quadratic(config, jax.random.key(2))
    wrong = optax.chain(
        mup.scale_by_mup(config), optax.scale_by_adam(), optax.scale_by_learning_rate(1e-2)
    )
    plain = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(1e-2))
    a, b = run(wrong, params, grads, 3), run(plain, params, grads, 3)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        # Scaled as meant, hidden matrices would differ by 0.9 * 3 * 1e-2 (eps leaves 2e-4).
        assert cases.max_error(x, y) < 1e-3


def test_wrong_tree():
    config = BTLMConfig.preset("tiny")
    with pytest.raises(ValueError, match="do not match the configuration"):
        mup.scale_by_mup(config).update({"wte": jnp.zeros(3)}, optax.EmptyState())
