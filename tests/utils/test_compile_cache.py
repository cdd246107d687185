"""Counting what XLA compiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from btlm_jax.utils.compile_cache import count_compilations


def test_counts_new_programs_only():
    f, x = jax.jit(lambda x: x * 3 + 1), jnp.ones(7)
    with count_compilations() as found:
        f(x), f(x)
        once = found.count
        assert once == 1 and found.seconds > 0
        f(jnp.ones((2, 2)))
        assert found.count > once
    count = found.count
    f(jnp.ones((3, 3)))
    assert found.count == count
