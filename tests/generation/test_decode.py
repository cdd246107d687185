"""What generation draws from: random keys."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.generation.decode import row_keys


def test_every_step_of_every_row_has_a_random_key_of_its_own():
    seed, stream, step = jnp.indices((2, 2, 3)).reshape(3, -1)
    rows = types.SimpleNamespace(seed=seed, stream=stream)
    keys = np.asarray(jax.random.key_data(row_keys(rows, step)))
    assert len(np.unique(keys, axis=0)) == 12
