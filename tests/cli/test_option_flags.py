"""Flags for the options of `generate` follow from `GenerationOptions`."""

from __future__ import annotations

import dataclasses

import tyro

from btlm_jax.cli import option_flags
from btlm_jax.cli.generate_command import Generate
from btlm_jax.generation.options import GenerationOptions


def parse(*argv: str) -> Generate:
    return tyro.cli(Generate, args=["checkpoint", "--prompt", "a", *argv])


def test_every_option_is_a_flag_or_has_another_form(capsys):
    options = {f.name for f in dataclasses.fields(GenerationOptions)}
    flags = {f.name for f in dataclasses.fields(Generate)}
    assert options - flags == {"do_sample", "bad_words_ids", "sequence_bias"}
    docs = option_flags._option_docs()
    assert docs.keys() == options and all(len(text) > 10 for text in docs.values())


def test_flags_that_are_not_given_are_left_to_the_defaults():
    assert option_flags.given_options(parse()) == {}


def test_values_of_flags_are_valid_options():
    argv = (
        "--top-k 0 --epsilon-cutoff 0 --temperature 0.5 --num-beams 2 --early-stopping false "
        "--logit-bias 3 -1.5 --suppress-tokens 4 5 --exponential-decay-length-penalty 2 1.5 "
        "--remove-invalid-values --forced-bos-token-id 0"
    )
    given = option_flags.given_options(parse(*argv.split()))
    assert given == {
        "top_k": 0, "epsilon_cutoff": 0.0, "temperature": 0.5, "num_beams": 2,
        "early_stopping": False, "logit_bias": {3: -1.5}, "suppress_tokens": (4, 5),
        "exponential_decay_length_penalty": (2, 1.5), "remove_invalid_values": True,
        "forced_bos_token_id": 0,
    }  # fmt: skip
    options = GenerationOptions(**given)
    assert options.exponential_decay_length_penalty == (2, 1.5)
