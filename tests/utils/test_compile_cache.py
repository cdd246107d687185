"""Counts of XLA compilations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from btlm_jax.utils.compile_cache import count_compilations


def test_only_new_programs_are_counted():
    f, x = jax.jit(lambda x: x * 3 + 1), jnp.ones(7)
    with count_compilations() as compiled:
        f(x), f(x)
        once = compiled.count
        assert once == 1 and compiled.seconds > 0
        f(jnp.ones((2, 2)))
        assert compiled.count > once
    count = compiled.count
    f(jnp.ones((3, 3)))
    assert compiled.count == count
