"""Collapse of synthetic curves: planted final losses and faults are recovered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btlm_jax.scaling import collapse
from btlm_jax.scaling.collapse import LossCurve
from support.loss_curves import SHAPE, family_of_curves, loss_curve


def test_final_loss_is_predicted_from_the_first_half():
    """Within 0.1 % for 1 % of noise on each of 16,000 losses, from four finished runs.

    Four fifths of the error come from the end of the family's curve: sqrt(45 / 64,000) of the
    noise, 0.027 %. Measured over 200 seeds: 0.034 % root mean square, 0.093 % the largest.
    """
    errors, sigmas = [], []
    for seed in range(40):
        family = collapse.fit_family(family_of_curves(seed, 16_000), 100)
        predicted = collapse.align_curve(
            family, loss_curve(100 * seed + 99, 2.3, 16_000, until=0.5)
        ).final
        errors.append(predicted.loss / 2.3 - 1)
        sigmas.append(errors[-1] / (predicted.std / predicted.loss))
    assert np.sqrt(np.mean(np.square(errors))) < 5e-4
    assert np.mean(np.abs(errors) < 1e-3) >= 0.95
    # 40 values of unit variance: 1 ± 0.11.
    assert 0.7 < np.std(sigmas) < 1.3


@pytest.mark.parametrize("points", [500, 2000])
def test_stated_uncertainty_covers_the_error(points):
    """Two standard deviations cover 95 % of runs, at other numbers of points too."""
    inside = []
    for seed in range(150):
        family = collapse.fit_family(family_of_curves(seed, points), 100)
        predicted = collapse.align_curve(
            family, loss_curve(100 * seed + 99, 2.3, points, until=0.5)
        ).final
        inside.append(abs(predicted.loss - 2.3) < 2 * predicted.std)
    assert 0.90 <= np.mean(inside) <= 1.0


@pytest.mark.parametrize("until", [0.5, 1.0])
def test_runs_of_the_family_are_not_flagged(until):
    """At most 1 % by construction, 3 ± 1.7 of 300 runs. Measured over 1,000 runs: 0.1 %."""
    flagged = 0
    for seed in range(300):
        family = collapse.fit_family(family_of_curves(seed, 2000), 100)
        run = loss_curve(100 * seed + 99, 2.3, 2000, until=until)
        flagged += collapse.monitor_curve(family, run).left_at is not None
    assert flagged <= 6


def test_a_fault_is_located_at_its_beginning():
    """A drift that begins at 60 % and reaches 2 %, as in the paper's 1.8B run, with 1 % of noise.

    Its beginning is hidden in the noise: it is located within 10 % of training, with a median
    within 6 %, and noticed before it reaches 1.4 % of the loss.
    """
    left, noticed, excess = [], [], []
    for seed in range(100):
        family = collapse.fit_family(family_of_curves(seed, 2000), 100)
        verdict = collapse.monitor_curve(
            family, loss_curve(100 * seed + 99, 2.3, 2000, drift=(0.6, 0.02))
        )
        assert verdict.left_at is not None and verdict.noticed_at is not None
        left.append(verdict.left_at)
        noticed.append(verdict.noticed_at)
        excess.append(verdict.excess)
    assert np.mean(np.abs(np.array(left) - 0.6) < 0.1) >= 0.95
    assert abs(np.median(left) - 0.6) < 0.06
    assert max(noticed) < 0.6 + 0.4 * 1.4 / 2
    assert np.mean(excess) == pytest.approx(0.0194, abs=0.002)  # over the last 5 % of training


def test_a_loss_that_falls_too_low_is_a_fault_too():
    family = collapse.fit_family(family_of_curves(0, 2000), 100)
    verdict = collapse.monitor_curve(family, loss_curve(99, 2.3, 2000, drift=(0.7, -0.03)))
    assert verdict.left_at == pytest.approx(0.7, abs=0.1) and verdict.excess < -0.02


def test_a_noisier_run_is_not_a_fault():
    """A smaller batch has more noise, here four times as much."""
    family = collapse.fit_family(family_of_curves(0, 2000), 100)
    flagged = [
        collapse.monitor_curve(family, loss_curve(seed, 2.3, 2000, noise=0.04)).left_at is not None
        for seed in range(100)
    ]
    assert sum(flagged) <= 4


def test_slow_deviations_within_a_family_count_as_noise():
    """The same run leaves a smooth family and belongs to one with slow deviations."""
    t = (np.arange(2000) + 1) / 2000
    waves = [c._replace(loss=c.loss * (1 + 0.01 * np.sin(12 * t + i)))
             for i, c in enumerate(family_of_curves(0, 2000))]  # fmt: skip
    odd = loss_curve(99, 2.3, 2000)
    odd = odd._replace(loss=odd.loss * (1 + 0.01 * np.sin(12 * t + 2.5)))
    assert (
        collapse.monitor_curve(collapse.fit_family(family_of_curves(0, 2000), 100), odd).left_at
        is not None
    )
    assert collapse.monitor_curve(collapse.fit_family(waves, 100), odd).left_at is None


def test_faulty_finished_runs_are_not_members():
    runs = family_of_curves(0, 2000)
    runs[1] = loss_curve(7, 2.9, 2000, drift=(0.6, 0.03))
    assert collapse.family_members(runs, 100) == [0, 2, 3]
    assert collapse.family_members(runs[:3], 100) == [0, 2]
    assert collapse.family_members(family_of_curves(0, 2000), 100) == [0, 1, 2, 3]
    assert collapse.family_members(runs[:2], 100) == [
        0,
        1,
    ]  # two runs do not show which one is faulty


def test_bins_are_averages():
    """Binned values equal the average of many more points, for any logging interval."""
    t = (np.arange(100_000) + 1) / 100_000
    exact = np.log(3 * SHAPE(t, 1 - t, 1, 1)).reshape(50, -1).mean(1)
    for points in (100, 130, 1000, 10_000):
        binned = collapse.bin_curve(loss_curve(0, 3, points, noise=0), 50)
        assert np.abs(binned - exact)[10:].max() < 1e-4
    half = collapse.bin_curve(loss_curve(0, 3, 1000, noise=0, until=0.5), 50)
    assert not np.isnan(half[:25]).any() and np.isnan(half[25:]).all()


@given(st.floats(0.1, 10), st.integers(100, 400))
@settings(max_examples=25, deadline=None)
def test_units_of_the_loss_do_not_matter(factor, points):
    """Bits and nats give the same shape and the same relative prediction."""
    curves, run = family_of_curves(1, points), loss_curve(5, 2.3, points, until=0.6)
    scaled = [c._replace(loss=factor * c.loss) for c in (*curves, run)]
    bins = collapse.choose_bins(curves)
    assert collapse.choose_bins(scaled) == bins
    a, b = collapse.fit_family(curves, bins), collapse.fit_family(scaled[:-1], bins)
    np.testing.assert_allclose(a.shape, b.shape, atol=1e-9)
    x, y = collapse.align_curve(a, run).final, collapse.align_curve(b, scaled[-1]).final
    assert y.loss == pytest.approx(factor * x.loss, rel=1e-9)
    assert y.std == pytest.approx(factor * x.std, rel=1e-6)


def test_final_loss_and_its_uncertainty():
    clean = loss_curve(0, 2.5, 2000, noise=0)
    assert collapse.final_loss(clean, 100).loss == pytest.approx(2.5, rel=5e-4)
    assert collapse.fit_family([clean], 100).shape[-1] == pytest.approx(
        np.log(SHAPE(0.995, 0.005, 1, 1)), abs=5e-4
    )
    estimates = [collapse.final_loss(loss_curve(s, 2.5, 2000), 100) for s in range(100)]
    spread = np.std([v.loss for v in estimates])
    assert np.mean([v.std for v in estimates]) == pytest.approx(spread, rel=0.25)


def test_a_family_of_one_run_predicts():
    """Its noise is estimated from the roughness of the only run."""
    family = collapse.fit_family([loss_curve(0, 2.9, 4000)], 100)
    assert family.noise == pytest.approx(0.01 / np.sqrt(40), rel=0.3)
    assert collapse.align_curve(
        family, loss_curve(1, 2.3, 4000, until=0.5)
    ).final.loss == pytest.approx(2.3, rel=5e-3)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "done, loss, message",
    [
        ([0.1, 0.2], [1.0], "found \\(2,\\) fractions and \\(1,\\) losses"),
        ([0.1], [1.0], "expected equal lengths of 2 or more"),
        ([0.2, 0.1], [1.0, 1.0], "increasing fractions"),
        ([0.5, 1.5], [1.0, 1.0], "increasing fractions"),
        ([0.5, 1.0], [1.0, np.nan], "found nan at 100.0% of training"),
        ([0.5, 1.0], [0.0, 1.0], "found 0.0 at 50.0%"),
    ],
)
def test_invalid_curves_are_refused(done, loss, message):
    with pytest.raises(ValueError, match=message):
        LossCurve.of(done, loss)


def test_invalid_comparisons_are_refused():
    with pytest.raises(ValueError, match="found 30 losses in a whole training, expected 40"):
        collapse.choose_bins([loss_curve(0, 2, 30)])
    with pytest.raises(ValueError, match="found no finished run"):
        collapse.fit_family([], 100)
    with pytest.raises(ValueError, match="run 1 reaches 70%"):
        collapse.fit_family([loss_curve(0, 2, 500), loss_curve(0, 2, 500, until=0.7)], 100)
    with pytest.raises(ValueError, match=r"found 28.0% of the training, expected 30%"):
        collapse.align_curve(
            collapse.fit_family([loss_curve(0, 2, 500)], 100), loss_curve(1, 2, 500, until=0.28)
        )
    with pytest.raises(ValueError, match="found 1 finished runs, expected 2"):
        collapse.backtest_family([loss_curve(0, 2, 500)], 100)
