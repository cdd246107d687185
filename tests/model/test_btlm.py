"""The model against itself, and the inputs it refuses."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btlm_jax import BTLM, BTLMConfig, next_token_loss
from btlm_jax.model import alibi
from support import golden
from support.golden import max_error

# Absolute, in fp32.
LOGITS_TOL = 5e-5  # measured: 6.3e-6 plain, 1.2e-5 over all cases and modes


def test_intermediates_are_consistent(tiny):
    """Queries and keys give the attention, and both branches add up to the residual stream."""
    model, params = tiny
    got = model.intermediates(params, np.arange(12).reshape(1, 12))
    positions = np.arange(12)
    slopes = np.asarray(alibi.model_slopes(model.config), np.float32)[:, None, None]
    bias = np.where(
        positions <= positions[:, None], slopes * (positions - positions[:, None]), -np.inf
    )
    logits = jnp.einsum("lbhtk,lbhsk->lbhts", got.queries, got.keys) + bias
    assert max_error(jax.nn.softmax(logits), got.attentions) < 1e-6  # measured 1e-7
    added = got.attention_outputs + got.mlp_outputs
    assert max_error(got.hidden_states[0] + added[0], got.hidden_states[1]) < 1e-5


@pytest.mark.parametrize("name", ["e_alibi_dynamic16", "f_learned_gelu_mup"])
def test_padding_to_a_static_shape_changes_no_logits(name):
    """Only `length` tokens are valid: the scale counts them, later tokens replace the others."""
    case = golden.load(name)
    model, ids = case.model, np.random.default_rng(0).integers(0, case.config.vocab_size, (2, 20))
    padded = np.concatenate([ids[:, :17], np.full((len(ids), 15), 5)], 1)
    expected = model.apply(case.params, ids[:, :17])
    got = model.apply(case.params, padded, length=17)[:, :17]
    assert max_error(got, expected) < LOGITS_TOL

    cache = model.init_cache(case.params, len(ids), 40)
    got, cache = model.apply(case.params, padded, cache=cache, length=17)
    assert max_error(got[:, :17], expected) < LOGITS_TOL
    assert cache.length.tolist() == [17] * len(got)
    plain = model.init_cache(case.params, len(ids), 40)
    _, plain = model.apply(case.params, ids[:, :17], cache=plain)
    for t in range(17, 20):
        got, cache = model.apply(case.params, ids[:, t : t + 1], cache=cache)
        expected, plain = model.apply(case.params, ids[:, t : t + 1], cache=plain)
        assert max_error(got, expected) < LOGITS_TOL


@pytest.mark.parametrize("name", ["a2_btlm_mup_h32", "f_learned_gelu_mup", "i_untied"])
def test_logits_have_no_gradient_by_later_tokens(name):
    """d logits[t] / d input[t+1:] is exactly zero."""
    case = golden.load(name)
    T = 10
    ids = np.arange(T)[None]  # every position has its own row of wte
    other = np.arange(T, case.config.vocab_size)  # logits that a tied head draws from other rows

    def one(params, t):
        return (case.model.apply(params, ids)[0, t, other] ** 2).sum()

    by_input = jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0)))
    grads = np.asarray(by_input(case.params, jnp.arange(T))["wte"])[:, :T]
    for t in range(T):
        assert np.all(grads[t, t + 1 :] == 0)
        assert np.all(np.abs(grads[t, : t + 1]).max(-1) > 0)


@pytest.mark.parametrize("name", ["a2_btlm_mup_h32", "f_learned_gelu_mup"])
def test_packed_documents_equal_separate_ones(name):
    case = golden.load(name)
    rng = np.random.default_rng(0)
    lengths = (5, 1, 9)
    documents = [rng.integers(0, case.config.vocab_size, (1, n)) for n in lengths]
    segments = np.repeat(np.arange(1, 4), lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    got = case.model.apply(
        case.params, np.concatenate(documents, 1), segment_ids=segments, positions=positions
    )
    expected = np.concatenate([case.model.apply(case.params, d) for d in documents], 1)
    assert max_error(got, expected) < 1e-5  # the same sums in another order


@pytest.mark.parametrize("name", ["a2_btlm_mup_h32", "d_alibi_factor4"])
def test_left_padded_equals_unpadded(name):
    case = golden.load(name)
    ids = np.random.default_rng(1).integers(0, case.config.vocab_size, (1, 9))
    padded = np.concatenate([np.zeros((1, 6), int), ids], 1)
    mask = np.arange(15)[None] >= 6
    got = case.model.apply(case.params, padded, attention_mask=mask)[:, 6:]
    assert max_error(got, case.model.apply(case.params, ids)) < 1e-5


def test_scores_of_a_whole_sequence_are_never_materialized():
    model, T = BTLM(BTLMConfig.preset("tiny")), 2048
    params = model.init(jax.random.key(0))

    def loss(p, ids):
        return next_token_loss(model, p, ids).mean

    ids = jnp.zeros((1, T), jnp.int32)
    hlo = jax.jit(jax.value_and_grad(loss)).lower(params, ids).compile().as_text()
    assert re.search(r"\[[\d,]*256,2048\]", hlo), "expected scores of 256 queries by all keys"
    assert re.search(r"\[[\d,]*256,256\]", hlo), "expected the first 256 to visit 256 keys only"
    assert not re.search(r"\[[\d,]*2048,2048\]", hlo)


def test_decoding_continues_the_last_segment(tiny):
    model, params = tiny
    ids = np.random.default_rng(5).integers(0, 512, (1, 9))
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 2]])
    expected = model.apply(params, ids, segment_ids=segments)
    cache = model.init_cache(params, 1, 9)
    _, cache = model.apply(params, ids[:, :6], segment_ids=segments[:, :6], cache=cache)
    got, _ = model.apply(params, ids[:, 6:], cache=cache)
    assert max_error(got, expected[:, 6:]) < 1e-5


def test_padding_is_masked_beside_segments_and_in_a_continued_cache(tiny):
    """No valid token sees what the padding holds."""
    model, params = tiny
    ids = np.random.default_rng(5).integers(0, 512, (1, 9))
    changed = ids.copy()
    changed[0, [1, 6]] += 1
    mask, segments = np.ones((1, 9), int), np.ones((1, 9), int)
    mask[0, [1, 6]] = 0
    _, cache = model.apply(params, ids[:, :6], cache=model.init_cache(params, 1, 9))
    packed = dict(attention_mask=mask, segment_ids=segments)
    continued = dict(attention_mask=mask[:, 6:], cache=cache)
    a, b = (model.apply(params, x, **packed) for x in (ids, changed))
    c, d = (model.apply(params, x[:, 6:], **continued)[0] for x in (ids, changed))
    valid = mask[0] != 0
    np.testing.assert_array_equal(a[:, valid], b[:, valid])
    np.testing.assert_array_equal(c[:, 1:], d[:, 1:])
    assert not np.array_equal(a, b) and not np.array_equal(c, d)


def test_logits_are_fp32_in_64_bit_mode(tiny):
    model, params = tiny
    ids = np.random.default_rng(6).integers(0, 512, (1, 6))
    expected = model.apply(params, ids)
    with jax.enable_x64(True):
        cache = model.init_cache(params, 1, 6)
        _, cache = model.apply(params, ids[:, :5], cache=cache)
        got, _ = model.apply(params, ids[:, 5:], cache=cache)
        assert got.dtype == jnp.float32
        assert max_error(got, expected[:, 5:]) < 1e-5
    assert np.isnan(model.apply(params, ids + 2**32)).all()  # ids do not wrap around


def test_rules_may_be_a_mapping(tiny):
    model, _ = tiny
    other = dataclasses.replace(model, rules=dict(model.rules))
    assert other == model and hash(other) == hash(model)


def test_padded_weights_off_a_mesh_are_refused(tiny):
    model, params = tiny
    smaller = BTLM(dataclasses.replace(model.config, vocab_size=500))
    with pytest.raises(ValueError, match="larger than the configuration off any mesh"):
        smaller.apply(params, np.ones((1, 3), int))


def test_weights_that_do_not_match_the_configuration_are_refused(tiny):
    model, params = tiny
    other = BTLM(dataclasses.replace(model.config, n_layer=3, tie_word_embeddings=False))
    with pytest.raises(ValueError, match=r"missing: lm_head[\s\S]*expected \(3, 64"):
        other.apply(params, np.ones((1, 3), int))


def test_unknown_token_ids_make_logits_nan(tiny):
    model, params = tiny
    logits = np.asarray(model.apply(params, np.array([[1, 2], [1, 512], [1, -1]])))
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1:]).all()
