"""Checks that a recipe, its model, mesh and data fit together, before the run starts."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from btlm_jax.config import BTLMConfig
from btlm_jax.convert import auto
from btlm_jax.data.tokenizer import encode_prompt, load_tokenizer, tokenizers_match
from btlm_jax.model import alibi, sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.train.feed import TrainingData
from btlm_jax.train.recipe import OptimizerSettings, Recipe, RunSettings
from btlm_jax.train.recipe_build import dropout_problems
from btlm_jax.train.step import abstract_state
from btlm_jax.utils.format import format_bytes

SAMPLE_TOKENS = 32  # that a sample adds to the prompt

logger = logging.getLogger(__name__)


def check_run(
    recipe: Recipe,
    model: BTLM,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    data: TrainingData,
) -> None:
    """Validates everything that would otherwise fail later.

    Raises:
      ValueError: something does not fit; the message lists all problems.
    """
    config = model.config
    problems = [
        *dropout_problems(config),
        *_batch_problems(recipe, config, mesh),
        *_token_problems(recipe, config, data),
        *_sample_problems(recipe, config, data),
        *_memory_problems(recipe, model, tx, mesh),
    ]
    longest = max(phase.length for phase in recipe.phases)
    if recipe.data.mask_documents and alibi.scale_varies(config.alibi_scaling, longest):
        logger.warning(
            "data.mask_documents: dynamic ALiBi scaling counts all %d tokens of a window, not "
            "those of each document: shorter documents are trained with a larger scale than they "
            "get alone, in evaluation and generation", longest,
        )  # fmt: skip
    if problems:
        raise ValueError("the recipe cannot be run:\n  " + "\n  ".join(problems))


def unused_settings(recipe: Recipe) -> Iterator[str]:
    """Yields a sentence for every setting that does nothing beside the others."""
    run, model, optimizer = recipe.run, recipe.model, recipe.optimizer
    if run.eval_every and not recipe.data.held_out:
        yield "run.eval_every does nothing without data.held_out"
    if run.prompt != RunSettings.prompt and not run.sample_every:
        yield "run.prompt does nothing without run.sample_every"
    if run.keep_every and not run.checkpoint_every:
        yield "run.keep_every does nothing without run.checkpoint_every"
    elif run.keep_every and run.keep_every % run.checkpoint_every:
        kept = math.lcm(run.keep_every, run.checkpoint_every)
        yield (
            f"run.keep_every = {run.keep_every} is no multiple of run.checkpoint_every = "
            f"{run.checkpoint_every}: only checkpoints at multiples of {kept} are kept"
        )
    if run.tokens_per_device and all(phase.microbatch for phase in recipe.phases):
        yield "run.tokens_per_device does nothing where every phase has a microbatch"
    if model.init_truncation is not None and model.checkpoint is not None:
        yield "model.init_truncation does nothing with model.checkpoint"
    if optimizer.eps != OptimizerSettings.eps and optimizer.name == "lion":
        yield "optimizer.eps does nothing with optimizer.name = 'lion'"


def _sample_problems(recipe: Recipe, config: BTLMConfig, data: TrainingData) -> Iterator[str]:
    if not recipe.run.sample_every:
        return
    directory = data.sources[0].tokens.directory
    try:
        ids = encode_prompt(load_tokenizer(directory), recipe.run.prompt)
    except FileNotFoundError:
        yield f"run.sample_every: {directory} has no tokenizer, which samples need: set it to 0"
        return
    except ValueError as e:
        yield f"run.prompt: {e}"
        return
    if max(ids) >= config.vocab_size:
        yield (
            f"run.prompt: found token {max(ids)}, for which the model (vocab_size "
            f"{config.vocab_size}) has no embedding: leave that text out"
        )
    length = len(ids)
    limit = config.position_limit
    if limit is not None and length + SAMPLE_TOKENS > limit:
        yield (
            f"run.prompt: found {length} tokens, expected at most {limit - SAMPLE_TOKENS}: a "
            f"sample adds {SAMPLE_TOKENS}, and the learned positions end at {limit}"
        )


def _memory_problems(
    recipe: Recipe, model: BTLM, tx: optax.GradientTransformation, mesh: Mesh
) -> Iterator[str]:
    """Compares the weights and the optimizer state, which are not all, with a device's memory."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if not limit:
        return  # CPUs do not say
    state = abstract_state(model, tx, mesh)
    resident: Any = (
        state.params if recipe.run.offload_optimizer else (state.params, state.opt_state)
    )
    size = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(resident)
    )
    if size > limit:
        yield (
            f"mesh: weights and optimizer state take {format_bytes(size)} of each device, which "
            f"has {format_bytes(limit)}: split them over more devices (mesh.fsdp, mesh.tensor), or "
            "set run.offload_optimizer = true"
        )


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
        if (largest := tokens.metadata.max_id) >= config.vocab_size:
            yield (
                f"{tokens.directory}: it holds token {largest} of a tokenizer with "
                f"{tokens.metadata.vocab_size} tokens, the model has {config.vocab_size}"
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
