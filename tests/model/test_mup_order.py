"""Where muP belongs among other transformations, and the misuse that is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from optax.contrib import schedule_free

from btlm_jax.model import mup
from support.optimizer_steps import (
    SMALL,
    assert_equal,
    run,
    start,
)

SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 50)


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
