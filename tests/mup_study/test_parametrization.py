"""Rules that are arguments: each is exactly what it stands for, and all 1 is muP itself."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from btlm_jax import BTLM, BTLMConfig
from btlm_jax.model import mup, weights
from btlm_jax.model.loss import target_loss
from btlm_jax.model.params import flatten_tree
from btlm_jax.mup_study import parametrization
from btlm_jax.mup_study.parametrization import (
    PARAMETRIZATIONS,
    Rules,
    WidthFamily,
    reparametrize,
)
from btlm_jax.train import step

FAMILY = WidthFamily(parametrization.family_shape(64), (16, 32))
MODEL = BTLM(FAMILY.config(32))
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32)
ONES = Rules(*np.ones(5, np.float32))


@functools.cache
def params(model=MODEL):
    """With biases and scales that are not 0 and 1, so that a factor on them shows."""
    random = np.random.default_rng(1)

    def with_noise(x):
        return np.asarray(x) + 0.1 * random.standard_normal(x.shape, np.float32)

    return jax.tree.map(with_noise, model.init(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_gradient(model, params, rules):
    def loss(p):
        return target_loss(model, reparametrize(model, p, rules), TOKENS)[0]

    return jax.value_and_grad(loss)(params)


def loss_and_gradient(model, rules=ONES):
    return _loss_and_gradient(model, params(model), rules)


def assert_close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(x - y).max() <= tolerance * max(np.abs(y).max(), 1e-3)


@pytest.mark.parametrize(
    "rules, fields",
    [
        # 1 / sqrt(K) for 1 / K.
        (ONES._replace(queries=np.float32(np.sqrt(8))), dict(mup_scale_qk_dot_by_d=False)),
        (ONES._replace(logits=np.float32(2)), dict(mup_output_alpha=2 * 0.8)),
    ],
)
def test_forward_factors_equal_another_configuration(rules, fields):
    other = BTLM(dataclasses.replace(MODEL.config, **fields))
    assert_close(loss_and_gradient(MODEL, rules), loss_and_gradient(other))
    assert abs(loss_and_gradient(MODEL)[0] - loss_and_gradient(other)[0]) > 1e-3


def test_factors_of_one_are_the_training_step():
    tx = mup.adamw(0.01, MODEL.config)
    mine = parametrization.initial_trial(MODEL, np.int32(3), ONES)
    theirs = step.init_state(jax.tree.map(jnp.copy, mine.params), tx)
    take = step.make_step(MODEL, tx)
    for _ in range(3):
        mine, loss = parametrization.trial_step(MODEL, mine, TOKENS, np.float32(0.01), ONES)
        theirs, metrics = take(theirs, TOKENS[None])
        assert float(loss) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    # But for the biases of keys, which no softmax sees: Adam turns what rounding leaves into steps.
    got, expected = ({**flatten_tree(x.params)} for x in (mine, theirs))
    path = ("blocks", "attn", "c_attn", "bias")
    got[path], expected[path] = (x[path].at[:, 1].set(0) for x in (got, expected))
    # Gradients of the mean, or of the sum and divided: Adam's first steps amplify their rounding.
    assert_close(got, expected, 1e-4)


@pytest.mark.parametrize("name, role", [("hidden_rate", "hidden"), ("embedding_rate", "embedding")])
def test_rates_multiply_updates_of_their_group(name, role):
    rules = ONES._replace(**{name: np.float32(0.25)})
    (plain, other) = (
        parametrization.trial_step(
            MODEL,
            parametrization.initial_trial(MODEL, np.int32(0), ONES),
            TOKENS,
            np.float32(0.1),
            r,
        )[0]
        for r in (ONES, rules)
    )
    first = flatten_tree(parametrization.initial_trial(MODEL, np.int32(0), ONES).params)
    a, b = flatten_tree(plain.params), flatten_tree(other.params)
    for w in weights.weight_table(MODEL.config):
        factor = 0.25 if w.role == role else 1.0
        expected = first[w.path] + factor * (a[w.path] - first[w.path])
        assert np.abs(b[w.path] - expected).max() < 1e-6


def test_a_hidden_rate_of_m_is_adamw_without_mup():
    m = np.float32(2)
    rules = ONES._replace(hidden_rate=m)
    trial = parametrization.initial_trial(MODEL, np.int32(0), rules)
    before = jax.tree.map(jnp.copy, trial.params)
    blind = mup.adamw(0.05, dataclasses.replace(MODEL.config, mup_width_scale=1.0))

    def mean(p):
        objective, found = target_loss(MODEL, p, TOKENS)
        return objective / found.tokens

    @jax.jit
    def update(before):
        updates, _ = blind.update(jax.grad(mean)(before), blind.init(before), before)
        return optax.apply_updates(before, updates)

    expected = flatten_tree(update(before))
    after, _ = parametrization.trial_step(MODEL, trial, TOKENS, np.float32(0.05), rules)
    got = flatten_tree(after.params)
    for w in weights.weight_table(MODEL.config):
        if w.role == "hidden":
            # Adam's first step is the sign of a gradient, whatever its size: where it is next to
            # nothing, rounding decides.
            difference = np.abs(got[w.path] - expected[w.path])
            assert np.quantile(difference, 0.99) < 1e-6  # of 0.05; measured 1e-8


def test_initial_weights_differ_by_the_factor_on_hidden_init():
    plain = parametrization.initial_trial(MODEL, np.int32(5), ONES).params
    wide = parametrization.initial_trial(
        MODEL, np.int32(5), ONES._replace(hidden_init=np.float32(3))
    ).params
    assert_close(plain, MODEL.init(jax.random.key(5)), 1e-6)
    flat = flatten_tree(plain)
    for path, x in flatten_tree(wide).items():
        factor = 3 if weights.weights_by_path(MODEL.config)[path].role == "hidden" else 1
        assert np.abs(x - factor * flat[path]).max() < 1e-6


def test_all_parametrizations_agree_at_the_base_width():
    for name in PARAMETRIZATIONS:
        assert FAMILY.rules(name, 16) == ONES
    departures = {name: FAMILY.rules(name, 32) for name in PARAMETRIZATIONS}
    assert departures.pop("muP") == ONES
    assert all(rules != ONES for rules in departures.values())


def test_one_program_serves_all_rules_of_a_width():
    before = parametrization.trial_step._cache_size()
    model = BTLM(FAMILY.config(16))
    for name in PARAMETRIZATIONS:
        rules = WidthFamily(FAMILY.shape, (8, 16)).rules(name, 16)
        trial = parametrization.initial_trial(model, np.int32(0), rules)
        parametrization.trial_step(model, trial, TOKENS, np.float32(0.1), rules)
    assert parametrization.trial_step._cache_size() == before + 1


def test_widths_are_checked_and_scale_the_configuration():
    narrow, wide = (WidthFamily(FAMILY.shape, (16, 32)).config(w) for w in (16, 32))
    assert (narrow.mup_width_scale, wide.mup_width_scale) == (1.0, 0.5)
    assert (narrow.n_head, narrow.head_dim, wide.head_dim) == (4, 4, 8)
    assert wide.n_inner == 2 * narrow.n_inner or abs(wide.n_inner - 2 * narrow.n_inner) == 1
    for widths, said in [
        ((16, 18), "18, which does not divide into 4 heads"),
        ((16,), "two or more"),
        ((32, 16), "ascending"),
        ((), "found none"),
    ]:
        with pytest.raises(ValueError, match=said):
            WidthFamily(FAMILY.shape, widths)


def test_the_shape_follows_the_base_configuration():
    """Whatever the number of heads, the MLP keeps its ratio."""
    for heads in (1, 4, 12, 24, 100):
        widths = (heads * 8, heads * 16)
        made = WidthFamily(parametrization.family_shape(64, heads=heads), widths).config(widths[1])
        assert made.n_inner / made.n_embd == pytest.approx(171 / 64, rel=0.02)
    base = BTLMConfig.preset("btlm-3b-8k")
    made = WidthFamily(parametrization.family_shape(64, heads=4, base=base), (64, 128)).config(128)
    assert (made.n_inner, made.mup_embeddings_scale) == (round(128 * 6826 / 2560), 14.6)
