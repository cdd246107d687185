"""Cross-entropy against float64."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from btlm_jax import BTLM, BTLMConfig, make_mesh, next_token_loss
from btlm_jax.model import loss as loss_module
from btlm_jax.model import sharding
from btlm_jax.model.layers import project_logits
from btlm_jax.model.loss import IGNORE, cross_entropy, head_loss, target_loss, token_predictions
from btlm_jax.model.runtime import Runtime
from btlm_jax.train.step import init_state, make_step


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
    model = BTLM(dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=509))
    ids = np.random.default_rng(2).integers(0, 509, (2, 9))
    one = model.init(jax.random.key(0))
    many = model.init(jax.random.key(0), mesh=make_mesh(fsdp=2, tensor=4))
    assert many["wte"].shape[0] == 512
    a, b = (float(next_token_loss(model, p, ids).mean) for p in (one, many))
    assert abs(a - b) < 1e-5


def head(dtype="float32", sizes=None, tied=True, vocab_size=509, width=64):
    """A head alone: what `head_loss` needs of a model, and its weight as a NumPy array."""
    config = dataclasses.replace(
        BTLMConfig.preset("tiny"),
        vocab_size=vocab_size,
        n_embd=width,
        tie_word_embeddings=tied,
    )
    w = np.random.default_rng(7).normal(size=(vocab_size, width)).astype(np.float32)
    devices = jax.devices()[: np.prod(list(sizes.values()))] if sizes else None
    mesh = make_mesh(**sizes, devices=devices) if sizes else None
    pad = sharding.param_padding(config, mesh) if mesh else {}
    runtime = Runtime(
        config,
        jnp.dtype(dtype),
        sharding.RULES,
        tuple(pad.items()),
        mesh.abstract_mesh if mesh else None,
        None,
        "none",
    )
    placed = jnp.asarray(np.pad(w, ((0, pad.get("vocab", vocab_size) - vocab_size), (0, 0))))
    if mesh:
        placed = jax.device_put(placed, NamedSharding(mesh, runtime.axes("vocab", "embed")))
    return runtime, {"wte" if tied else "lm_head": placed}, w


def states(runtime, mesh, shape):
    """Final states, targets (some left out) and weights, on the mesh."""
    rng = np.random.default_rng(8)
    h = rng.normal(size=(*shape, runtime.config.n_embd)).astype(np.float32)
    targets = rng.integers(0, runtime.config.vocab_size, shape).astype(np.int32)
    targets[0, 3:6] = IGNORE
    weights = rng.uniform(0, 2, shape).astype(np.float32)
    weights[-1, 1] = 0
    arrays = jnp.asarray(h, runtime.dtype), jnp.asarray(targets), jnp.asarray(weights)
    if mesh:
        places = ("batch", "sequence", None), ("batch", "sequence"), ("batch", "sequence")
        arrays = tuple(
            jax.device_put(x, NamedSharding(mesh, runtime.axes(*p)))
            for x, p in zip(arrays, places, strict=True)
        )
    return arrays


def exact_head(runtime, w, h, targets, weights=None, z_loss=0.0):
    """In float64: the objective, the loss alone, the weights' sum, and the gradients by h and w."""
    c = runtime.config
    h, w, targets = np.asarray(h, np.float64), np.asarray(w, np.float64), np.asarray(targets)
    counted = (targets != IGNORE) * (1.0 if weights is None else np.asarray(weights, np.float64))
    logits = h @ w.T * c.logits_scale
    top = logits.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[..., 0]
    nll = (exact(logits, targets) * counted).sum()
    p = np.exp(logits - lse[..., None])
    hit = np.eye(c.vocab_size)[np.maximum(targets, 0)]
    d = (p * (1 + 2 * z_loss * lse)[..., None] - hit) * counted[..., None] * c.logits_scale
    objective = nll + z_loss * (counted * lse**2).sum()
    return objective, nll, counted.sum(), d @ w, np.einsum("btv,btd->vd", d, h)


def both(runtime, z_loss=0.0, factor=1.0):
    """A function of (params, h, targets, weights): objective, LossSum, and the gradients."""

    def objective(params, h, targets, weights=None):
        value, loss = head_loss(runtime, params, h, targets, weights, z_loss)
        return factor * value, loss

    return jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))


MESHES = [
    None,
    dict(fsdp=1),
    dict(data=8, fsdp=1),
    dict(data=2, fsdp=2, tensor=2),
    dict(fsdp=2, context=2, tensor=2),
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("weighted, z_loss", [(False, 0.0), (True, 1e-2)])
def test_head_loss_against_float64(monkeypatch, sizes, weighted, z_loss):
    """With rows left out, a padded vocabulary, and a last chunk that is not full."""
    monkeypatch.setattr(loss_module, "ROWS", 7)
    jax.clear_caches()  # ROWS is no argument
    runtime, params, w = head(sizes=sizes, tied=weighted)
    mesh = sharding.concrete_mesh_of(*params.values())
    h, targets, weights = states(runtime, mesh, (8, 10))
    weights = weights if weighted else None
    (value, loss), (dw, dh) = both(runtime, z_loss)(params, h, targets, weights)
    objective, nll, tokens, exact_dh, exact_dw = exact_head(runtime, w, h, targets, weights, z_loss)
    # fp32 sums of up to 509 terms; measured: 2e-7, gradients 1e-6.
    assert float(value) == pytest.approx(objective, rel=1e-6)
    assert float(loss.nll) == pytest.approx(nll, rel=1e-6)
    assert float(loss.tokens) == pytest.approx(tokens, rel=1e-6)
    ((name, dw),) = dw.items()
    assert dw.sharding == params[name].sharding and dh.sharding == h.sharding
    dw = np.asarray(dw)
    assert not dw[len(w) :].any()
    np.testing.assert_allclose(dw[: len(w)], exact_dw, atol=5e-6 * np.abs(exact_dw).max())
    np.testing.assert_allclose(dh, exact_dh, atol=5e-6 * np.abs(exact_dh).max())


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_token_predictions_against_float64(monkeypatch, sizes):
    """With rows left out, unknown ids, a padded vocabulary, and a last chunk that is not full."""
    monkeypatch.setattr(loss_module, "ROWS", 7)
    jax.clear_caches()  # ROWS is no argument
    runtime, params, w = head(sizes=sizes)
    h, targets, _ = states(runtime, sharding.concrete_mesh_of(*params.values()), (8, 10))
    logits = np.asarray(h, np.float64) @ w.T.astype(np.float64) * runtime.config.logits_scale
    expected = exact(logits, np.asarray(targets))
    found, _ = token_predictions(runtime, params, h, targets)
    assert found.dtype == jnp.float32
    # fp32 sums of 509 terms, and differences of logits of up to 60; measured: 8e-6.
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert (np.asarray(found)[0, 3:6] == 0).all()
    strange = jnp.where(targets == int(np.asarray(targets)[1, 1]), 509, targets)
    found = np.asarray(token_predictions(runtime, params, h, strange).nll)
    assert (np.isnan(found) == (np.asarray(strange) == 509)).all() and np.isnan(found[1, 1])


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_likeliest_token(sizes):
    """As argmax of all: of equal ones the first, on whichever shard of the vocabulary it is."""
    runtime, params, w = head(sizes=sizes)
    mesh = sharding.concrete_mesh_of(*params.values())
    h, targets, _ = states(runtime, mesh, (8, 16))
    w[300] = w[17]
    ((name, placed),) = params.items()
    rows = np.pad(w, ((0, placed.shape[0] - len(w)), (0, 0)))
    params = {name: jax.device_put(rows, placed.sharding)}
    states_, labels = np.array(h), np.array(targets)
    states_[:, :8] = 3 * w[17]
    best = (states_ @ w.T).argmax(-1)
    labels[:, :4], labels[:, 4:8], labels[:, 8:12] = 17, 300, best[:, 8:12]
    h, targets = (jax.device_put(x, y.sharding) for x, y in ((states_, h), (labels, targets)))
    likeliest = np.asarray(token_predictions(runtime, params, h, targets).likeliest)
    assert likeliest[:, :4].all() and not likeliest[:, 4:8].any()
    assert likeliest[:, 8:12].all() and (likeliest == (best == labels)).all()


@pytest.mark.parametrize("sizes", [None, dict(fsdp=2, context=2, tensor=2)], ids=str)
def test_equals_the_plain_loss(sizes):
    """Through the model: the loss and every gradient, to fp32 rounding."""
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


def test_microbatches_on_a_mesh():
    """A training step of two microbatches, with z-loss, is the plain one of all of them."""
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


def test_logits_are_never_whole(monkeypatch):
    """Of [4096, 2048] logits, 34 MB, the program holds 256 rows at a time."""
    monkeypatch.setattr(loss_module, "ROWS", 256)
    jax.clear_caches()
    runtime, params, _ = head(vocab_size=2048)
    h, targets, weights = states(runtime, None, (2, 2048))
    compiled = both(runtime, 1e-4).lower(params, h, targets, weights).compile()
    logits = 4 * 4096 * 2048
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 4  # measured: an eighth
    found = re.findall(r"(?:f32|bf16|pred)\[([\d,]+)\]", compiled.as_text())
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in found)
    assert largest == 256 * 2048


def test_bf16_gradients_are_no_worse_than_the_plain_ones(monkeypatch):
    """64 chunks: dW summed in bf16 would be off by 4e-3."""
    monkeypatch.setattr(loss_module, "ROWS", 64)
    jax.clear_caches()
    runtime, params, w = head("bfloat16", vocab_size=512)
    h, targets, _ = states(runtime, None, (1, 4096))
    rounded = np.asarray(jnp.asarray(w, jnp.bfloat16), np.float64)
    *_, exact_dh, exact_dw = exact_head(runtime, rounded, h, targets)

    def plain(params, h):
        return cross_entropy(project_logits(runtime, params, h), targets).sum()

    def errors(gradients):
        pairs = zip((gradients[0]["wte"], gradients[1]), (exact_dw, exact_dh), strict=True)
        return [np.linalg.norm(np.asarray(a, float) - b) / np.linalg.norm(b) for a, b in pairs]

    _, gradients = both(runtime)(params, h, targets)
    assert gradients[1].dtype == jnp.bfloat16 and gradients[0]["wte"].dtype == jnp.float32
    ours, others = errors(gradients), errors(jax.grad(plain, (0, 1))(params, h))
    # The plain ones round dW, and on CPU no logit's gradient.
    assert ours[0] < 1.05 * others[0] and ours[1] < 2.5e-3 and others[1] < 2.5e-3, (ours, others)


def test_a_factor_is_not_rounded():
    """0.3 is 0.30078 in bf16: it would make every gradient larger by 2.6e-3."""
    runtime, params, _ = head("bfloat16", vocab_size=512)
    h, targets, _ = states(runtime, None, (1, 64))
    one, other = (both(runtime, 0.0, f)(params, h, targets)[1][1] for f in (1.0, 0.3))
    one, other = (np.asarray(g, np.float64) for g in (one, other))
    assert (one * other).sum() / (one * one).sum() == pytest.approx(0.3, rel=5e-4)


def test_weights():
    """One weight for all changes no mean; labels left out have none; small sums divide too."""
    runtime, params, _ = head()
    h, targets, weights = states(runtime, None, (2, 10))
    _, plain = head_loss(runtime, params, h, targets)
    _, same = head_loss(runtime, params, h, targets, jnp.full((2, 10), 1e-3))
    assert float(same.tokens) == pytest.approx(17e-3)
    assert float(same.mean) == pytest.approx(float(plain.mean), rel=1e-6)
    nothing = jnp.where(targets == IGNORE, weights, 0.0)
    _, none = head_loss(runtime, params, h.at[:, 3:].set(jnp.nan), targets, nothing)
    assert float(none.tokens) == 0 and float(none.nll) == 0


def test_wrong_labels(tiny):
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
