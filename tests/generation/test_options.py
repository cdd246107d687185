"""Generation options: equal forms, contradictions, names."""

from __future__ import annotations

import numpy as np
import pytest

from btlm_jax.generation.options import GenerationOptions


def test_equivalent_forms_are_equal():
    """Options are static under jit: equal ones share a program."""
    a = GenerationOptions(
        bad_words_ids=[[1, 2], [3]], suppress_tokens=np.array([4, 5]), forced_eos_token_id=6,
        sequence_bias={(1, 2): -1}, logit_bias={7: 2}, top_p=np.float32(0.5), min_p=None,
        top_k=None,
    )  # fmt: skip
    b = GenerationOptions(
        bad_words_ids=((1, 2), (3,), (3,)), suppress_tokens=[4, 5], forced_eos_token_id=[6],
        sequence_bias=[[[1, 2], -1.0]], logit_bias=[(7, 2.0)], top_p=0.5,
    )  # fmt: skip
    assert a == b and hash(a) == hash(b)
    assert (
        GenerationOptions(**dict.fromkeys(("num_beams", "bad_words_ids", "temperature")))
        == GenerationOptions()
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_beams=0), "num_beams: found 0, expected >= 1"),
        (dict(num_beams=2.0), "num_beams: found 2.0"),
        (dict(num_beams=2, num_return_sequences=3), "found 3, expected at most num_beams = 2"),
        (dict(num_return_sequences=2), "greedy decoding has one result; set do_sample=True or num"),
        (dict(early_stopping="always"), "early_stopping: found 'always', expected True, False or"),
        (dict(length_penalty=float("inf")), "length_penalty: found inf"),
        (dict(repetition_penalty=0.0), "repetition_penalty: found 0.0, expected > 0"),
        (dict(no_repeat_ngram_size=-1), "no_repeat_ngram_size: found -1"),
        (dict(bad_words_ids=[[]]), "bad_words_ids: found .* at least one id"),
        (dict(bad_words_ids=[5]), "bad_words_ids: found 5, expected token ids"),
        (dict(bad_words_ids=["five"]), "bad_words_ids: found 'five', expected token ids"),
        (dict(sequence_bias={(1,): float("nan")}), "sequence_bias: found nan"),
        (dict(sequence_bias={(1,): float("inf")}), "sequence_bias: found inf"),
        (dict(sequence_bias=[[1]]), "sequence_bias: found .*, expected"),
        (dict(logit_bias={"a": 1.0}), "logit_bias: found .*, expected token ids"),
        (dict(suppress_tokens=[1.5]), "suppress_tokens: found .*, expected token ids"),
        (dict(exponential_decay_length_penalty=5), "exponential_decay_length_penalty: found 5"),
        (
            dict(forced_bos_token_id=4, suppress_tokens=[3, 4]),
            "forced_bos_token_id: found",
        ),
        (dict(forced_eos_token_id=[4, 3], suppress_tokens=[3, 4]), "all in suppress_tokens"),
        (dict(do_sample=1), "do_sample: found 1, expected a bool"),
        (dict(forced_bos_token_id="x"), r"forced_bos_token_id: found \['x'\]"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**options)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ValueError, match="no argument 'top_kk': did you mean top_k"):
        GenerationOptions.from_kwargs({"top_kk": 1})
    with pytest.raises(ValueError, match="did you mean max_new_tokens"):
        GenerationOptions.from_kwargs({"max_new_token": 1}, ("max_new_tokens",))
    with pytest.raises(ValueError, match="no argument 'qqq': see"):
        GenerationOptions.from_kwargs({"qqq": 1})


def test_tokens_outside_the_vocabulary_are_named():
    GenerationOptions(bad_words_ids=[[9]], forced_bos_token_id=9).check_vocabulary(10)
    for options in (
        dict(bad_words_ids=[[1, 10]]), dict(sequence_bias={(10,): 1}), dict(logit_bias={10: 1}),
        dict(forced_bos_token_id=10), dict(forced_eos_token_id=10), dict(suppress_tokens=[-1]),
        dict(begin_suppress_tokens=[10]),
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=rf"{next(iter(options))}: found \[-?1\d?\], expected ids"
        ):
            GenerationOptions(**options).check_vocabulary(10)


def test_options_without_effect_are_reported():
    assert GenerationOptions().unused == GenerationOptions(do_sample=True, top_k=3).unused == []
    assert GenerationOptions(do_sample=False, top_k=3).unused == [
        "top_k=3 does nothing without do_sample=True"
    ]
    assert GenerationOptions(num_beams=2, early_stopping=True).unused == []
    (message,) = GenerationOptions(early_stopping=True).unused
    assert message == "early_stopping=True does nothing without num_beams > 1"
