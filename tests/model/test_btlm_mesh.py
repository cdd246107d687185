"""The model on meshes, which pad and split it, against one device."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from btlm_jax import BTLM, BTLMConfig, make_mesh, next_token_loss
from btlm_jax.model.params import flatten_tree
from support import golden
from support.golden import max_error

# Every mesh pads it: 509 tokens, 170 units.
PADDED = BTLM(dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=509))


PADDED_IDS = np.random.default_rng(0).integers(0, 509, (8, 32))


@jax.jit
def logits_and_gradients(params):
    """Returns both from one program, which is cheaper to compile than two."""

    def loss(p):
        return next_token_loss(PADDED, p, PADDED_IDS).mean

    return PADDED.apply(params, PADDED_IDS), jax.grad(loss)(params)


@pytest.fixture(scope="module")
def on_one_device():
    return logits_and_gradients(PADDED.init(jax.random.key(0)))


def padded_params(**sizes):
    devices = jax.devices()[: np.prod([*sizes.values()])]
    return PADDED.init(jax.random.key(0), mesh=make_mesh(**{"fsdp": 1, **sizes}, devices=devices))


@pytest.mark.parametrize(
    "sizes",
    [
        dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(fsdp=4, context=2),
        dict(data=2, context=2, tensor=2), dict(context=8),
    ],
)  # fmt: skip
def test_meshes_equal_one_device(on_one_device, sizes):
    """Logits and gradients on meshes that force padding."""
    many, (expected, expected_grads) = padded_params(**sizes), on_one_device
    got, got_grads = logits_and_gradients(many)
    assert got.shape == expected.shape
    assert max_error(got, expected) < 1e-5
    expected_grads, got_grads = flatten_tree(expected_grads), flatten_tree(got_grads)
    shardings = flatten_tree(jax.tree.map(lambda x: x.sharding, many))
    for path, e in expected_grads.items():
        g = got_grads[path]
        assert g.sharding == shardings[path]
        padded = np.array(g)
        inner = tuple(slice(n) for n in e.shape)
        assert max_error(padded[inner], e) < 1e-5 * max(1e-3, float(np.abs(e).max()))
        padded[inner] = 0
        assert not padded.any()  # padding gets no gradient


@pytest.mark.parametrize("sizes", [dict(fsdp=4, tensor=2), dict(data=2, context=2, tensor=2)])
def test_caches_on_meshes_equal_one_device(on_one_device, sizes):
    many = padded_params(**sizes)
    cache = PADDED.init_cache(many, 8, 32)
    _, cache = PADDED.apply(many, PADDED_IDS[:, :28], cache=cache)
    step, _ = PADDED.apply(many, PADDED_IDS[:, 28:], cache=cache)
    assert max_error(step, on_one_device[0][:, 28:]) < 1e-5


@pytest.mark.parametrize(
    "name, plain", [("e_alibi_dynamic16", True), ("e_alibi_dynamic16", False),
                    ("f_learned_gelu_mup", False)],
)  # fmt: skip
def test_split_sequences_equal_one_device(name, plain):
    """With all that depends on the position: segments, scaling, positions, query chunks."""
    case = golden.load(name)
    rng, length = np.random.default_rng(0), 1024  # four chunks of queries
    model = BTLM(dataclasses.replace(case.config, n_positions=length))
    ids = rng.integers(0, case.config.vocab_size, (2, length))
    segments = np.sort(rng.integers(1, 5, ids.shape), 1)
    positions = np.arange(length)[None] - np.argmax(segments[:, :, None] == segments[:, None], 2)
    mask = np.arange(length)[None] >= np.array([[0], [350]])
    mesh = make_mesh(data=2, fsdp=1, context=2, devices=jax.devices()[:4])
    one, many = (model.init(jax.random.key(0), mesh=m) for m in (None, mesh))
    options = dict(attention_mask=mask, segment_ids=segments, positions=positions)
    options = {} if plain else options
    expected = model.apply(one, ids, **options)
    got = model.apply(many, ids, **options)
    assert got.sharding.spec[1] == "context"
    assert max_error(got, expected) < 1e-5
    with pytest.raises(ValueError, match=r"length 1023 does not divide over .*context.*, 4 parts"):
        model.apply(many, ids[:, :1023])


@pytest.mark.parametrize("sizes", [dict(fsdp=1), dict(fsdp=1, tensor=2)])
def test_one_row_decodes_on_a_mesh(sizes):
    model = BTLM(BTLMConfig.preset("tiny"))
    mesh = make_mesh(**sizes, devices=jax.devices()[: np.prod([*sizes.values()])])
    one, many = (model.init(jax.random.key(0), mesh=m) for m in (None, mesh))
    ids = np.random.default_rng(0).integers(0, 512, (1, 8))
    cache = model.init_cache(many, 1, 8)
    _, cache = model.apply(many, ids[:, :7], cache=cache)
    got, _ = model.apply(many, ids[:, 7:], cache=cache)
    assert max_error(got, model.apply(one, ids)[:, 7:]) < 1e-5


def test_meshes_not_from_make_mesh_are_refused(tiny):
    model, _ = tiny
    devices = np.array(jax.devices())
    for mesh in (
        jax.make_mesh((8,), ("fsdp",)),
        jax.sharding.Mesh(devices.reshape(1, 8, 1), ("data", "fsdp", "tensor")),
    ):
        with pytest.raises(ValueError, match=r"mesh: found axes .*make it with btlm_jax.make_mesh"):
            model.init(jax.random.key(0), mesh=mesh)
    odd = BTLM(dataclasses.replace(model.config, vocab_size=97))
    with jax.set_mesh(make_mesh(fsdp=4, tensor=2)):
        replicated = odd.init(jax.random.key(0))
        with pytest.raises(ValueError, match=r"wte: axis 'vocab' of size 97[\s\S]*mesh="):
            odd.apply(replicated, np.ones((4, 3), int))
