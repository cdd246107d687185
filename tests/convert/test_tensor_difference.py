"""Differences between blocks are counted and measured."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from btlm_jax.convert.tensor_difference import block_difference


def test_differences_in_all_parts_of_a_large_block_are_counted():
    x = np.zeros((1 << 19) + 5, np.float32)
    y = x.copy()
    y[[3, 1 << 18, -1]] = 4.0, -9.0, 2.0
    assert block_difference(x, y) == block_difference(y, x) == (3, 9.0)
    narrow = y.astype(ml_dtypes.bfloat16)
    assert block_difference(narrow, y) == (0, 0.0) == block_difference(y, narrow)
    assert block_difference(x, narrow) == (3, 9.0)
    narrow[7] = np.nan
    assert block_difference(narrow, y) == (1, np.inf) == block_difference(y, narrow)
