"""The arguments of `generate`: what lengths mean, what warns, what is refused."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest

from btlm_jax import generate
from support import golden


def test_length_arguments_bound_the_output(tiny, caplog):
    model, params = tiny
    ids = np.array([[3, 1, 4]])
    free = generate(model, params, ids, max_new_tokens=8, eos_token_id=None)
    np.testing.assert_array_equal(generate(model, params, ids, max_length=6), free[:, :6])
    assert generate(model, params, ids, eos_token_id=None).shape == (1, 23)
    exact = generate(model, params, ids, max_new_tokens=8, eos_token_id=None, cache_length=11)
    np.testing.assert_array_equal(exact, free)
    eos = int(free[0, 3])
    assert generate(model, params, ids, eos_token_id=eos).shape == (1, 4)
    for options in (dict(min_length=7), dict(min_new_tokens=4)):
        output = generate(model, params, ids, eos_token_id=eos, **options)
        assert output.shape[1] > 7 and eos not in output[0, 3:7]
    assert not caplog.records
    output = generate(model, params, ids, eos_token_id=None, max_new_tokens=8, max_length=5)
    np.testing.assert_array_equal(output, free)
    assert "both max_new_tokens and max_length are given: max_new_tokens is used" in caplog.text


def test_options_without_effect_give_warnings(tiny, caplog):
    options = dict(max_new_tokens=1, temperature=0.5, length_penalty=2.0)
    generate(*tiny, np.array([[1]]), output_scores=True, min_new_tokens=2, **options)
    assert [r.getMessage() for r in caplog.records] == [
        "output_scores and output_logits need return_dict_in_generate=True",
        "temperature=0.5 does nothing without do_sample=True",
        "length_penalty=2.0 does nothing without num_beams > 1",
        "at least 2 new tokens are requested, but at most 1 are allowed: rows end there",
    ]


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        (np.zeros((1, 0), int), {}, "no empty prompt"),
        (np.array([[1, 512]]), {}, "found ids from 1 to 512, expected 0 to 511"),
        (np.array([[1, -1]]), {}, "found ids from -1"),
        (np.array([[1.5, 2.0]]), {}, "found dtype float64"),
        (np.array([[1, 2]]), dict(attention_mask=np.array([[1, 0]])), "pad prompts on the left"),
        (np.array([[1, 2]]), dict(attention_mask=np.array([[1]])), "attention_mask: found shape"),
        (np.array([[1, 2]]), dict(max_new_tokens=0), "max_new_tokens: found 0"),
        (np.array([[1, 2]]), dict(cache_length=10), "need 22 cache slots, found cache_length=10"),
        (np.array([[1, 2]]), dict(do_sample=True, temperature=0.0), "temperature: found 0.0"),
        (np.array([[1, 2]]), dict(do_sample=True, top_k=-1), "top_k: found -1"),
        (np.array([[1, 2]]), dict(do_sample=True, top_p=0.0), "top_p: found 0.0"),
        (np.array([[1, 2]]), dict(eos_token_id=np.array([1, 512])), r"eos_token_id: found \[512\]"),
        (np.array([[1, 2]]), dict(eos_token_id="eos"), "eos_token_id: found 'eos'"),
        (np.array([[1, 2]]), dict(attention_mask=np.array([[0, 0]])), "a row is all padding"),
        (np.array([[1, 2]]), dict(max_length=2), "max_length: found 2, expected more than the 2"),
        (np.array([[1, 2]]), dict(seed=[1, 2]), "found 2 seeds, expected one for all or 1"),
        (np.array([[1, 2]]), dict(seed=-1), "seed: found -1"),
        (np.array([[1, 2]]), dict(stop_strings="x"), "found no tokenizer"),
        (np.array([[1, 2]]), dict(num_beam=2), "no argument 'num_beam': did you mean num_beams"),
        (np.array([[1, 2]]), dict(max_lenght=2), "did you mean max_length"),
        (np.array([[1, 2]]), dict(suppress_tokens=[512]), r"suppress_tokens: found \[512\]"),
    ],
)
def test_bad_arguments_are_named(tiny, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(*tiny, prompt, **options)


def test_lengths_beyond_the_trained_context_warn_or_fail(tiny, caplog):
    model, params = tiny
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, n_positions=8))
    with caplog.at_level(logging.WARNING):
        generate(short, params, np.array([[1, 2]]), max_new_tokens=8)
    assert "10 tokens exceed the trained context of 8" in caplog.text
    learned = golden.load("f_learned_gelu_mup")
    with pytest.raises(ValueError, match="exceed the 64 learned positions"):
        generate(learned.model, learned.params, np.ones((1, 60), int), max_new_tokens=5)
