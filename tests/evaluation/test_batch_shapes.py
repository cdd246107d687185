"""Shapes of batches: widths that kernels accept, rows that divide over the mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from btlm_jax import BTLMConfig
from btlm_jax.evaluation import batch_shapes
from btlm_jax.model import sharding
from btlm_jax.model.runtime import Runtime


def make_runtime(**axes: int) -> Runtime:
    mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes)) if axes else None
    return Runtime(BTLMConfig(), jnp.dtype(jnp.bfloat16), sharding.RULES, (), mesh, None, "none")


@given(st.integers(1, 20_000), st.none() | st.integers(1, 100))
def test_one_device_reads_about_8192_tokens(length, count):
    rows, width = batch_shapes.batch_shape(make_runtime(), length, count, None)
    assert length <= width < length + 128 and width % 128 == 0
    assert rows == 1 or rows * width <= batch_shapes.TOKENS_PER_DEVICE
    assert count is None or rows <= count


def test_a_mesh_reads_about_8192_tokens_per_device():
    runtime = make_runtime(data=2, fsdp=2, tensor=1, context=2)
    rows, width = batch_shapes.batch_shape(runtime, 1000, None, None)
    assert width == 1024
    assert rows == batch_shapes.TOKENS_PER_DEVICE // width * sharding.num_shards(
        runtime.mesh, runtime.rules, "batch"
    )


def test_a_given_size_is_used_or_refused():
    assert batch_shapes.batch_shape(make_runtime(), 100, None, 3) == (3, 128)
    with pytest.raises(ValueError, match="batch_size: found 0, expected at least 1"):
        batch_shapes.check_batch_size(0, None)
    with pytest.raises(ValueError, match="3"):
        batch_shapes.batch_shape(make_runtime(data=2, fsdp=1, tensor=1, context=1), 100, None, 3)
