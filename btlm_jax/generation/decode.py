"""What greedy decoding, sampling and beam search share: prompts, rows, the next token's scores.

B prompts become R rows, `rows_per_prompt` neighbors for each. Shapes are static: prompts of at most
P slots and rows of at most S, filled up on the right; true lengths are arguments. Slots count as
without filling, so the size of the buckets changes no result.

The keys and values of a prompt are computed once and read by all its rows; what a row adds has
slots of its own (`kv_cache`), and more of them when they are full.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from btlm_jax.generation import stop_automaton
from btlm_jax.generation.options import GenerationOptions
from btlm_jax.generation.prefill import next_logits
from btlm_jax.generation.processors import Processor, ProcessorContext, apply_processors
from btlm_jax.generation.sampling import warp_scores
from btlm_jax.model import sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import KVCache


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """What is static: one program is compiled for each, and for each set of shapes."""

    model: BTLM
    options: GenerationOptions
    eos: tuple[int, ...]
    processors: tuple[Processor, ...] = ()
    # For how many steps the scores and the logits are kept; 0 does not keep them.
    score_steps: int = 0
    logit_steps: int = 0


class RowInputs(NamedTuple):
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


class DecodeResult(NamedTuple):
    """R rows at their end. What is per token lies at its slot."""

    ids: Any  # int32 [R, S]
    lengths: Any  # int32 [R], of the row with its prompt and EOS
    logprobs: Any  # fp32 [R, S], of new tokens, the model's own
    sequences_scores: Any  # fp32 [R], of beams
    beam_indices: Any  # int32 [R, S], of beams: the row each new token came from


def num_batch_shards(model: BTLM, params: Any) -> int:
    """Into how many parts a mesh splits rows; 1 off any mesh."""
    mesh = sharding.mesh_of(params["wte"])
    return 1 if mesh is None else sharding.num_shards(mesh, model.rules, "batch")


def decode_logits(
    program: DecodeSpec, params: Any, rows: RowInputs, ids_RS, length_R, cache: KVCache
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


def prompt_index(program: DecodeSpec, prompts: int) -> jax.Array:
    """The prompt of every row, int32 [R]."""
    return jnp.repeat(jnp.arange(prompts), program.options.rows_per_prompt)


def row_keys(rows: RowInputs, step_R: jax.Array) -> jax.Array:
    """A random key for every row, which depends on its own seed and step alone, [R]."""

    def key(seed, stream, step):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)

    return jax.vmap(key)(rows.seed, rows.stream, step_R)


def process_scores(program: DecodeSpec, rows: RowInputs, scores_RV, ids_RS, length_R) -> jax.Array:
    """The scores after processors, warpers and normalization."""
    p, options = program, program.options
    context = ProcessorContext(
        ids_RS, length_R, rows.first, rows.prompt_length, rows.min_length, rows.max_length
    )
    scores = apply_processors(scores_RV, context, options, p.eos, p.processors)
    if options.do_sample:
        # Of beams, one at least must be able to go on.
        keep = max(1, len(p.eos)) + 1 if options.num_beams > 1 else 1
        scores = warp_scores(scores, options, keep)
    return jax.nn.log_softmax(scores, -1) if options.renormalize_logits else scores


def ends_row(program: DecodeSpec, table, token: jax.Array, state) -> tuple[jax.Array, Any]:
    """(whether a token ends its row, the next state of the stop strings), of any shape.

    Args:
      table: `stop_automaton.build_stop_table`, or None.
    """
    hit = jnp.isin(token, jnp.asarray(program.eos, jnp.int32))
    if table is None:
        return hit, None
    state, stopped = stop_automaton.advance_stop_state(table, state, token)
    return hit | stopped, state


def score_buffers(program: DecodeSpec, like_RV: jax.Array) -> dict[str, jax.Array]:
    """Empty buffers of scores and logits, [steps, R, V], of those that are kept."""
    steps = {"scores": program.score_steps, "logits": program.logit_steps}
    return {name: jnp.zeros((n, *like_RV.shape)) for name, n in steps.items() if n}


def record_scores(kept: dict[str, jax.Array], step, **values: jax.Array) -> dict[str, jax.Array]:
    """`kept` with the values of this step, of those that are kept."""
    return {
        name: jax.lax.dynamic_update_index_in_dim(buffer, values[name], step, 0)
        for name, buffer in kept.items()
    }
