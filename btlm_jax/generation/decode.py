"""What greedy decoding, sampling and beam search share: prompts, rows, the next token's scores.

B prompts become R rows, `options.copies` neighbours for each. Shapes are static: prompts of at most
P slots and rows of at most S, filled up on the right; true lengths are arguments. Slots count as
without filling, so the size of the buckets changes no result.

The keys and values of a prompt are computed once and read by all its rows; what a row adds has
slots of its own (`kv_cache`), and more of them when they are full.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from btlm_jax.generation import stopping
from btlm_jax.generation.options import Options
from btlm_jax.generation.processors import Context, Processor, process
from btlm_jax.generation.sampling import warp
from btlm_jax.model import kv_cache, sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import KVCache


@dataclasses.dataclass(frozen=True)
class Program:
    """What is static: one program is compiled for each, and for each set of shapes."""

    model: BTLM
    options: Options
    eos: tuple[int, ...]
    processors: tuple[Processor, ...] = ()
    # For how many steps the scores and the logits are kept; 0 does not keep them.
    score_steps: int = 0
    logit_steps: int = 0


class Prompt(NamedTuple):
    """Prompts that have been read."""

    cache: KVCache  # of B rows
    logits: jax.Array  # fp32 [B, V], of the token after each


class Rows(NamedTuple):
    """What is known of each row before it begins; all are [R]."""

    prompt_length: Any  # int32, in slots, padding included
    real: Any  # int32, how many of them are no padding
    first: Any  # int32, the first of these
    min_length: Any  # int32, with the prompt: no EOS before
    max_length: Any  # int32, the end
    seed: Any  # uint32, int32, int32: a row's key is fold_in(key(seed), stream), then by copy
    stream: Any
    copy: Any
    meant: Any  # bool; other rows fill up the batch


class Result(NamedTuple):
    """R rows at their end. What is per token lies at its slot."""

    ids: Any  # int32 [R, S]
    lengths: Any  # int32 [R], of the row with its prompt and EOS
    logprobs: Any  # fp32 [R, S], of new tokens, the model's own
    sequences_scores: Any  # fp32 [R], of beams
    beam_indices: Any  # int32 [R, S], of beams: the row each new token came from


def ways(model: BTLM, params: Any) -> int:
    """Into how many parts a mesh splits rows; 1 off any mesh."""
    mesh = sharding.mesh_of(params["wte"])
    return 1 if mesh is None else sharding.num_shards(mesh, model.rules, "batch")


@functools.partial(jax.jit, static_argnames=("model", "capacity", "dtype"))
def read(model: BTLM, params: Any, ids, mask, length, capacity: int, dtype: Any = None) -> Prompt:
    """Reads prompts.

    Args:
      ids: int32 [B, P], from slot `length` on filling.
      length: int32, of all, or [B], of each (where dynamic ALiBi scaling does not forbid it).
      mask: int32 [B, P], 0 for padding on the left; None if there is none.
      capacity: slots of the cache, >= P.
      dtype: of the cache (`BTLM.init_cache`).
    """
    with sharding.on_mesh(model.runtime(params).mesh):
        # Made here: an argument would be held beside the result.
        cache = model.init_cache(params, ids.shape[0], capacity, dtype=dtype)
        return _read(model, params, ids, mask, length, cache, 0)


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def read_on(model: BTLM, params: Any, ids, length, cache: KVCache, capacity: int) -> Prompt:
    """Reads more of prompts whose beginnings are in a cache, which stays as it is.

    Args:
      ids: int32 [B, T], of which `length` are meant.
      capacity: slots of the new cache; the filling needs them too.
    """
    with sharding.on_mesh(model.runtime(params).mesh):
        cache = kv_cache.resized(cache, capacity)
        real = jnp.where(cache.segment_ids > 0, 1, 0)
        real = real * (jnp.arange(cache.capacity) < cache.length[:, None])
        return _read(model, params, ids, None, length, cache, real.sum(1, keepdims=True))


def _read(model: BTLM, params: Any, ids, mask, length, cache: KVCache, before) -> Prompt:
    slot, lengths = jnp.arange(ids.shape[1]), jnp.broadcast_to(length, len(ids))
    ids = jnp.where(slot < lengths[:, None], ids, 0)
    at = None
    if not model.config.alibi:
        # Learned positions count the real tokens of a row, as transformers does; ALiBi slots.
        counted = jnp.ones_like(ids) if mask is None else mask
        at = jnp.maximum(before + jnp.cumsum(counted, 1) - 1, 0)
        at = jnp.minimum(at, model.config.n_positions - 1)  # of the filling
    longest = lengths.max()
    read: Any = model.hidden(
        params, ids, attention_mask=mask, positions=at, cache=cache, length=longest
    )
    h, cache = read
    cache = dataclasses.replace(cache, length=cache.length - longest + lengths)
    # A sum rather than a gather, whose rows are split over a mesh.
    is_last = model.runtime(params).shard(slot == lengths[:, None] - 1, "batch", None)
    last = jnp.where(is_last[:, :, None], h, 0).sum(1, keepdims=True)
    return Prompt(cache, next_logits(model, params, last))


def next_logits(model: BTLM, params: Any, h_R1D: jax.Array) -> jax.Array:
    """fp32 [R, V], replicated: choosing is cheap, and done everywhere at once."""
    logits = model.logits(params, h_R1D)
    return model.runtime(params).shard(logits, None, None, None)[:, 0]


def forward(
    program: Program, params: Any, rows: Rows, ids_RS, length_R, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """(logits [R, V] of the token after the first `length_R`, the cache with these)."""
    model = program.model
    token = jnp.take_along_axis(ids_RS, length_R[:, None] - 1, 1)
    at = None
    if not model.config.alibi:
        at = (rows.real + length_R - rows.prompt_length - 1)[:, None]
    extended: Any = model.hidden(params, token, positions=at, cache=cache)
    h, cache = extended
    return next_logits(model, params, h), cache


def source(program: Program, prompts: int) -> jax.Array:
    """The prompt of every row, int32 [R]."""
    return jnp.repeat(jnp.arange(prompts), program.options.copies)


def keys(rows: Rows, step_R: jax.Array) -> jax.Array:
    """A random key for every row, which depends on its own seed and step alone, [R]."""

    def key(seed, stream, step):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)

    return jax.vmap(key)(rows.seed, rows.stream, step_R)


def processed(program: Program, rows: Rows, scores_RV, ids_RS, length_R) -> jax.Array:
    """The scores after processors, warpers and normalization."""
    p, options = program, program.options
    context = Context(
        ids_RS, length_R, rows.first, rows.prompt_length, rows.min_length, rows.max_length
    )
    scores = process(scores_RV, context, options, p.eos, p.processors)
    if options.do_sample:
        # Of beams, one at least must be able to go on.
        keep = max(1, len(p.eos)) + 1 if options.num_beams > 1 else 1
        scores = warp(scores, options, keep)
    return jax.nn.log_softmax(scores, -1) if options.renormalize_logits else scores


def ended(program: Program, table, token: jax.Array, state) -> tuple[jax.Array, Any]:
    """(whether a token ends its row, the next state of the stop strings), of any shape.

    Args:
      table: `stopping.table`, or None.
    """
    hit = jnp.isin(token, jnp.asarray(program.eos, jnp.int32))
    if table is None:
        return hit, None
    state, stopped = stopping.advance(table, state, token)
    return hit | stopped, state


def buffers(program: Program, like_RV: jax.Array) -> dict[str, jax.Array]:
    """Empty buffers of scores and logits, [steps, R, V], of those that are kept."""
    steps = {"scores": program.score_steps, "logits": program.logit_steps}
    return {name: jnp.zeros((n, *like_RV.shape)) for name, n in steps.items() if n}


def record(kept: dict[str, jax.Array], step, **values: jax.Array) -> dict[str, jax.Array]:
    """`kept` with the values of this step, of those that are kept."""
    return {
        name: jax.lax.dynamic_update_index_in_dim(buffer, values[name], step, 0)
        for name, buffer in kept.items()
    }
