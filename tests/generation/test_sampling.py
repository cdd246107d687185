"""The sampling rules on small distributions, and the statistics of the draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from btlm_jax.generation.options import GenerationOptions
from btlm_jax.generation.row_options import row_options, rule_sizes
from btlm_jax.generation.sampling import draw_tokens, warp_scores

LOGITS = jnp.log(jnp.array([[0.4, 0.3, 0.1, 0.1, 0.1], [0.05, 0.05, 0.8, 0.05, 0.05]]))


def warped(scores, rows: list[GenerationOptions], min_keep: int = 1):
    """Returns the scores after the rules of every row."""
    options, sizes = row_options(rows, [()] * len(rows)), rule_sizes(rows)
    return warp_scores(scores, options, sizes.candidates, min_keep)


def kept_tokens(min_keep: int = 1, **options) -> list[list[int]]:
    rules = GenerationOptions(do_sample=True, **({"top_k": 0} | options))
    return [list(np.flatnonzero(np.isfinite(r))) for r in warped(LOGITS, [rules] * 2, min_keep)]


def test_top_k_keeps_ties():
    assert kept_tokens(top_k=2) == [[0, 1], [0, 1, 2, 3, 4]]
    assert kept_tokens(top_k=3) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert kept_tokens(top_k=0) == kept_tokens(top_k=50) == [[0, 1, 2, 3, 4]] * 2


def test_top_p_keeps_tokens_until_p_is_reached():
    assert kept_tokens(top_p=0.65) == [[0, 1], [2]]
    assert kept_tokens(top_p=0.3) == [[0], [2]]
    assert kept_tokens(top_p=1e-9) == [[0], [2]]


def test_rules_keep_as_many_tokens_as_beams_need():
    assert [len(row) for row in kept_tokens(2, top_p=1e-9)] == [2, 2]
    assert [len(row) for row in kept_tokens(2, min_p=1.0)] == [2, 2]
    assert [len(row) for row in kept_tokens(2, typical_p=1e-9)] == [2, 2]


def test_min_p_is_relative_to_the_most_likely_token():
    assert kept_tokens(min_p=0.5) == [[0, 1], [2]]
    assert kept_tokens(min_p=0.2) == [[0, 1, 2, 3, 4], [2]]


def test_typical_p_may_drop_the_most_likely():
    # The entropy is 1.42 nats: 0.3 (1.20 nats) is nearest, then 0.4 (0.92), then 0.1 (2.30).
    assert kept_tokens(typical_p=0.29)[0] == [1]
    assert kept_tokens(typical_p=0.5)[0] == [0, 1]


def test_cutoffs_drop_unlikely_tokens():
    assert kept_tokens(epsilon_cutoff=0.2) == [[0, 1], [2]]
    assert kept_tokens(epsilon_cutoff=0.9) == [[0], [2]]
    # sqrt(0.3) * exp(-entropy) = 0.13 and 0.25
    assert kept_tokens(eta_cutoff=0.3) == [[0, 1], [2]]


def test_temperature_is_applied_before_the_filters():
    options = GenerationOptions(do_sample=True, temperature=0.5, top_k=2)
    got = jax.nn.softmax(warped(LOGITS, [options] * 2), -1)[0]
    np.testing.assert_allclose(got, np.array([16, 9, 0, 0, 0]) / 25, atol=1e-6)


def test_draws_follow_the_distribution():
    n = 4000
    keys = jax.random.split(jax.random.key(0), n)
    draws = np.asarray(draw_tokens(jnp.repeat(LOGITS[:1], n, 0), keys, 2))
    p = np.exp(np.asarray(LOGITS[0], np.float64))
    p /= p.sum()
    assert stats.chisquare(np.bincount(draws[:, 0], minlength=5), n * p).pvalue > 1e-3
    # Without replacement, in order: P(i, then j) = p_i p_j / (1 - p_i).
    pairs = np.zeros((5, 5))
    np.add.at(pairs, tuple(draws.T), 1)
    expected = n * p[:, None] * p / (1 - p[:, None])
    off_diagonal = ~np.eye(5, dtype=bool)
    assert np.trace(pairs) == 0
    assert stats.chisquare(pairs[off_diagonal], expected[off_diagonal]).pvalue > 1e-3


def test_equal_rows_with_equal_keys_draw_alike():
    keys = jnp.stack([jax.random.key(1)] * 2)
    both = draw_tokens(jnp.repeat(LOGITS[:1], 2, 0), keys, 5)
    np.testing.assert_array_equal(both[0], both[1])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(min_p=1.5), "min_p: found 1.5"),
        (dict(typical_p=0.0), "typical_p: found 0.0"),
        (dict(temperature=-1), "temperature: found -1"),
        (dict(temperature=float("nan")), "temperature: found nan"),
        (dict(top_p="0.9"), "top_p: found '0.9'"),
        (dict(epsilon_cutoff=1), "epsilon_cutoff: found 1"),
        (dict(top_k=2.5), "top_k: found 2.5"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions(do_sample=True, **options)


@pytest.mark.parametrize("options", [dict(temperature=float("nan")), dict(top_k=-1), dict(top_p=2)])
def test_values_that_have_no_effect_are_checked_too(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: found"):
        GenerationOptions(**options)
    GenerationOptions(temperature=0, top_p=0, top_k=0)  # off, as other tools write it
