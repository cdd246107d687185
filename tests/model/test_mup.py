"""The muP optimizers against the original's steps, `optax.partition` and NumPy."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import schedule_free

from btlm_jax import next_token_loss
from btlm_jax.model import mup, weights
from btlm_jax.model.params import flatten_tree, unflatten_tree
from support import golden as golden_lib
from support.optimizer_steps import (
    MAKES,
    SMALL,
    assert_equal,
    descend,
    is_matrix,
    partition,
    run,
    start,
)

M1 = dataclasses.replace(SMALL, mup_width_scale=1.0)


DECAYS = ("original", "coupled", "independent")


@pytest.mark.parametrize(
    "case", ["a2_btlm_mup_h32", "b_sp_alibi", "f_learned_gelu_mup", "i_untied"], indirect=True
)
def test_three_steps_equal_those_of_the_original(case):
    """On the cases that differ in their weights; `test_btlm_original` has the gradients of all."""
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
        # fp32 losses of about 5 to 20; measured 1.9e-6.
        assert abs(float(loss) - case["train/adam/losses"][i]) < 2e-5
    compared = 0
    for name, got in golden_lib.by_hf_name(case.config, params).items():
        expected = case[f"train/adam/param/{name}"]
        stable = case[f"train/adam/stable/{name}"].astype(bool)
        compared += stable.sum()
        # A step is at most lr = 2e-3; Adam turns rounding of small gradients into more than
        # rounding of the weights. Measured 4.8e-7.
        if stable.any():
            assert golden_lib.max_error(golden_lib.sample(got), expected, stable) < 5e-6, name
    assert compared > 1000


SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 50)


def slower(factor):
    return lambda i: factor * SCHEDULE(i)


RATE = {"hidden": slower(0.1), "embedding": SCHEDULE, "vector": SCHEDULE}


DECAYED = {
    "original": {"hidden": 0.1, "embedding": 0.1, "vector": 0.0},
    "coupled": {"hidden": 1.0, "embedding": 0.1, "vector": 0.0},
}


@pytest.mark.parametrize("decay", DECAYS)
def test_adamw_equals_a_partition_after_50_steps(decay):
    def reference(kind):
        if decay != "independent":
            return optax.adamw(RATE[kind], 0.9, 0.95, weight_decay=DECAYED[decay][kind])
        # The decay uses the learning rate alone, without the factor of the group.
        return optax.chain(
            optax.scale_by_adam(0.9, 0.95),
            optax.scale(0.1 if kind == "hidden" else 1.0),
            optax.add_decayed_weights(0.0 if kind == "vector" else 0.1),
            optax.scale_by_learning_rate(SCHEDULE),
        )

    ours, _ = run(mup.adamw(SCHEDULE, SMALL, decay=decay, clip_norm=None), start(SMALL), 50)
    assert_equal(ours, run(partition(SMALL, reference), start(SMALL), 50)[0], 1e-6)


@pytest.mark.parametrize("decay", ("original", "coupled"))
def test_lion_equals_a_partition_after_50_steps(decay):
    def reference(kind):
        return optax.lion(RATE[kind], 0.9, 0.99, weight_decay=DECAYED[decay][kind])

    ours, _ = run(mup.lion(SCHEDULE, SMALL, decay=decay, clip_norm=None), start(SMALL), 50)
    assert_equal(ours, run(partition(SMALL, reference), start(SMALL), 50)[0], 1e-6)


def axes_of(tree):
    """Returns Muon's axes by hand: [L, D, 3, H, K], [L, H, K, D], [L, D, F], [L, F, D]."""
    by_ndim = {5: (1, (3, 4)), 4: ((1, 2), 3), 3: (1, 2)}
    return jax.tree.map(
        lambda x: optax.contrib.MuonDimensionNumbers(*by_ndim[x.ndim]) if x.ndim > 2 else None, tree
    )


@pytest.mark.parametrize("rms", (None, 0.2))
def test_muon_equals_a_partition_after_50_steps(rms):
    """Adam updates the head and biases, even those with as many axes as matrices."""

    def reference(kind):
        if kind != "matrix":
            decay = DECAYED["original"][kind]
            return optax.adamw(RATE[kind], 0.9, 0.95, weight_decay=decay, nesterov=True)
        rate = SCHEDULE if rms is None else slower(0.1**0.5)
        return optax.contrib.muon(
            rate,
            weight_decay=0.1,
            muon_weight_dimension_numbers=axes_of,
            consistent_rms=rms,
        )

    ours, _ = run(mup.muon(SCHEDULE, SMALL, consistent_rms=rms, clip_norm=None), start(SMALL), 50)
    kinds = partition(SMALL, reference, lambda w: "matrix" if is_matrix(w) else w.role)
    theirs, _ = run(kinds, start(SMALL), 50)
    assert_equal(ours, theirs, 1e-6)


def test_muon_takes_a_separate_learning_rate_for_adam():
    params = start(SMALL)
    apart, _ = run(mup.muon(1e-2, SMALL, adam_learning_rate=0.0, clip_norm=None), params, 4)
    both, apart, params = (flatten_tree(t) for t in (plain(mup.muon), apart, params))
    for w in weights.weight_table(SMALL):
        target = both if is_matrix(w) else params
        assert golden_lib.max_error(apart[w.path], target[w.path]) < 1e-6


def newton_schulz(g):
    """Returns five quintic iterations of one matrix, in float64."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.parametrize("rms", (None, 0.2))
def test_muon_equals_numpy_layer_by_layer(rms):
    tx = mup.muon(1.0, SMALL, consistent_rms=rms, weight_decay=0.0, clip_norm=None)
    params = start(SMALL)

    @jax.jit
    def two_steps(params):
        grads = [descend(params, i) for i in range(2)]
        _, state = tx.update(grads[0], tx.init(params), params)
        return *grads, tx.update(grads[1], state, params)[0]

    first, second, got = (flatten_tree(t) for t in jax.device_get(two_steps(params)))
    beta, compared = 0.95, 0
    for w in weights.weight_table(SMALL):
        if not is_matrix(w):
            continue
        g1, g2 = (g[w.path].astype(np.float64) for g in (first, second))
        momentum = beta * (1 - beta) * g1 + (1 - beta) * g2
        nesterov = beta * momentum / (1 - beta**3) + (1 - beta) * g2 / (1 - beta**2)
        for layer in range(SMALL.n_layer):
            # The layout of Hugging Face, [in, out], with q, k and v side by side.
            parts = 3 if w.path[-2] == "c_attn" else 1
            whole = nesterov[layer].reshape(w.hf_shape)
            ours = got[w.path][layer].reshape(w.hf_shape)
            for g, u in zip(np.split(whole, parts, 1), np.split(ours, parts, 1), strict=True):
                n_in, n_out = g.shape
                scale = np.sqrt(max(1, n_out / n_in))
                if rms is not None:
                    scale = rms * np.sqrt(max(n_in, n_out)) * np.sqrt(0.1)
                # Spectral norms of about 1; measured 6.7e-7.
                assert golden_lib.max_error(u, -scale * newton_schulz(g)) < 1e-5, w.name
                compared += 1
    assert compared == SMALL.n_layer * 7


def test_multipliers_of_one_change_no_bit():
    params, mask = start(M1), mup.decay_mask(M1)
    ours, _ = run(mup.adamw(1e-2, M1, clip_norm=None), params, 5)
    plain = optax.adamw(1e-2, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=mask)
    assert_equal(ours, run(plain, params, 5)[0])

    ours, _ = run(mup.lion(1e-2, M1, clip_norm=None), params, 5)
    assert_equal(ours, run(optax.lion(1e-2, 0.9, 0.99, weight_decay=0.1, mask=mask), params, 5)[0])

    def axes(tree):
        dims = flatten_tree(axes_of(tree))
        roles = {w.path: w.role for w in weights.weight_table(M1)}
        return unflatten_tree({p: d if roles[p] == "hidden" else None for p, d in dims.items()})

    ours, _ = run(mup.muon(1e-2, M1, weight_decay=0.0, clip_norm=None), params, 5)
    plain = optax.contrib.muon(1e-2, adam_b2=0.95, muon_weight_dimension_numbers=axes)
    assert_equal(ours, run(plain, params, 5)[0])


@pytest.mark.parametrize(
    "make, decay, kept",
    [
        (mup.adamw, "original", 0.887),
        (mup.adamw, "coupled", 0.301),
        (mup.adamw, "independent", 0.301),
        (mup.lion, "original", 0.887),
        (mup.lion, "independent", 0.301),
        (mup.muon, "original", 0.887),
    ],
)
def test_decay_over_1000_steps_without_gradients(make, decay, kept):
    """Peak learning rate and decay of BTLM-3B-8K at m = 10. Matrices keep both under Muon."""
    tx = make(0.012, SMALL, weight_decay=0.1, decay=decay)
    params = jax.tree.map(jnp.ones_like, start(SMALL))
    after, _ = run(tx, params, 1000, lambda p, i: jax.tree.map(jnp.zeros_like, p))
    after = flatten_tree(after)
    for w in weights.weight_table(SMALL):
        muon = make is mup.muon and is_matrix(w)
        target = {"vector": 1.0, "embedding": 0.301, "hidden": 0.301 if muon else kept}[w.role]
        np.testing.assert_allclose(after[w.path], target, atol=5e-4)


def test_clipping_uses_the_global_norm():
    def update(params, grads, clip_norm):
        tx = mup.adamw(1.0, SMALL, eps=1.0, clip_norm=clip_norm)  # eps makes the size matter
        return tx.update(grads, tx.init(params), params)[0]

    @jax.jit
    def updates(params):
        grads = descend(params, 0)
        norm = optax.tree.norm(grads)
        scaled = jax.tree.map(lambda g: g / norm, grads)
        return norm, update(params, grads, 1.0), update(params, scaled, None)

    norm, clipped, scaled = updates(start(SMALL))
    assert norm > 2
    assert_equal(clipped, scaled, 1e-6)


@pytest.mark.parametrize("make", MAKES)
def test_first_moments_have_the_requested_dtype(make):
    state = jax.eval_shape(make(1e-2, SMALL, mu_dtype=jnp.bfloat16).init, start(SMALL))
    dtypes = [x.dtype for x in jax.tree.leaves(state) if x.ndim]
    weight = len(weights.weight_table(SMALL))
    assert dtypes.count(jnp.bfloat16) == weight
    assert all(d == jnp.float32 for d in dtypes if d != jnp.bfloat16)


@functools.cache
def plain(make):
    """Returns the weights after 4 steps."""
    return run(make(1e-2, SMALL, clip_norm=None), start(SMALL), 4)[0]


@pytest.mark.parametrize("make", MAKES)
def test_under_multi_steps_and_inject_hyperparams(make):
    injected = optax.inject_hyperparams(make)(learning_rate=1e-2, config=SMALL, clip_norm=None)
    tx = optax.MultiSteps(injected, 2)
    got, state = run(tx, start(SMALL), 8, lambda p, i: descend(p, i // 2))
    mup.check(state)
    # Hyper-parameters become fp32, which b2 = 0.95 is not exactly.
    assert_equal(got, plain(make), 2e-6)
    assert state.inner_opt_state.hyperparams["learning_rate"] == np.float32(1e-2)


def test_injected_learning_rate_is_used():
    tx = optax.inject_hyperparams(mup.adamw)(learning_rate=1e-2, config=SMALL)

    @jax.jit
    def steps(params):
        state = tx.init(params)
        grads = descend(params, 0)
        once, _ = tx.update(grads, state, params)
        state.hyperparams["learning_rate"] *= 2
        return once, tx.update(grads, state, params)[0]

    once, twice = steps(start(SMALL))
    assert_equal(jax.tree.map(lambda u: 2 * u, once), twice, 1e-7)


@pytest.mark.parametrize("make", MAKES)
def test_frozen_weights_stay_and_others_train_as_before(make):
    """optax masks the weights of other transformations: here embeddings and some matrices."""
    frozen = {
        w.path: w.role == "embedding" or "c_fc" in w.path for w in weights.weight_table(SMALL)
    }
    labels = unflatten_tree({p: "freeze" if f else "train" for p, f in frozen.items()})
    parts = {"train": make(1e-2, SMALL, clip_norm=None), "freeze": optax.set_to_zero()}
    got, state = run(optax.partition(parts, labels), start(SMALL), 4)
    mup.check(state)
    got, before, trained = (flatten_tree(t) for t in (got, start(SMALL), plain(make)))
    assert sum(frozen.values()) == 3
    for path, is_frozen in frozen.items():
        assert golden_lib.max_error(got[path], (before if is_frozen else trained)[path]) < 1e-6


def test_schedule_free_around_adamw_equals_a_partition():
    warmup = optax.linear_schedule(1e-3, 1e-2, 20)

    def reference(kind):
        factor = 0.1 if kind == "hidden" else 1.0

        def rate(i):
            return factor * warmup(i)

        return schedule_free(
            optax.adamw(rate, 0.0, 0.95, weight_decay=DECAYED["original"][kind]), rate
        )

    base = mup.adamw(warmup, SMALL, b1=0.0, clip_norm=None)
    ours, state = run(schedule_free(base, warmup), start(SMALL), 30)
    mup.check(state)
    theirs, _ = run(partition(SMALL, reference), start(SMALL), 30)
    assert_equal(ours, theirs, 1e-6)

    # Outside schedule_free, the muP factor multiplies averaged weights, which `check` detects.
    inner = optax.adamw(warmup, 0.0, 0.95, weight_decay=0.1, mask=mup.decay_mask(SMALL))
    around = optax.chain(schedule_free(inner, warmup), mup.scale_by_mup(SMALL))
    wrong, state = run(around, start(SMALL), 30)
    kernel = [t["blocks"]["mlp"]["c_fc"]["kernel"] for t in (wrong, theirs)]
    assert golden_lib.max_error(*kernel) > 5e-3
    with pytest.raises(ValueError, match="after schedule_free, expected"):
        mup.check(state)
