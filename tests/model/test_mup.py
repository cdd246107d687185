"""The muP optimizers against the original's groups and steps, optax.partition and NumPy."""

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

from btlm_jax import BTLM, BTLMConfig, make_mesh, next_token_loss
from btlm_jax.model import mup, weights
from btlm_jax.model.params import check_params, flatten_tree, unflatten_tree
from support import golden as golden_lib
from support import reference_numpy

B3 = BTLMConfig.preset("btlm-3b-8k")
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
M1 = dataclasses.replace(SMALL, mup_width_scale=1.0)
DECAYS = ("original", "coupled", "independent")
MAKES = (mup.adamw, mup.lion, mup.muon)


# The groups ---------------------------------------------------------------------------------------


def test_released_model_has_160_scaled_layer_weights():
    scales = flatten_tree(mup.multipliers(B3))
    per_layer = [scales[leaf.weight.path] for leaf in weights.disk_leaves(B3)]
    assert per_layer.count(0.1) == 160
    assert per_layer.count(1.0) == len(per_layer) - 160


@pytest.mark.parametrize(
    "optimizer, expected", [("adam", 0.1), ("lion", 0.1), ("muon", 1.0), ("muon_rms", 0.1**0.5)]
)
def test_multipliers_by_optimizer(optimizer, expected):
    """Matrices get 1/m, 1 or 1/sqrt(m), as the coordinate checks require; the rest is Adam's."""
    scales = flatten_tree(mup.multipliers(SMALL, optimizer))
    for w in weights.weight_table(SMALL):
        target = 1.0 if w.role != "hidden" else expected if w.stacked else 0.1
        assert scales[w.path] == target, w.name


@pytest.mark.parametrize(
    "decay, variant", [("original", "decoupled_wd_true"), ("coupled", "decoupled_wd_false")]
)
def test_groups_are_those_of_the_original(case, decay, variant):
    """Names, learning rates and decays equal those that `get_mup_param_groups` printed."""
    golden = json.loads(str(case["groups_json"]))
    groups = mup.param_groups(case.config, golden["lr"], golden["weight_decay"], decay)
    assert len(groups) == len(golden[variant]) == 3
    for ours, theirs in zip(groups, golden[variant], strict=True):
        assert sorted(ours.params) == sorted(theirs["params"])
        assert ours.lr == pytest.approx(theirs["lr"], rel=1e-12)
        assert ours.weight_decay == pytest.approx(theirs["weight_decay"], rel=1e-12)
    assert sum(g.count for g in groups) == weights.count_parameters(case.config)


def test_groups_are_formatted_as_a_table():
    original = mup.format_groups(mup.param_groups(B3, 0.012, 0.1)).splitlines()
    assert original == [
        "group      arrays     parameters          lr  weight decay   per step",
        "hidden        160  2,516,418,560      0.0012           0.1    0.00012",
        "embedding       1    128,657,920       0.012           0.1     0.0012",
        "vector        290      1,179,264       0.012             0          0",
    ]
    coupled = mup.format_groups(mup.param_groups(B3, 0.012, 0.1, "coupled")).splitlines()
    assert coupled[1].split() == ["hidden", "160", "2,516,418,560", "0.0012", "1", "0.0012"]


def test_muon_groups_leave_the_head_to_adam():
    """Matrices keep their learning rate at every width; an untied head has Adam's."""
    groups = mup.param_groups(SMALL, 0.01, 0.1, optimizer="muon")
    rates = {name: g.lr for g in groups for name in g.params}
    assert rates["transformer.h.1.mlp.c_fc.weight"] == 0.01
    assert rates["lm_head.weight"] == pytest.approx(0.001)


@pytest.mark.parametrize(
    "case", ["a2_btlm_mup_h32", "b_sp_alibi", "f_learned_gelu_mup", "i_untied"], indirect=True
)
def test_three_steps_equal_those_of_the_original(case):
    """On the cases that differ in their weights; `test_btlm` has the gradients of all."""
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


# Against optax ------------------------------------------------------------------------------------


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


# Inside other transformations ---------------------------------------------------------------------


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


# Misuse -------------------------------------------------------------------------------------------

MUP = mup.scale_by_mup(SMALL)
SGD = optax.scale_by_learning_rate(1e-2)


def test_scale_by_mup_before_adam_has_no_effect():
    """The documented mistake, so that the documentation stays true."""
    wrong, _ = run(optax.chain(MUP, optax.scale_by_adam(), SGD), start(SMALL), 3)
    without, _ = run(optax.chain(optax.scale_by_adam(), SGD), start(SMALL), 3)
    # In the right order, hidden matrices would differ by 0.9 * 3 * 1e-2 (eps leaves 2e-4).
    assert_equal(wrong, without, 1e-3)


WRONG = {
    "before adam": ([MUP, optax.scale_by_adam(), SGD], "before the normalization"),
    "before adamw": ([MUP, optax.adamw(1e-2)], "before the normalization"),
    "before lion, nested": ([optax.chain(MUP, optax.lion(1e-2))], "before the normalization"),
    "before adafactor": ([optax.chain(MUP), optax.adafactor(1e-2)], "before the normalization"),
    "before muon": ([MUP, mup.muon(1e-2, SMALL)], "found twice"),
    "after ours": ([mup.adamw(1e-2, SMALL), MUP], "found twice"),
    "before a wrapped adam": (
        [MUP, optax.MultiSteps(optax.adam(1e-2), 2)],
        "before the normalization",
    ),
    "around schedule_free": (
        [schedule_free(optax.adamw(1e-2), 1e-2), MUP],
        "after schedule_free, expected",
    ),
    "around our schedule_free": (
        [schedule_free(mup.adamw(1e-2, SMALL), 1e-2), MUP],
        "found twice",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_orders_are_refused(name):
    transforms, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(mup.chain(*transforms).init, start(SMALL))
    # `check` also sees through optax.chain and wrappers.
    wrapped = optax.apply_if_finite(optax.chain(*transforms), 3)
    state = jax.eval_shape(wrapped.init, start(SMALL))
    with pytest.raises(ValueError, match=message):
        mup.check(state)


RIGHT = {
    "as documented": [
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1, mask=mup.decay_mask(SMALL)),
        MUP,
        SGD,
    ],
    "independent decay": [optax.scale_by_adam(), MUP, optax.add_decayed_weights(0.1), SGD],
    "momentum after": [optax.scale_by_rms(), MUP, optax.trace(0.9), SGD],
    "a schedule after": [optax.scale_by_lion(), MUP, optax.scale_by_learning_rate(SCHEDULE)],
    "none": [optax.adamw(1e-2)],
    "our schedule_free": [schedule_free(mup.adamw(1e-2, SMALL, b1=0.0), 1e-2)],
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_orders_are_accepted(name):
    jax.eval_shape(mup.chain(*RIGHT[name]).init, start(SMALL))


def test_weights_of_another_configuration_are_refused():
    tx = mup.adamw(1e-2, SMALL)
    tied = {k: v for k, v in start(SMALL).items() if k != "lm_head"}
    with pytest.raises(ValueError, match="lm_head"):
        tx.update(tied, tx.init(tied), tied)
    with pytest.raises(ValueError, match=r"do not match the configuration at \['lm_head'\]"):
        MUP.update(tied, MUP.init(tied))
    with pytest.raises(ValueError, match="do not match the configuration at"):
        MUP.update({"wte": jnp.zeros(3)}, MUP.init(None))
    with pytest.raises(ValueError, match=r"do not match the configuration at \['lm_head'\]"):
        mup.group_norms(tied, SMALL)


def test_invalid_arguments_are_refused():
    names = r"decay: found 'decoupled', expected one of \('original', 'coupled', 'independent'\)"
    for make in MAKES:
        with pytest.raises(ValueError, match=names):
            make(1e-2, SMALL, decay="decoupled")
    with pytest.raises(ValueError, match=names):
        mup.param_groups(SMALL, 1e-2, 0.1, "decoupled")
    with pytest.raises(
        ValueError, match=r"optimizer: found 'sgd', expected one of \('adam', 'lion'"
    ):
        mup.scale_by_mup(SMALL, "sgd")
    deep = dataclasses.replace(SMALL, completep_base_layers=2)
    for make in MAKES:
        with pytest.raises(ValueError, match='"original" with CompleteP, expected "coupled", its'):
            make(1e-2, deep)


# Depth --------------------------------------------------------------------------------------------


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


def test_completep_at_alpha_one_keeps_the_learning_rates():
    deep = dataclasses.replace(B3, completep_base_layers=2)
    assert mup.multipliers(deep) == mup.multipliers(B3)
    groups = mup.param_groups(deep, 0.012, 0.1, "coupled")
    assert groups == mup.param_groups(B3, 0.012, 0.1, "coupled")


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


# On a mesh ----------------------------------------------------------------------------------------

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
