"""Training data, from token directories to global batches on the devices."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btlm_jax.data.token_shards import TokenShards
from btlm_jax.model import sharding
from btlm_jax.train.batches import Batches
from btlm_jax.train.mixture import Source, open_mixture
from btlm_jax.train.recipe import Recipe


class TrainingData(NamedTuple):
    """The open token directories of a run.

    Attributes:
      sources: the tokens to train on.
      held_out: the tokens to evaluate on, or None.
    """

    sources: list[Source]
    held_out: TokenShards | None

    @property
    def all_tokens(self) -> list[TokenShards]:
        """Every directory of tokens, the held-out one last."""
        tokens = [source.tokens for source in self.sources]
        return tokens if self.held_out is None else [*tokens, self.held_out]


def open_training_data(recipe: Recipe) -> TrainingData:
    """Opens the token directories that a recipe names.

    Raises:
      FileNotFoundError: a directory does not exist.
      ValueError: the recipe names no data, or a directory is damaged.
    """
    settings = recipe.data
    if not settings.train:
        raise ValueError(
            "data.train: not set; make a directory of tokens with `btlm tokenize TEXT --target DIR "
            "--tokenizer DIR` (or --new-tokenizer SIZE), then pass --set data.train=DIR"
        )
    if mixture := settings.mixture or settings.weights:
        sources = open_mixture(settings.train, mixture)
    else:
        sources = [Source(TokenShards(settings.train))]
    held_out = TokenShards(settings.held_out) if settings.held_out else None
    return TrainingData(sources, held_out)


def open_batches(recipe: Recipe, data: TrainingData) -> Batches:
    """Returns the sequence of batches of a recipe.

    Raises:
      ValueError: as `Batches`.
    """
    return Batches(
        data.sources,
        recipe.phases,
        seed=recipe.run.seed,
        mask_documents=recipe.data.mask_documents,
        shuffle=recipe.data.shuffle,
    )


def batches_on_mesh(
    recipe: Recipe, batches: Batches, mesh: Mesh, start: int
) -> Iterator[tuple[jax.Array, ...]]:
    """Yields global batches on the devices; each process reads only its own rows.

    Args:
      recipe: the recipe.
      batches: its batches.
      mesh: the mesh whose devices the batches are split over.
      start: step of the first batch.

    Yields:
      (tokens,) or (tokens, segment_ids), int32 [A, B, T + 1] each: A microbatches of B sequences.
    """
    spec = PartitionSpec(None, *sharding.partition_spec(sharding.RULES, "batch"), None)
    batch_sharding = NamedSharding(mesh, spec)

    def local_rows(batch_size: int) -> list[int]:
        needed: set[int] = set()
        for phase in recipe.phases:
            if phase.batch_size == batch_size:
                micro = phase.microbatch_size
                shape = (batch_size // micro, micro, 1)
                indices = batch_sharding.addressable_devices_indices_map(shape).values()
                local = {r for i in indices if i is not None for r in range(micro)[i[1]]}
                needed |= {a * micro + r for a in range(shape[0]) for r in local}
        return sorted(needed)

    for step, batch in enumerate(batches.iterate(start, local_rows), start):
        phase = recipe.phase_at(step)
        position = {row: i for i, row in enumerate(local_rows(phase.batch_size))}
        micro = phase.microbatch_size
        shape = (phase.batch_size // micro, micro, phase.length + 1)

        def put(array: np.ndarray, micro=micro, shape=shape, position=position) -> jax.Array:
            def read(index: tuple[slice, ...]) -> np.ndarray:
                microbatches, sequences = range(shape[0])[index[0]], range(micro)[index[1]]
                return np.stack(
                    [array[[position[a * micro + r] for r in sequences]] for a in microbatches]
                )

            with jax.transfer_guard("allow"):  # an intentional transfer
                return sharding.assemble_array(shape, array.dtype, batch_sharding, shape, read)

        yield tuple(put(x) for x in batch if x is not None)


def prefetch(batches: Iterator[Any], ahead: int = 2) -> Generator[Any]:
    """Yields the batches, keeping `ahead` of them in transfer to the devices."""
    queue = []
    for batch in batches:
        queue.append(batch)
        if len(queue) > ahead:
            yield queue.pop(0)
    yield from queue
