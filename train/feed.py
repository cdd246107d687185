"""Global batches onto the devices: every process reads its own rows."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from btlm_jax.model import sharding
from btlm_jax.train import batches as batches_lib
from btlm_jax.train.recipe import Recipe


def reader(recipe: Recipe, sources: list[batches_lib.Source]) -> batches_lib.Batches:
    """The batches of a recipe.

    Raises:
      FileNotFoundError, ValueError: as `data.Batches`.
    """
    return batches_lib.Batches(
        sources,
        [batches_lib.Phase(p.steps, p.batch_size, p.length) for p in recipe.phases],
        seed=recipe.run.seed,
        mask_documents=recipe.data.mask_documents,
        shuffle=recipe.data.shuffle,
    )


def batches_on(
    recipe: Recipe, batches: batches_lib.Batches, mesh: Mesh, start: int
) -> Iterator[tuple[jax.Array, ...]]:
    """The global batches as device arrays [A, B, T + 1], each process reading its own rows.

    Args:
      recipe, batches: the recipe and its `reader`.
      mesh: over whose devices they are split.
      start: the step of the first batch.
    """
    place = NamedSharding(
        mesh,
        jax.sharding.PartitionSpec(None, *sharding.partition_spec(sharding.RULES, "batch"), None),
    )

    def rows(batch_size: int) -> list[int]:
        needed: set[int] = set()
        for phase in recipe.phases:
            if phase.batch_size == batch_size:
                micro = phase.microbatch or batch_size
                shape = (batch_size // micro, micro, 1)
                indices = place.addressable_devices_indices_map(shape).values()
                mine = {r for i in indices if i is not None for r in range(micro)[i[1]]}
                needed |= {a * micro + r for a in range(shape[0]) for r in mine}
        return sorted(needed)

    step = start
    for batch in batches.iterate(start, rows):
        phase = recipe.phase_at(step)[1]
        where = {row: i for i, row in enumerate(rows(phase.batch_size))}
        micro = phase.microbatch or phase.batch_size
        shape = (phase.batch_size // micro, micro, phase.length + 1)

        def put(array: np.ndarray, micro=micro, shape=shape, where=where) -> jax.Array:
            def part(index):
                steps, sequences = range(shape[0])[index[0]], range(micro)[index[1]]
                return np.stack([array[[where[a * micro + r] for r in sequences]] for a in steps])

            with jax.transfer_guard("allow"):  # this one is meant
                return jax.make_array_from_callback(shape, place, part)

        arrays = (batch.tokens, batch.segment_ids)
        yield tuple(put(x) for x in arrays if x is not None)
        step += 1


def prefetch(batches: Iterator[Any], ahead: int = 2) -> Generator[Any]:
    """Keeps some batches on their way to the devices."""
    queue = []
    for batch in batches:
        queue.append(batch)
        if len(queue) > ahead:
            yield queue.pop(0)
    yield from queue
