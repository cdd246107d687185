"""Meshes, rules and padding."""

from __future__ import annotations

import dataclasses
import logging

import jax
import pytest
from jax.sharding import PartitionSpec as P

from btlm_jax import BTLMConfig
from btlm_jax.model import sharding, weights
from btlm_jax.model.params import flatten_tree

B3 = BTLMConfig.preset("btlm-3b-8k")


def test_mesh_sizes_are_filled_in_and_checked():
    assert sharding.make_mesh(tensor=2).shape == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    assert sharding.make_mesh(data=2, fsdp=1, tensor=4).size == 8
    for sizes in (dict(fsdp=3), dict(tensor=3), dict(data=-1), dict(fsdp=0)):
        with pytest.raises(ValueError, match="mesh"):
            sharding.make_mesh(**sizes)


def test_padding_of_the_released_model(caplog):
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    with caplog.at_level(logging.WARNING):
        assert sharding.param_padding(B3, mesh) == {"vocab": 50304, "mlp": 6912}
    assert "zero-padded from 6826 to 6912" in caplog.text and "+1.26 %" in caplog.text


def test_padding_is_minimal_for_small_models():
    small = dataclasses.replace(B3, vocab_size=97, n_inner=170)
    assert sharding.param_padding(small, sharding.make_mesh(fsdp=2, tensor=4)) == {
        "vocab": 100,
        "mlp": 172,
    }
    assert sharding.param_padding(small, sharding.make_mesh(fsdp=8)) == {}


def test_every_matrix_of_the_released_model_is_fully_sharded():
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    pad = sharding.param_padding(B3, mesh)
    specs = flatten_tree(sharding.param_specs(B3, mesh, pad=pad))
    assert specs[("wte",)] == P("tensor", ("fsdp", "context"))
    embed = ("fsdp", "context")
    qkv = P(None, embed, None, "tensor", None)
    assert specs[("blocks", "attn", "c_attn", "kernel")] == qkv
    assert specs[("blocks", "attn", "c_proj", "bias")] == P(None, None)
    assert specs[("blocks", "mlp", "c_proj", "kernel")] == P(None, "tensor", embed)
    # Every matrix is sharded over the whole mesh: nothing large is replicated.
    for w in weights.weight_table(B3):
        if len(w.shape) > 1 and w.role != "vector":
            assert {embed, "tensor"} <= {s for s in specs[w.path] if s}, w.name


def test_sizes_that_do_not_divide_are_named():
    three = jax.devices()[:3]
    mesh = sharding.make_mesh(tensor=3, devices=three)
    with pytest.raises(ValueError, match=r"'heads' of size 32 does not divide over.* 2 would fit"):
        sharding.param_specs(B3, mesh, pad=sharding.param_padding(B3, mesh))


def test_colliding_rules_name_every_weight():
    rules = tuple({**dict(sharding.RULES), "embed": "tensor"}.items())
    with pytest.raises(ValueError) as error:
        sharding.param_specs(B3, sharding.make_mesh(fsdp=8), rules)
    for text in ("wte of shape (50257, 2560)", "c_attn/kernel of shape", "collide"):
        assert text in str(error.value)


def test_colliding_and_unknown_axes_are_refused():
    with pytest.raises(ValueError, match="collide"):
        sharding.partition_spec((("vocab", "fsdp"), ("embed", "fsdp")), "vocab", "embed")
    with pytest.raises(ValueError, match="no sharding rule"):
        sharding.partition_spec(sharding.RULES, "emebd")


def test_sizes_that_leave_no_device_for_the_free_axis_are_refused():
    with pytest.raises(ValueError, match="data = 9 needs a multiple of 9 devices, found 8"):
        sharding.make_mesh(data=9)
    with pytest.raises(ValueError, match="data = 3 needs a multiple of 3 devices, found 8"):
        sharding.make_mesh(data=3)
