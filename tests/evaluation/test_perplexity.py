"""Cross-entropy against the float64 witness."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from btlm_jax import BTLM, BTLMConfig, make_mesh
from btlm_jax.config import Positions
from btlm_jax.evaluation.documents import TokenizedDocument
from btlm_jax.evaluation.perplexity import CrossEntropy, cross_entropy
from btlm_jax.evaluation.rolling_windows import cut_rolling_windows
from btlm_jax.utils.compile_cache import count_compilations
from support import golden, reference_numpy
from support.documents import random_documents


def by_witness(case: golden.Case, texts, prefix: int, length: int, stride: int) -> float:
    """Returns the summed nats in float64, with a separate forward pass for each window."""
    total = 0.0
    for document in texts:
        tokens, done = [prefix, *document.ids.tolist()], 0
        while done < len(document.ids):
            end = min(done + (stride if done else length), len(document.ids))
            start = max(0, end - length)
            out = reference_numpy.forward(case.weights, case.hf_config, [tokens[start:end]])
            logits = out["logits"][0]
            targets = tokens[start + 1 : end + 1]
            log_p = log_softmax(logits, -1)[np.arange(len(targets)), targets]
            total -= log_p[done - start :].sum()
            done = end
    return total


@pytest.mark.parametrize("length, stride", [(16, 16), (16, 8), (16, 1), (61, 61)])
@pytest.mark.parametrize("name", ["a2_btlm_mup_h32", "f_learned_gelu_mup", "e_alibi_dynamic16"])
def test_cross_entropy_equals_the_float64_computation(name, length, stride):
    """With learned positions, and with slopes that depend on the length of every window."""
    case = golden.load(name)
    if case.config.positions is not Positions.ALIBI:
        length, stride = min(length, case.config.n_positions), min(stride, case.config.n_positions)
    texts = random_documents(40, 7, 61, 1, vocab=case.config.vocab_size)
    windows = cut_rolling_windows(case.config, texts, 2, length=length, stride=stride)
    loss = cross_entropy(case.model, case.params, windows, batch_size=3)
    expected = by_witness(case, texts, 2, length, stride)
    assert (loss.tokens, loss.text_bytes) == (109, 3 * 109 + 4)
    # The model's logits are off by up to 5e-5 (test_model), so each token by at most twice that.
    assert abs(loss.nats - expected) < 109 * 1e-4


def test_windows_change_the_result():
    """Otherwise the comparison above would hold for any windows."""
    case = golden.load("a2_btlm_mup_h32")
    texts = random_documents(61)
    sums = {by_witness(case, texts, 2, 16, stride) for stride in (16, 8, 1)}
    sums.add(by_witness(case, texts, 3, 16, 16))
    assert np.diff(sorted(sums)).min() > 109 * 1e-4


def test_metrics_follow_from_the_sum():
    loss = CrossEntropy(nats=30 * math.log(8), tokens=30, text_bytes=90)
    assert loss.metrics() == pytest.approx(
        {"nats_per_token": math.log(8), "bits_per_token": 3, "bits_per_byte": 1, "perplexity": 8}
    )
    assert CrossEntropy(1e6, 2, 2).perplexity == math.inf


def test_texts_of_any_length_share_one_program():
    case = golden.load("a2_btlm_mup_h32")
    windows = cut_rolling_windows(
        case.config, random_documents(200, 31, 5), 2, length=32, stride=16
    )
    one = cross_entropy(case.model, case.params, windows, batch_size=4)
    with count_compilations() as compilations:
        cross_entropy(case.model, case.params, windows, batch_size=4)
        other = cut_rolling_windows(case.config, random_documents(9, 77), 2, length=30, stride=7)
        cross_entropy(case.model, case.params, other, batch_size=4)
    assert compilations.count == 0
    # fp32 sums of other rows: 200 tokens, each rounded by 2^-24 of the sum so far.
    for batch_size in (None, 1):
        several = cross_entropy(case.model, case.params, windows, batch_size=batch_size)
        np.testing.assert_allclose(several.nats, one.nats, rtol=1e-5)


def test_a_mesh_gives_the_same_result():
    model = BTLM(BTLMConfig.preset("tiny"))
    texts = random_documents(150, 40, 3, vocab=512)
    windows = cut_rolling_windows(model.config, texts, 2, length=48, stride=24)
    expected = cross_entropy(model, model.init(jax.random.key(0)), windows)
    params = model.init(jax.random.key(0), mesh=make_mesh(data=2, fsdp=1, context=2, tensor=2))
    loss = cross_entropy(model, params, windows)
    assert (loss.tokens, loss.text_bytes) == (expected.tokens, expected.text_bytes)
    np.testing.assert_allclose(loss.nats, expected.nats, rtol=1e-5)
    with pytest.raises(ValueError, match=r"batch size 3 does not divide over mesh axes"):
        cross_entropy(model, params, windows, batch_size=3)


def test_a_loss_that_is_not_finite_is_an_error(tiny):
    model, params = tiny
    beyond = cut_rolling_windows(model.config, [TokenizedDocument(np.array([5, 6, 512]), 3)], 2)
    with pytest.raises(FloatingPointError, match="found nan after 0 tokens"):
        cross_entropy(model, params, beyond)
    with pytest.raises(ValueError, match="batch_size: found 0"):
        cross_entropy(model, params, beyond, batch_size=0)
