"""The surrogate formula recovers planted parameters and predicts other runs."""

from __future__ import annotations

import numpy as np
import pytest

from btlm_jax.scaling import surrogate
from support.loss_curves import SHAPE


def observed_curve(true, tau, tpp, seed, noise=0.01, points=1000):
    t = (np.arange(points) + 1) / points
    loss = 2.5 * true(t, 1 - t, tau, tpp)
    loss *= 1 + noise * np.random.default_rng(seed).standard_normal(points)
    return surrogate.ObservedCurve(t, loss, 1 - t, tau, tpp)


def test_surrogate_has_the_formula_of_the_paper():
    t = np.array([0.3, 1.0])
    raw = ((1.001) / (t + 0.001)) ** 0.05 + 0.1 * ((1 - t) + 0.1) ** 0.5
    np.testing.assert_allclose(SHAPE(t, 1 - t, 1, 1), raw / raw[-1], rtol=1e-12)


def test_surrogate_predicts_other_timescales_and_lengths():
    true = surrogate.Surrogate(b_c=0.12, b_e=-0.4, q_c=1.5, q_e=-0.2)
    cases = [(tau, tpp) for tau in (0.03, 0.06, 0.12) for tpp in (20, 80, 200)]
    fitted = surrogate.fit_surrogate(
        [observed_curve(true, *c, seed=i) for i, c in enumerate(cases)]
    )
    exact = surrogate.fit_surrogate([observed_curve(true, *c, seed=0, noise=0) for c in cases])
    t = np.linspace(0.2, 1, 50)
    assert vars(exact) == pytest.approx(vars(true), rel=1e-6)
    beyond = fitted(t, 1 - t, 0.02, 300) / true(t, 1 - t, 0.02, 300)
    assert np.abs(beyond - 1).max() < 2e-3  # noise is 1 %, on 9,000 points


def test_curves_of_one_timescale_give_no_exponents():
    fitted = surrogate.fit_surrogate([observed_curve(SHAPE, 1.0, 1.0, 0, noise=0.002)])
    assert fitted.b_e == fitted.q_e == 0
    t = np.linspace(0.2, 1, 50)
    assert np.abs(fitted(t, 1 - t, 1, 1) / SHAPE(t, 1 - t, 1, 1) - 1).max() < 2e-3


def test_invalid_curves_are_refused():
    with pytest.raises(ValueError, match="found no curves"):
        surrogate.fit_surrogate([])
    with pytest.raises(ValueError, match="found 8 points of curve 0"):
        surrogate.fit_surrogate([observed_curve(SHAPE, 1, 1, 0, points=10)])
    with pytest.raises(ValueError, match="positive losses, timescale and TPP in curve 0"):
        surrogate.fit_surrogate([observed_curve(SHAPE, 1.0, 1.0, 0)._replace(timescale=-1.0)])
