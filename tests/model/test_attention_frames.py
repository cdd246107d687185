"""How far it is from a call of attention to the softmax, for whoever reads a stack trace."""

from __future__ import annotations

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btlm_jax import BTLM, BTLMConfig, make_mesh
from btlm_jax.model import attention

KEY = jax.random.key(0)
# No other test traces a model of this size, and a program is traced once.
MODEL = BTLM(dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=77))


@pytest.fixture
def frames(monkeypatch):
    """Returns the names of our functions between `attention` and the softmax, once it ran."""
    names, softmax = [], jax.nn.softmax
    entries = "attention", "cached_attention"

    def record(*args, **kwargs):
        ours = [f.function for f in inspect.stack() if "/btlm_jax/model/" in f.filename]
        entry = next(i for i, name in enumerate(ours) if name in entries)
        names.append(ours[:entry])
        return softmax(*args, **kwargs)

    monkeypatch.setattr(jax.nn, "softmax", record)
    return names


def queries(H: int, T: int):
    return [jax.ShapeDtypeStruct((2, H, T, 8), jnp.float32)] * 3


def test_at_most_four_frames_lead_to_the_softmax_on_one_device(frames):
    """Long sequences are computed in chunks of queries."""
    for T in (6, 9000):
        jax.eval_shape(lambda *x: attention.attention(*x, slopes_H=jnp.ones(2)), *queries(2, T))
    assert frames and max(map(len, frames)) <= 4, frames


def test_at_most_four_frames_lead_to_the_softmax_where_sequences_are_split(frames, monkeypatch):
    """Keys and values are gathered in groups of heads."""
    monkeypatch.setattr(attention, "_MAX_GATHERED_BYTES", 1)
    mesh = make_mesh(fsdp=2, context=2, tensor=2)
    shard = jax.P("fsdp", "tensor", "context")

    def attend(*arrays):
        slopes = jax.reshard(jnp.ones(4), jax.P("tensor"))
        arrays = (jax.reshard(x, shard) for x in arrays)
        return attention.attention(*arrays, slopes_H=slopes, shard=shard, implementation="xla")

    with jax.set_mesh(mesh):
        jax.eval_shape(attend, *queries(4, 16))
    assert frames and max(map(len, frames)) <= 4, frames


def test_at_most_four_frames_lead_to_the_softmax_over_a_cache(frames):
    def prompt_and_step(params):
        ids = np.zeros((1, 3), np.int32)
        _, cache = MODEL.apply(params, ids, cache=MODEL.init_cache(params, 1, 8))
        return MODEL.apply(params, ids[:, :1], cache=cache)

    jax.eval_shape(prompt_and_step, jax.eval_shape(MODEL.init, KEY))
    assert frames and max(map(len, frames)) <= 4, frames
