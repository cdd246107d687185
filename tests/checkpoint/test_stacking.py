"""Conversion between stacked weights in memory and one array per layer on disk."""

from __future__ import annotations

import dataclasses
import os

import jax
import pytest

import btlm_jax as btlm
from btlm_jax import BTLMConfig, make_mesh

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
