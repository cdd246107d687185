"""Permutations are one to one, and all equally likely."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from btlm_jax.train.permutation import permute, splitmix64


@given(size=st.integers(1, 300), key=st.integers(0, (1 << 64) - 1))
def test_permute_is_one_to_one(size, key):
    index = np.arange(size)
    order = permute(index, np.full(size, size), np.full(size, key, np.uint64))
    assert sorted(order) == index.tolist()


def test_every_permutation_is_equally_likely():
    n, keys = 4, splitmix64(np.arange(24_000, dtype=np.uint64))
    places = [permute(np.full(len(keys), i), np.full(len(keys), n), keys) for i in range(n)]
    counts = np.unique(np.stack(places), axis=1, return_counts=True)[1]
    assert len(counts) == 24 and np.abs(counts - 1000).max() < 160  # five sigma
