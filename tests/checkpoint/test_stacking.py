"""Conversion between stacked weights in memory and one array per layer on disk."""

from __future__ import annotations

import dataclasses
import os

import jax
import pytest

import btlm_jax as btlm
from btlm_jax import BTLMConfig, make_mesh
from btlm_jax.checkpoint import stacking
from btlm_jax.model import weights
from btlm_jax.model.params import flatten_tree

# These sizes need padding on a tensor axis of 4: V 509 -> 512, F 170 -> 172.
CONFIG = dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=509)


@pytest.mark.parametrize("sizes", [None, dict(fsdp=2, tensor=4)])
def test_only_zeros_are_stripped(tmp_path, sizes):
    """Under a smaller configuration, weights look padded; none of their values may be lost."""
    mesh = make_mesh(**sizes) if sizes else None
    params = btlm.BTLM(CONFIG).init(jax.random.key(0), mesh=mesh)
    smaller = dataclasses.replace(CONFIG, vocab_size=500)
    with pytest.raises(ValueError, match=r"wte: found values beyond its shape \(500, 64\)"):
        btlm.save(tmp_path / "c", smaller, params)
    assert not os.listdir(tmp_path)


def test_arrays_on_disk_have_no_padding():
    params = btlm.BTLM(CONFIG).init(jax.random.key(0), mesh=make_mesh(fsdp=2, tensor=4))
    assert params["wte"].shape == (512, 64)
    arrays = stacking.unstack_layers(CONFIG, flatten_tree(params))
    expected = {leaf.path: leaf.weight.shape for leaf in weights.disk_leaves(CONFIG)}
    assert {path: x.shape for path, x in arrays.items()} == expected
