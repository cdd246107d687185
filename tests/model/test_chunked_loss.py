"""The chunked loss of the head against float64."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from btlm_jax import BTLMConfig, make_mesh
from btlm_jax.model import chunked_loss, sharding
from btlm_jax.model.chunked_loss import IGNORE, cross_entropy, head_loss, token_predictions
from btlm_jax.model.head import project_logits
from btlm_jax.model.runtime import Runtime


def exact_cross_entropy(logits, labels):
    """Float64 -log softmax(logits)[label]; 0 where the label is ignored."""
    x = np.asarray(logits, np.float64)
    top = x.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[..., 0]
    chosen = np.take_along_axis(x, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return np.where(labels == IGNORE, 0.0, lse - chosen)


def test_cross_entropy_and_its_gradient_equal_float64():
    rng = np.random.default_rng(0)
    logits = (20 * rng.normal(size=(2, 5, 33))).astype(np.float32)
    labels = rng.integers(0, 33, (2, 5))
    labels[0, 3] = IGNORE
    got = cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    # fp32 of values up to 60.
    np.testing.assert_allclose(got, exact_cross_entropy(logits, labels), atol=1e-5)
    grad = jax.grad(lambda x: cross_entropy(x, jnp.asarray(labels)).sum())(jnp.asarray(logits))
    p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expected = np.where((labels == IGNORE)[..., None], 0, p - np.eye(33)[np.maximum(labels, 0)])
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def head(dtype="float32", sizes=None, tied=True, vocab_size=509, width=64):
    """Returns (runtime, params, weight as a NumPy array) of a head without a model."""
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
    w_padded = jnp.asarray(np.pad(w, ((0, pad.get("vocab", vocab_size) - vocab_size), (0, 0))))
    if mesh:
        spec = runtime.axes("vocab", "embed")
        w_padded = jax.device_put(w_padded, NamedSharding(mesh, spec))
    return runtime, {"wte" if tied else "lm_head": w_padded}, w


def states(runtime, mesh, shape):
    """Returns final states, targets (some ignored) and weights, on the mesh."""
    rng = np.random.default_rng(8)
    h = rng.normal(size=(*shape, runtime.config.n_embd)).astype(np.float32)
    targets = rng.integers(0, runtime.config.vocab_size, shape).astype(np.int32)
    targets[0, 3:6] = IGNORE
    weights = rng.uniform(0, 2, shape).astype(np.float32)
    weights[-1, 1] = 0
    arrays = jnp.asarray(h, runtime.dtype), jnp.asarray(targets), jnp.asarray(weights)
    if mesh:
        axes = ("batch", "sequence", None), ("batch", "sequence"), ("batch", "sequence")
        arrays = tuple(
            jax.device_put(x, NamedSharding(mesh, runtime.axes(*p)))
            for x, p in zip(arrays, axes, strict=True)
        )
    return arrays


def exact_head(runtime, w, h, targets, weights=None, z_loss=0.0):
    """Returns float64 (objective, loss alone, sum of weights, gradient by h, gradient by w)."""
    c = runtime.config
    h, w, targets = np.asarray(h, np.float64), np.asarray(w, np.float64), np.asarray(targets)
    counted = (targets != IGNORE) * (1.0 if weights is None else np.asarray(weights, np.float64))
    logits = h @ w.T * c.logits_scale
    top = logits.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[..., 0]
    nll = (exact_cross_entropy(logits, targets) * counted).sum()
    p = np.exp(logits - lse[..., None])
    hit = np.eye(c.vocab_size)[np.maximum(targets, 0)]
    d = (p * (1 + 2 * z_loss * lse)[..., None] - hit) * counted[..., None] * c.logits_scale
    objective = nll + z_loss * (counted * lse**2).sum()
    return objective, nll, counted.sum(), d @ w, np.einsum("btv,btd->vd", d, h)


def loss_and_gradients(runtime, z_loss=0.0, factor=1.0, rows=chunked_loss.ROWS):
    """Returns a function of (params, h, targets, weights): ((objective, LossSum), gradients)."""

    def objective(params, h, targets, weights=None):
        value, loss = head_loss(runtime, params, h, targets, weights, z_loss, rows)
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
def test_head_loss_and_gradients_equal_float64(sizes, weighted, z_loss):
    """With ignored rows, a padded vocabulary, and a last chunk that is not full."""
    runtime, params, w = head(sizes=sizes, tied=weighted)
    mesh = sharding.concrete_mesh_of(*params.values())
    h, targets, weights = states(runtime, mesh, (8, 10))
    weights = weights if weighted else None
    run = loss_and_gradients(runtime, z_loss, rows=7)
    (value, loss), (dw, dh) = run(params, h, targets, weights)
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
def test_token_predictions_equal_float64(sizes):
    """With ignored rows, unknown ids, a padded vocabulary, and a last chunk that is not full."""
    predict = functools.partial(token_predictions, rows=7)
    runtime, params, w = head(sizes=sizes)
    h, targets, _ = states(runtime, sharding.concrete_mesh_of(*params.values()), (8, 10))
    logits = np.asarray(h, np.float64) @ w.T.astype(np.float64) * runtime.config.logits_scale
    expected = exact_cross_entropy(logits, np.asarray(targets))
    nll, _ = predict(runtime, params, h, targets)
    assert nll.dtype == jnp.float32
    # fp32 sums of 509 terms, and differences of logits of up to 60; measured: 8e-6.
    np.testing.assert_allclose(nll, expected, atol=2e-5)
    assert (np.asarray(nll)[0, 3:6] == 0).all()
    unknown = jnp.where(targets == int(np.asarray(targets)[1, 1]), 509, targets)
    nll = np.asarray(predict(runtime, params, h, unknown).nll)
    assert (np.isnan(nll) == (np.asarray(unknown) == 509)).all() and np.isnan(nll[1, 1])


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_likeliest_is_the_argmax_over_all_shards(sizes):
    """Among equal logits it is the lowest id, whichever shard of the vocabulary holds it."""
    runtime, params, w = head(sizes=sizes)
    mesh = sharding.concrete_mesh_of(*params.values())
    h, targets, _ = states(runtime, mesh, (8, 16))
    w[300] = w[17]
    ((name, w_padded),) = params.items()
    w_tied = np.pad(w, ((0, w_padded.shape[0] - len(w)), (0, 0)))
    params = {name: jax.device_put(w_tied, w_padded.sharding)}
    states_, labels = np.array(h), np.array(targets)
    states_[:, :8] = 3 * w[17]
    best = (states_ @ w.T).argmax(-1)
    labels[:, :4], labels[:, 4:8], labels[:, 8:12] = 17, 300, best[:, 8:12]
    h, targets = (jax.device_put(x, y.sharding) for x, y in ((states_, h), (labels, targets)))
    likeliest = np.asarray(token_predictions(runtime, params, h, targets).likeliest)
    assert likeliest[:, :4].all() and not likeliest[:, 4:8].any()
    assert likeliest[:, 8:12].all() and (likeliest == (best == labels)).all()


def test_full_logits_are_never_materialized():
    """The program holds 256 rows of the [4096, 2048] logits (34 MB) at a time."""
    runtime, params, _ = head(vocab_size=2048)
    h, targets, weights = states(runtime, None, (2, 2048))
    run = loss_and_gradients(runtime, 1e-4, rows=256)
    compiled = run.lower(params, h, targets, weights).compile()
    logits = 4 * 4096 * 2048
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 4  # measured: an eighth
    shapes = re.findall(r"(?:f32|bf16|pred)\[([\d,]+)\]", compiled.as_text())
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)
    assert largest == 256 * 2048


def test_bf16_gradients_are_as_accurate_as_those_of_full_logits():
    """With 64 chunks, dW summed in bf16 would be off by 4e-3."""
    runtime, params, w = head("bfloat16", vocab_size=512)
    h, targets, _ = states(runtime, None, (1, 4096))
    rounded = np.asarray(jnp.asarray(w, jnp.bfloat16), np.float64)
    *_, exact_dh, exact_dw = exact_head(runtime, rounded, h, targets)

    def plain(params, h):
        return cross_entropy(project_logits(runtime, params, h), targets).sum()

    def errors(gradients):
        pairs = zip((gradients[0]["wte"], gradients[1]), (exact_dw, exact_dh), strict=True)
        return [np.linalg.norm(np.asarray(a, float) - b) / np.linalg.norm(b) for a, b in pairs]

    _, gradients = loss_and_gradients(runtime, rows=64)(params, h, targets)
    assert gradients[1].dtype == jnp.bfloat16 and gradients[0]["wte"].dtype == jnp.float32
    chunked, full = errors(gradients), errors(jax.grad(plain, (0, 1))(params, h))
    # With full logits dW is rounded, and on CPU the gradient of the logits is not.
    assert chunked[0] < 1.05 * full[0] and chunked[1] < 2.5e-3 and full[1] < 2.5e-3, (chunked, full)


def test_the_factor_of_the_loss_is_not_rounded():
    """0.3 is 0.30078 in bf16, which would make every gradient larger by 2.6e-3."""
    runtime, params, _ = head("bfloat16", vocab_size=512)
    h, targets, _ = states(runtime, None, (1, 64))
    runs = [loss_and_gradients(runtime, 0.0, factor) for factor in (1.0, 0.3)]
    one, scaled = (np.asarray(run(params, h, targets)[1][1], np.float64) for run in runs)
    assert (one * scaled).sum() / (one * one).sum() == pytest.approx(0.3, rel=5e-4)


def test_equal_weights_do_not_change_the_mean():
    """Ignored labels have no weight, and small sums of weights divide too."""
    runtime, params, _ = head()
    h, targets, weights = states(runtime, None, (2, 10))
    _, plain = head_loss(runtime, params, h, targets)
    _, weighted = head_loss(runtime, params, h, targets, jnp.full((2, 10), 1e-3))
    assert float(weighted.tokens) == pytest.approx(17e-3)
    assert float(weighted.mean) == pytest.approx(float(plain.mean), rel=1e-6)
    nothing = jnp.where(targets == IGNORE, weights, 0.0)
    _, none = head_loss(runtime, params, h.at[:, 3:].set(jnp.nan), targets, nothing)
    assert float(none.tokens) == 0 and float(none.nll) == 0
