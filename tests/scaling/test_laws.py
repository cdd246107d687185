"""Scaling laws recover planted parameters, resist outliers and refuse invalid data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from btlm_jax.scaling import laws

RNG = np.random.default_rng(0)
# Chinchilla's published values; D-CPT's are invented, of the size in its paper.
CHINCHILLA = dict(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
D_CPT = dict(E=1.2, A=300.0, alpha=0.32, B=250.0, beta=0.3, eta=0.4, C=0.15, gamma=0.6,
             epsilon=0.08)  # fmt: skip
N = np.repeat(np.geomspace(5e7, 1e10, 7), 6)
D = N * np.tile(np.geomspace(3, 300, 6), 7)


def cpt_points(points=120):
    choose = RNG.choice
    return dict(
        N=choose([5e8, 1.8e9, 4e9, 7e9], points),
        D=choose(np.geomspace(1e9, 1e11, 8), points),
        r=choose([0.05, 0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 1.0], points),
    )


def test_laws_equal_their_formulas():
    n, d, r = 1e9, 2e10, 0.3
    assert laws.CHINCHILLA.predict(CHINCHILLA, N=n, D=d) == pytest.approx(
        1.69 + 406.4 / n**0.34 + 410.7 / d**0.28, rel=1e-12
    )
    assert laws.D_CPT.predict(D_CPT, N=n, D=d, r=r) == pytest.approx(
        1.2 + 300 / n**0.32 + 250 * r**0.4 / d**0.3 + 0.15 / (r + 0.08) ** 0.6, rel=1e-12
    )


@pytest.mark.parametrize(
    "law, true, points, starts",
    [(laws.CHINCHILLA, CHINCHILLA, dict(N=N, D=D), 8), (laws.D_CPT, D_CPT, cpt_points(), 4)],
    ids=["chinchilla", "d-cpt"],
)
def test_planted_parameters_are_recovered(law, true, points, starts):
    """Without noise the optimum is exact; measured relative errors: 1e-13 and 1e-7."""
    fitted = laws.fit_law(law, law.predict(true, **points), starts=starts, **points)
    assert fitted.values == pytest.approx(true, rel=1e-5)
    assert fitted.rms < 1e-7 and not fitted.at_bound
    assert fitted.agreeing == fitted.starts == starts


def test_noise_causes_no_bias():
    """With 0.2 % of noise, the errors of exponents over 10 seeds are centered and small."""
    clean, errors = laws.CHINCHILLA.predict(CHINCHILLA, N=N, D=D), []
    for seed in range(10):
        noise = np.exp(0.002 * np.random.default_rng(seed).standard_normal(len(N)))
        fitted = laws.fit_law(laws.CHINCHILLA, clean * noise, N=N, D=D, starts=1)
        assert fitted.rms == pytest.approx(0.002, rel=0.35)  # 42 points, 5 of them spent
        errors.append([fitted.values[x] / CHINCHILLA[x] - 1 for x in ("alpha", "beta", "E")])
    mean, std = np.mean(errors, 0), np.std(errors, 0)
    assert (np.abs(mean) < 3 * std / np.sqrt(10)).all()
    assert (std < [0.05, 0.05, 0.01]).all()


def test_outliers_have_little_weight():
    """Three of 42 losses are 30 % too high: the Huber loss hardly moves, least squares does."""
    y = laws.CHINCHILLA.predict(CHINCHILLA, N=N, D=D)
    y[[3, 17, 30]] *= 1.3
    robust = laws.fit_law(laws.CHINCHILLA, y, N=N, D=D, starts=4)
    squares = laws.fit_law(laws.CHINCHILLA, y, N=N, D=D, starts=4, delta=10.0)
    point = dict(N=7e10, D=1.4e12)
    true = laws.CHINCHILLA.predict(CHINCHILLA, **point)
    assert abs(robust.predict(**point) / true - 1) < 1e-3
    assert abs(squares.predict(**point) / true - 1) > 5e-3


def test_gradient_equals_finite_differences():
    x = {name: v / np.exp(np.log(v).mean()) for name, v in cpt_points(30).items()}
    theta = np.random.default_rng(1).normal(0, 0.5, len(laws.D_CPT.parameters))
    _, slopes = laws._log_sum(laws.D_CPT, x, theta)
    numeric = approx_fprime(theta, lambda p: laws._log_sum(laws.D_CPT, x, p)[0], 1e-7)
    np.testing.assert_allclose(slopes.T, numeric, atol=1e-6)  # forward differences of 1e-7


def test_undetermined_parameters_are_reported():
    """If losses do not depend on D, its term vanishes or is constant."""
    fitted = laws.fit_law(laws.CHINCHILLA, 2 + 100 / N**0.3, N=N, D=D, starts=8)
    assert {"B", "beta"} & set(fitted.at_bound)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(losses=np.zeros(42)), "losses: found 0.0 at index 0, expected positive"),
        (dict(losses=np.full(42, np.nan)), "losses: found nan"),
        (dict(N=-N), "N: found -5"),
        (dict(losses=np.ones(3), N=N[:3], D=D[:3]), "found 3, expected more than the 5 param"),
        (dict(D=D[:5]), "found shapes"),
        (dict(r=N), "variables: found D, N, r, expected N, D of"),
        (dict(delta=0), "delta: found 0"),
        (dict(starts=0), "starts: found 0"),
    ],
)
def test_invalid_data_is_refused(change, message):
    arguments = dict(losses=np.full(42, 2.0), N=N, D=D) | change
    losses = arguments.pop("losses")
    with pytest.raises(ValueError, match=message):
        laws.fit_law(laws.CHINCHILLA, losses, **arguments)
