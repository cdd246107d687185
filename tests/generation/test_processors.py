"""Each logits processor against results computed by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from btlm_jax.generation.options import GenerationOptions
from btlm_jax.generation.processors import ProcessorContext, apply_processors
from btlm_jax.generation.row_options import row_options, rule_sizes

VOCAB = 8
FLAT = np.array([[0, 1, -1, 2, -2, 3, -3, 4]], np.float32)
MINUS = -np.inf


def scores(
    ids, length=None, first_valid=0, prompt=2, min_length=0, max_length=99, eos=(), **options
):
    """Returns the processed scores [V]; tokens of `ids` after the first `length` are invisible."""
    ids = np.array([ids])
    context = ProcessorContext(
        jnp.asarray(ids),
        jnp.array([ids.shape[1] if length is None else length]),
        *(jnp.array([n]) for n in (first_valid, prompt, min_length, max_length)),
    )
    rows, sizes = [GenerationOptions(**options)], rule_sizes([GenerationOptions(**options)])
    got = apply_processors(
        jnp.asarray(FLAT), context, row_options(rows, [eos]), sizes.ngram_sizes, ()
    )
    return np.asarray(got)[0]


def banned(*args, **kwargs) -> list[int]:
    return np.flatnonzero(np.isneginf(scores(*args, **kwargs))).tolist()


def test_defaults_change_nothing():
    np.testing.assert_array_equal(scores([1, 2, 3]), FLAT[0])


def test_repetition_penalty_counts_tokens_once_and_ignores_padding():
    got = scores([7, 1, 2, 2, 5], length=4, first_valid=1, repetition_penalty=2.0)
    np.testing.assert_array_equal(got, [0, 0.5, -2, 2, -2, 3, -3, 4])


def test_repeated_ngrams_are_banned():
    assert banned([1, 2, 3, 1, 2], no_repeat_ngram_size=3) == [3]
    assert banned([1, 2, 1, 3, 1], no_repeat_ngram_size=2) == [2, 3]
    assert banned([1, 2, 1, 3, 1], length=3, no_repeat_ngram_size=2) == [2]
    assert banned([1, 2, 1], no_repeat_ngram_size=1) == [1, 2]
    assert banned([1, 1], no_repeat_ngram_size=3) == []
    assert banned([6, 6, 1, 2, 6], first_valid=2, no_repeat_ngram_size=2) == [
        1,
        6,
    ]  # padding counts
    assert banned([1, 2, 3], no_repeat_ngram_size=9) == []  # longer than the buffer


def test_bad_words_are_banned():
    words = [[3], [1, 4], [2, 2, 5], [7], [6, 7, 1, 2, 0]]
    assert banned([0, 1], bad_words_ids=words, eos=(7,)) == [3, 4]
    assert banned([2, 2, 9], length=2, bad_words_ids=words) == [3, 5, 7]
    assert banned([2, 2, 1], length=1, bad_words_ids=words, eos=(7,)) == [3]  # too short


def test_biases_add_up():
    got = scores([0, 1], sequence_bias={(4,): 1.0, (1, 4): 2.0, (0, 1, 4): 4.0, (2, 4): 8.0},
                 logit_bias={4: 0.5, 0: -1})  # fmt: skip
    np.testing.assert_array_equal(got, [-1, 1, -1, 2, 5.5, 3, -3, 4])
    pairs = [[[4], 1.0], [(1, 4), 2.0]]
    assert scores([0, 1], sequence_bias=pairs)[4] == 1


def test_eos_is_banned_before_the_minimum_and_forced_at_the_maximum_length():
    for length, expected in ((2, [5, 6]), (3, [5, 6]), (4, [])):
        assert banned([1] * 4, length=length, min_length=4, eos=(5, 6)) == expected
    forced = scores([1] * 4, max_length=5, forced_eos_token_id=[5, 6])
    np.testing.assert_array_equal(forced, [MINUS] * 5 + [0, 0, MINUS])
    assert banned([1] * 4, max_length=6, forced_eos_token_id=[5, 6]) == []


def test_first_tokens_are_forced_and_suppressed():
    assert np.isfinite(scores([1], prompt=1, forced_bos_token_id=3)).tolist().index(True) == 3
    assert banned([1, 2], forced_bos_token_id=3) == []
    assert banned([1, 2], suppress_tokens=[1], begin_suppress_tokens=[2]) == [1, 2]
    assert banned([1, 2, 3], suppress_tokens=[1], begin_suppress_tokens=[2]) == [1]
    # After a forced second token, the third is the first free one.
    options = dict(prompt=1, forced_bos_token_id=3, begin_suppress_tokens=[2])
    assert banned([1, 3], **options) == [2] and banned([1, 3, 3], **options) == []


def test_exponential_decay_raises_eos():
    options = dict(exponential_decay_length_penalty=(1, 1.5), eos=(4, 5))
    np.testing.assert_array_equal(scores([1] * 3, **options), FLAT[0])
    expected = FLAT[0].copy()
    expected[4:6] += np.abs(expected[4:6]) * (1.5**2 - 1)
    np.testing.assert_allclose(scores([1] * 5, **options), expected)


def test_custom_processors_come_last():
    context = ProcessorContext(jnp.array([[1, 2]]), *(jnp.array([n]) for n in (2, 0, 2, 0, 9)))
    options = row_options([GenerationOptions(suppress_tokens=[0])], [()])
    got = apply_processors(
        jnp.asarray(FLAT), context, options, (), (lambda ids, n, s: s.at[:, 0].set(9),)
    )
    assert got[0, 0] == 9
