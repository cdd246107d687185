"""The shapes of the batches in which texts are read."""

from __future__ import annotations

import math

from jax.sharding import AbstractMesh, Mesh

from btlm_jax.model import sharding
from btlm_jax.model.runtime import Runtime

# A device's share of a batch, where the caller does not say.
TOKENS = 8192
# Widths are multiples of it, which fused attention asks for; the filling costs little.
_TILE = 128


def check_batch_size(
    batch_size: int | None,
    mesh: Mesh | AbstractMesh | None,
    rules: sharding.Rules = sharding.RULES,
) -> None:
    """Raises ValueError if batches are asked for that are empty, or do not divide over the mesh."""
    if batch_size is None:
        return
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, expected at least 1")
    if mesh is not None:
        sharding.check_batch(batch_size, mesh, rules)


def batch_shape(
    runtime: Runtime, length: int, count: int | None, batch_size: int | None
) -> tuple[int, int]:
    """Rows and width of the batches in which windows are read.

    Args:
      runtime: of the model on its mesh.
      length: of the windows, in tokens.
      count: how many there are, if that is known.
      batch_size: rows; default about 8192 tokens on each device.

    Raises:
      ValueError: a batch that does not divide over the mesh.
    """
    parts = splits = 1
    if runtime.mesh is not None:
        parts = sharding.num_shards(runtime.mesh, runtime.rules, "batch")
        splits = sharding.num_chunks(sharding.num_shards(runtime.mesh, runtime.rules, "sequence"))
    width = sharding.round_up(length, math.lcm(_TILE, splits))
    rows = batch_size
    if rows is None:
        rows = max(1, TOKENS // width) * parts
        rows = rows if count is None else min(rows, sharding.round_up(count, parts))
    check_batch_size(rows, runtime.mesh, runtime.rules)
    return rows, width
