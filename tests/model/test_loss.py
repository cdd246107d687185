"""The next-token loss of a model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from btlm_jax import BTLM, BTLMConfig, make_mesh, next_token_loss
from btlm_jax.model import sharding
from btlm_jax.model.chunked_loss import IGNORE, cross_entropy
from btlm_jax.model.loss import target_loss
from btlm_jax.train.batches import document_segments
from btlm_jax.train.step import init_state, make_eval_step, make_step
from support import reference_numpy


def test_sums_of_rows_add_up_to_the_batch(tiny):
    model, params = tiny
    ids = np.random.default_rng(0).integers(0, 512, (4, 9))
    whole = next_token_loss(model, params, ids)
    parts = [next_token_loss(model, params, ids[i : i + 1]) for i in range(4)]
    assert float(whole.tokens) == 32
    np.testing.assert_allclose(sum(float(p.nll) for p in parts), float(whole.nll), rtol=1e-6)
    expected = reference_numpy.cross_entropy(model.apply(params, ids), ids)
    np.testing.assert_allclose(float(whole.mean), expected, rtol=1e-6)


def test_default_labels_skip_padding_and_segment_starts(tiny):
    model, params = tiny
    ids = np.random.default_rng(1).integers(0, 512, (1, 8))
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 1]])
    assert float(next_token_loss(model, params, ids, attention_mask=mask).tokens) == 5
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 3]])
    assert float(next_token_loss(model, params, ids, segment_ids=segments).tokens) == 5
    none = next_token_loss(model, params, ids, labels=np.full_like(ids, IGNORE))
    assert float(none.tokens) == 0 and float(none.mean) == 0


@pytest.mark.parametrize(
    "positions, sizes",
    [("alibi", None), ("learned", None), ("learned", dict(fsdp=2, context=2, tensor=2))],
)
def test_masked_documents_are_predicted_as_if_each_were_alone_after_eos(positions, sizes):
    """Every token counts once, also the first of a document and the EOS that ends it."""
    config = dataclasses.replace(BTLMConfig.preset("tiny"), position_embedding_type=positions)
    model = BTLM(dataclasses.replace(config, n_layer=1, initializer_range=0.3))
    alone = np.random.default_rng(8).integers(1, 512, (8, 8)).astype(np.int32)
    alone[:, [0, -1]] = 0  # EOS, which a packed row holds once between two documents
    packed = np.concatenate([alone[::4, :1], alone[:, 1:].reshape(2, -1)], 1)
    mesh, batch = None, (packed, document_segments(packed, 0))
    if sizes:
        mesh, spec = make_mesh(**sizes), sharding.partition_spec(sharding.RULES, "batch", None)
        batch = jax.device_put(batch, NamedSharding(mesh, spec))
    got = make_eval_step(model)(model.init(jax.random.key(0), mesh=mesh), *batch)
    expected = target_loss(model, model.init(jax.random.key(0)), alone)[1]
    assert float(got.tokens) == float(expected.tokens) == 56
    assert float(got.nll) == pytest.approx(float(expected.nll), rel=1e-5)


def test_padded_vocabulary_is_masked():
    model = BTLM(dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=509))
    ids = np.random.default_rng(2).integers(0, 509, (2, 9))
    one = model.init(jax.random.key(0))
    many = model.init(jax.random.key(0), mesh=make_mesh(fsdp=2, tensor=4))
    assert many["wte"].shape[0] == 512
    a, b = (float(next_token_loss(model, p, ids).mean) for p in (one, many))
    assert abs(a - b) < 1e-5


@pytest.mark.parametrize("sizes", [None, dict(fsdp=2, context=2, tensor=2)], ids=str)
def test_loss_and_gradients_equal_those_of_full_logits(sizes):
    """Through the model, to fp32 rounding."""
    config = dataclasses.replace(
        BTLMConfig.preset("tiny"), vocab_size=509, initializer_range=0.3, n_layer=1
    )
    model = BTLM(config)
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 509, (4, 16))
    labels, weights = ids.copy(), rng.uniform(0, 1, (4, 16))
    labels[1, 3:6] = IGNORE

    def plain(params):
        nll = cross_entropy(model.apply(params, ids)[:, :-1], jnp.asarray(labels[:, 1:]))
        counted = jnp.where(labels[:, 1:] == IGNORE, 0.0, weights[:, 1:])
        return (nll * counted).sum() / counted.sum()

    def chunked(params):
        return next_token_loss(model, params, ids, labels=labels, weights=weights).mean

    expected, exact_grads = jax.jit(jax.value_and_grad(plain))(model.init(jax.random.key(0)))
    params = model.init(jax.random.key(0), mesh=make_mesh(**sizes) if sizes else None)
    got, grads = jax.jit(jax.value_and_grad(chunked))(params)
    assert float(got) == pytest.approx(float(expected), rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(exact_grads), strict=True):
        a = np.asarray(a)[tuple(slice(n) for n in b.shape)]
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()  # measured 1.5e-6


def test_a_step_of_microbatches_on_a_mesh_equals_one_plain_step():
    """With two microbatches and z-loss."""
    model = BTLM(dataclasses.replace(BTLMConfig.preset("tiny"), n_layer=1, vocab_size=509))
    tokens = np.random.default_rng(9).integers(0, 509, (2, 8, 17)).astype(np.int32)
    tx, z_loss = optax.sgd(1.0), 1e-2
    first = model.init(jax.random.key(0))

    def plain(params):
        x = tokens.reshape(16, 17)
        logits = model.apply(params, x[:, :-1])
        nll = cross_entropy(logits, jnp.asarray(x[:, 1:])).mean()
        return nll + z_loss * (jax.nn.logsumexp(logits, -1) ** 2).mean(), nll

    (_, nll), grads = jax.jit(jax.value_and_grad(plain, has_aux=True))(first)
    expected = jax.tree.map(lambda p, g: np.asarray(p - g), first, grads)
    mesh = make_mesh(fsdp=2, context=2, tensor=2)
    state = init_state(model.init(jax.random.key(0), mesh=mesh), tx)
    batch = jax.device_put(
        tokens, NamedSharding(mesh, sharding.partition_spec(sharding.RULES, None, "batch", None))
    )
    state, metrics = make_step(model, tx, z_loss=z_loss)(state, batch)
    assert float(metrics["loss"]) == pytest.approx(float(nll), rel=1e-6)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        a = np.asarray(a)[tuple(slice(n) for n in b.shape)]
        np.testing.assert_allclose(a, b, atol=2e-6)  # gradients of up to 0.1, in fp32


def test_shapes_of_labels_and_weights_are_checked(tiny):
    model, params = tiny
    with pytest.raises(ValueError, match="labels: found shape"):
        next_token_loss(model, params, np.ones((1, 4), int), labels=np.ones((1, 3), int))
    with pytest.raises(ValueError, match=r"weights: found shape \(1, 3\), expected that of the"):
        next_token_loss(model, params, np.ones((1, 4), int), weights=np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"weights: found shape \(1, 4\), expected .* \(1, 3\)"):
        target_loss(model, params, jnp.ones((1, 4), jnp.int32), weights=np.ones((1, 4)))


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
        grads = jax.grad(lambda p, y=labels: next_token_loss(model, p, ids, labels=y).nll)(params)
        assert np.isnan(np.asarray(grads["wte"])).any()
    with pytest.raises(ValueError, match="labels: found dtype float32, expected integers"):
        next_token_loss(model, params, ids, labels=ids + 0.5)
