"""Errors for bad arguments of a forward pass."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from btlm_jax import make_mesh
from support import golden


def test_a_full_cache_is_an_error_or_nan_under_jit(tiny):
    model, params = tiny
    cache = model.init_cache(params, 1, 4)
    with pytest.raises(ValueError, match=r"holds 4 tokens.*5 more do not fit"):
        model.apply(params, np.ones((1, 5), int), cache=cache)
    _, full = model.apply(params, np.ones((1, 3), int), cache=cache)
    with pytest.raises(ValueError, match="3 are used, and 2 more"):
        model.apply(params, np.ones((1, 2), int), cache=full)
    jitted = jax.jit(lambda p, c: model.apply(p, np.ones((1, 2), int), cache=c)[0])
    assert np.isnan(jitted(params, full)).all()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(input_ids=np.ones(3, int)), "input_ids: found shape"),
        (dict(input_ids=np.ones((1, 0), int)), "input_ids: found shape"),
        (dict(input_ids=np.ones((1, 3))), "input_ids: found dtype float"),
        (dict(attention_mask=np.ones((1, 2), int)), "attention_mask: found shape"),
        (dict(segment_ids=np.ones((2, 3), int)), "segment_ids: found shape"),
        (dict(positions=np.ones((1, 3))), "positions: found dtype"),
    ],
)
def test_shapes_and_dtypes_are_checked(tiny, kwargs, message):
    model, params = tiny
    kwargs = {"input_ids": np.ones((1, 3), int), **kwargs}
    with pytest.raises(ValueError, match=message):
        model.apply(params, kwargs.pop("input_ids"), **kwargs)


def test_a_cache_of_another_batch_or_mesh_is_refused(tiny):
    model, params = tiny
    ids = np.ones((1, 3), int)
    with pytest.raises(
        ValueError, match=r"cache: found 2 layers of \[2, 4, 8, 16\], expected 2 of"
    ):
        model.apply(params, ids, cache=model.init_cache(params, 2, 8))
    sharded = model.init(
        jax.random.key(0), mesh=make_mesh(fsdp=1, tensor=2, devices=jax.devices()[:2])
    )
    with pytest.raises(ValueError, match="not on the mesh of the weights"):
        model.apply(sharded, ids, cache=model.init_cache(params, 1, 8))


def test_learned_positions_are_bounded():
    case = golden.load("f_learned_gelu_mup")
    with pytest.raises(ValueError, match="65 tokens exceed n_positions = 64"):
        case.model.apply(case.params, np.ones((1, 65), int))
    with pytest.raises(ValueError, match="pass positions"):
        case.model.apply(case.params, np.ones((1, 4), int), segment_ids=np.ones((1, 4), int))


def test_a_batch_that_does_not_divide_is_refused(tiny):
    model, _ = tiny
    params = model.init(jax.random.key(0), mesh=make_mesh(fsdp=8))
    with pytest.raises(ValueError, match="batch size 3 does not divide"):
        model.apply(params, np.ones((3, 4), int))
