"""Checks that a recipe, its model, mesh and data fit together, before the run starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from jax.sharding import Mesh

from btlm_jax.config import BTLMConfig
from btlm_jax.convert import auto
from btlm_jax.data.tokenizer import load_tokenizer, tokenizers_match
from btlm_jax.model import alibi, sharding
from btlm_jax.train.feed import TrainingData
from btlm_jax.train.recipe import Recipe

logger = logging.getLogger(__name__)


def check_run(recipe: Recipe, config: BTLMConfig, mesh: Mesh, data: TrainingData) -> None:
    """Validates everything that would otherwise fail later.

    Raises:
      ValueError: something does not fit; the message lists all problems.
    """
    problems = [*_batch_problems(recipe, config, mesh), *_token_problems(recipe, config, data)]
    longest = max(phase.length for phase in recipe.phases)
    if recipe.data.mask_documents and alibi.scale_varies(config.alibi_scaling, longest):
        logger.warning(
            "data.mask_documents: dynamic ALiBi scaling counts all %d tokens of a window, not "
            "those of each document: shorter documents are trained with a larger scale than they "
            "get alone, in evaluation and generation", longest,
        )  # fmt: skip
    if problems:
        raise ValueError("the recipe cannot be run:\n  " + "\n  ".join(problems))


def _batch_problems(recipe: Recipe, config: BTLMConfig, mesh: Mesh) -> Iterator[str]:
    batch_shards = sharding.num_shards(mesh, sharding.RULES, "batch")
    sequence_shards = sharding.num_shards(mesh, sharding.RULES, "sequence")
    chunks = sharding.num_chunks(sequence_shards)
    for i, phase in enumerate(recipe.phases):
        if phase.microbatch_size % batch_shards:
            name = "microbatch" if phase.microbatch else "batch_size"
            yield (
                f"phases.{i}.{name}: found {phase.microbatch_size}, expected a multiple of "
                f"{batch_shards}, the number of parts into which this mesh splits the batch "
                "(data x fsdp)"
            )
        if phase.length % chunks:
            yield (
                f"phases.{i}.length: found {phase.length}, expected a multiple of {chunks}, twice "
                "mesh.context"
            )
        if config.position_limit is not None and phase.length > config.position_limit:
            yield (
                f"phases.{i}.length: found {phase.length}, the learned positions of the model end "
                f"at {config.position_limit}"
            )


def _token_problems(recipe: Recipe, config: BTLMConfig, data: TrainingData) -> Iterator[str]:
    for tokens in data.all_tokens:
        if tokens.metadata.vocab_size > config.vocab_size:
            yield (
                f"{tokens.directory}: its tokenizer has {tokens.metadata.vocab_size} tokens, the "
                f"model {config.vocab_size}"
            )
    if len({tokens.metadata.tokenizer_sha256 for tokens in data.all_tokens}) > 1:
        yield "data: the directories were made with different tokenizers"
    if len(eos_ids := {tokens.metadata.eos_id for tokens in data.all_tokens}) > 1:
        yield f"data: the directories end documents with different tokens: {sorted(eos_ids)}"
    start = recipe.model.checkpoint
    tokenizer = auto.read_any_tokenizer(start) if start is not None else None
    directory = data.sources[0].tokens.directory
    if tokenizer is not None and not tokenizers_match(tokenizer, load_tokenizer(directory)):
        yield (
            f"data.train: {directory} was made with another tokenizer than that of {start}: "
            f"tokenize it with --tokenizer {start}"
        )
