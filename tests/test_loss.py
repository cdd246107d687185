"""Cross-entropy against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btlm_jax import BTLM, BTLMConfig, make_mesh, next_token_loss
from btlm_jax.loss import IGNORE, cross_entropy


def exact(logits, labels):
    x = np.asarray(logits, np.float64)
    top = x.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[..., 0]
    chosen = np.take_along_axis(x, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return np.where(labels == IGNORE, 0.0, lse - chosen)


def test_cross_entropy():
    rng = np.random.default_rng(0)
    logits = (20 * rng.normal(size=(2, 5, 33))).astype(np.float32)
    labels = rng.integers(0, 33, (2, 5))
    labels[0, 3] = IGNORE
    got = cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(got, exact(logits, labels), atol=1e-5)  # fp32 of values up to 60
    grad = jax.grad(lambda x: cross_entropy(x, jnp.asarray(labels)).sum())(jnp.asarray(logits))
    p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expected = np.where((labels == IGNORE)[..., None], 0, p - np.eye(33)[np.maximum(labels, 0)])
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_sums_add_up(tiny):
    model, params = tiny
    ids = np.random.default_rng(0).integers(0, 512, (4, 9))
    whole = next_token_loss(model, params, ids)
    parts = [next_token_loss(model, params, ids[i : i + 1]) for i in range(4)]
    assert float(whole.tokens) == 32
    np.testing.assert_allclose(sum(float(p.nll) for p in parts), float(whole.nll), rtol=1e-6)
    by_logits = exact(model.apply(params, ids)[:, :-1], ids[:, 1:])
    np.testing.assert_allclose(float(whole.mean), by_logits.mean(), rtol=1e-6)


def test_default_labels_skip_padding_and_segment_starts(tiny):
    model, params = tiny
    ids = np.random.default_rng(1).integers(0, 512, (1, 8))
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 1]])
    assert float(next_token_loss(model, params, ids, attention_mask=mask).tokens) == 5
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 3]])
    assert float(next_token_loss(model, params, ids, segment_ids=segments).tokens) == 5
    none = next_token_loss(model, params, ids, labels=np.full_like(ids, IGNORE))
    assert float(none.tokens) == 0 and float(none.mean) == 0


def test_padded_vocabulary_is_masked(caplog):
    import dataclasses

    model = BTLM(dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=509))
    ids = np.random.default_rng(2).integers(0, 509, (2, 9))
    one = model.init(jax.random.key(0))
    many = model.init(jax.random.key(0), mesh=make_mesh(fsdp=2, tensor=4))
    assert many["wte"].shape[0] == 512
    a, b = (float(next_token_loss(model, p, ids).mean) for p in (one, many))
    assert abs(a - b) < 1e-5


def test_wrong_labels(tiny):
    model, params = tiny
    with pytest.raises(ValueError, match="labels: found shape"):
        next_token_loss(model, params, np.ones((1, 4), int), labels=np.ones((1, 3), int))


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.uint32])
def test_token_files_may_be_unsigned(tiny, dtype):
    model, params = tiny
    ids = np.random.default_rng(3).integers(0, 512, (2, 8))
    segments = np.repeat([[1, 1, 1, 2, 2, 2, 2, 3]], 2, 0)
    expected = next_token_loss(model, params, ids, segment_ids=segments)
    got = next_token_loss(model, params, ids.astype(dtype), segment_ids=segments)
    assert float(got.tokens) == float(expected.tokens) == 10
    assert float(got.nll) == float(expected.nll)


def test_labels_outside_the_vocabulary_are_visible(tiny):
    model, params = tiny
    ids = np.random.default_rng(4).integers(0, 512, (1, 8))
    for bad in (-1, 512):
        labels = ids.copy()
        labels[0, 3] = bad
        assert np.isnan(float(next_token_loss(model, params, ids, labels=labels).mean))
    with pytest.raises(ValueError, match="labels: found dtype float32, expected integers"):
        next_token_loss(model, params, ids, labels=ids + 0.5)
