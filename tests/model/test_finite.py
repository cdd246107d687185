"""NaN and Inf are counted where the arrays are, on one device or sharded over eight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import btlm_jax as btlm
from btlm_jax.model import finite


@pytest.mark.parametrize("sharded", [False, True])
def test_only_arrays_that_hold_nan_or_inf_are_counted(sharded):
    bad = np.ones((8, 6), np.float32)
    bad[1, 2], bad[7, 5], bad[3, 0] = np.nan, np.inf, -np.inf
    bf16 = jnp.full((8, 2), jnp.nan, jnp.bfloat16)
    tree = {"a": {"b": bad, "fine": np.full((8,), 3e38, np.float32)}, "c": bf16}
    tree["ids"] = np.arange(8)
    place = None
    if sharded:
        place = jax.NamedSharding(btlm.make_mesh(fsdp=8), jax.P("fsdp"))
    counts = finite.nonfinite_by_array(jax.tree.map(lambda x: jax.device_put(x, place), tree))
    assert counts == {"a/b": 3, "c": 16}
    text = finite.describe_nonfinite(counts)
    assert text == "NaN or Inf in 2 arrays (a/b: 3, c: 16)"


def test_a_long_list_is_cut():
    text = finite.describe_nonfinite({str(i): 1 for i in range(9)})
    assert text == "NaN or Inf in 9 arrays (0: 1, 1: 1, 2: 1 and 6 more)"
