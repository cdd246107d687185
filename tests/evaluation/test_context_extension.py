"""Kinds of ALiBi scaling, and the models that support them."""

from __future__ import annotations

import dataclasses

import pytest

from btlm_jax import BTLM, BTLMConfig
from btlm_jax.config import AlibiScaling
from btlm_jax.evaluation import context_extension
from support import golden

KINDS = ("none", "fixed", "dynamic")


def test_each_kind_of_scaling_follows_from_lengths_and_the_trained_factor():
    model = BTLM(BTLMConfig.preset("tiny"))

    def scaling(kind, length, base=model, **options):
        return context_extension.with_scaling_kind(
            base, kind, 256, length, **options
        ).config.alibi_scaling

    assert [scaling(k, 1024) for k in KINDS] == [
        None, AlibiScaling(factor=4.0), AlibiScaling(train_seq_len=256)
    ]  # fmt: skip
    assert [scaling(k, 256) for k in KINDS] == [None] * 3
    # The answer to a prompt of the trained length lies beyond it.
    dynamic = AlibiScaling(train_seq_len=256)
    assert [scaling(k, 256, new_tokens=1) for k in KINDS] == [None, None, dynamic]
    assert [scaling(k, 250, new_tokens=6) for k in KINDS] == [None] * 3
    assert scaling("fixed", 512, new_tokens=9) == AlibiScaling(factor=2.0)

    def with_scaling(alibi_scaling):
        return BTLM(dataclasses.replace(model.config, alibi_scaling=alibi_scaling))

    twice = with_scaling(AlibiScaling(factor=2.0))
    assert scaling("none", 1024, twice) == AlibiScaling(factor=2.0)
    assert scaling("fixed", 1024, twice) == AlibiScaling(factor=8.0)
    assert (
        context_extension.scaling_kinds(twice) == ("none", "fixed")
        and context_extension.scaling_kinds(model) == KINDS
    )
    with pytest.raises(ValueError, match=r"the fixed factor 2\.0"):
        scaling("dynamic", 1024, twice)
    assert scaling("none", 1024, with_scaling(AlibiScaling(train_seq_len=99))) is None


def test_the_trained_length_needs_alibi_and_two_tokens():
    model = BTLM(BTLMConfig.preset("tiny"))
    assert (
        context_extension.trained_length(model) == 256
        and context_extension.trained_length(model, 64) == 64
    )
    with pytest.raises(ValueError, match="trained length: found 1"):
        context_extension.trained_length(model, 1)
    with pytest.raises(ValueError, match="found 'learned', expected 'alibi'"):
        context_extension.trained_length(golden.load("f_learned_gelu_mup").model)
