"""Shapes of the batches in which evaluations read texts."""

from __future__ import annotations

import math

from jax.sharding import AbstractMesh, Mesh

from btlm_jax.model import sharding
from btlm_jax.model.runtime import Runtime

# The default batch size, in tokens on each device.
TOKENS_PER_DEVICE = 8192
# Fused attention requires widths that are multiples of this; the padding costs little.
_WIDTH_MULTIPLE = 128


def check_batch_size(
    batch_size: int | None,
    mesh: Mesh | AbstractMesh | None,
    rules: sharding.Rules = sharding.RULES,
) -> None:
    """Raises ValueError if a given batch size is not positive or does not divide over the mesh."""
    if batch_size is None:
        return
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, expected at least 1")
    if mesh is not None:
        sharding.check_batch(batch_size, mesh, rules)


def batch_shape(
    runtime: Runtime, length: int, count: int | None, batch_size: int | None
) -> tuple[int, int]:
    """Returns (rows, width) of the batches in which windows are read.

    Args:
      runtime: static arguments of the model's forward pass, with its mesh.
      length: tokens per window.
      count: number of windows, None if it is not known.
      batch_size: rows per batch; default about 8192 tokens on each device.

    Raises:
      ValueError: the batch does not divide over the mesh.
    """
    row_shards = num_chunks = 1
    if runtime.mesh is not None:
        row_shards = sharding.num_shards(runtime.mesh, runtime.rules, "batch")
        num_chunks = sharding.num_chunks(
            sharding.num_shards(runtime.mesh, runtime.rules, "sequence")
        )
    width = sharding.round_up(length, math.lcm(_WIDTH_MULTIPLE, num_chunks))
    rows = batch_size
    if rows is None:
        rows = max(1, TOKENS_PER_DEVICE // width) * row_shards
        rows = rows if count is None else min(rows, sharding.round_up(count, row_shards))
    check_batch_size(rows, runtime.mesh, runtime.rules)
    return rows, width
