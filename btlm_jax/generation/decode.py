"""The parts of a decoding step that greedy decoding, sampling and beam search share.

B prompts become R rows, `rows_per_prompt` neighbors for each. A row has S slots for its tokens: S
is a static shape, the lengths are arguments. Padding on the right changes no result, so neither
does the choice of buckets.

The keys and values of a prompt are computed once and shared by its rows. The new tokens of a row
have their own slots (`kv_cache`), and more of them are added when they are full.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.generation import stop_automaton
from btlm_jax.generation.options import GenerationOptions
from btlm_jax.generation.prefill import next_logits
from btlm_jax.generation.processors import Processor, ProcessorContext, apply_processors
from btlm_jax.generation.row_options import RowOptions, RuleSizes
from btlm_jax.generation.sampling import warp_scores
from btlm_jax.model import forward, sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.positions import count_positions
from btlm_jax.model.runtime import Runtime


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """The static arguments of decoding: each value, and each set of shapes, compiles a program.

    Attributes:
      model: the model.
      num_beams: width of a beam search; 1 without one.
      num_eos: with beams, the number of ids that end a row, each of which needs a candidate.
      rows_per_prompt: rows that continue each prompt.
      sizes: static sizes of the rules of the rows' options.
      processors: user processors, applied after those of the options.
      score_steps, logit_steps: number of steps for which scores and logits are recorded; 0 records
        none.
    """

    model: BTLM
    num_beams: int = 1
    num_eos: int = 0
    rows_per_prompt: int = 1
    sizes: RuleSizes = dataclasses.field(default_factory=RuleSizes)
    processors: tuple[Processor, ...] = ()
    score_steps: int = 0
    logit_steps: int = 0


class RowInputs(NamedTuple):
    """The constants of each row; all are [R], or have R as the first dimension.

    A row's random key is fold_in(key(seed), stream), folded with the step and then with `copy`.
    """

    prompt_length: Any  # int32, in slots, padding included
    num_valid: Any  # int32, valid tokens of the prompt
    first_valid: Any  # int32, slot of the first valid token
    min_length: Any  # int32, with the prompt: no EOS before
    max_length: Any  # int32, with the prompt
    seed: Any  # uint32
    stream: Any  # int32
    copy: Any  # int32, index among the continuations of the same prompt
    active: Any  # bool; inactive rows only pad the batch
    options: RowOptions


class DecodeResult(NamedTuple):
    """Final state of R rows; per-token arrays are indexed by slot."""

    ids: Any  # int32 [R, S]
    lengths: Any  # int32 [R], including the prompt and the EOS
    logprobs: Any  # fp32 [R, S], the model's log-probabilities of new tokens
    sequences_scores: Any  # fp32 [R], for beams
    beam_indices: Any  # int32 [R, S], for beams: the row that each new token was taken from


def num_batch_shards(model: BTLM, params: Any) -> int:
    """Returns the number of shards that the mesh splits rows into; 1 without a mesh."""
    mesh = sharding.mesh_of(params["wte"])
    return 1 if mesh is None else sharding.num_shards(mesh, model.rules, "batch")


def decode_logits(
    runtime: Runtime, params: Any, rows: RowInputs, ids_RS, length_R, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Runs the model over the last token of each row.

    Returns:
      The logits of the next token, fp32 [R, V], and the cache with the last token added.
    """
    token = jnp.take_along_axis(ids_RS, length_R[:, None] - 1, 1)
    num_earlier = (rows.num_valid + length_R - rows.prompt_length - 1)[:, None]
    positions = count_positions(runtime.config, jnp.ones_like(token), num_earlier)
    outputs: Any = forward.hidden(runtime, params, token, positions=positions, cache=cache)
    h, cache = outputs
    return next_logits(runtime, params, h), cache


def prompt_index(spec: DecodeSpec, num_prompts: int) -> jax.Array:
    """Returns the index of each row's prompt, int32 [R]."""
    return jnp.repeat(jnp.arange(num_prompts), spec.rows_per_prompt)


def row_keys(rows: RowInputs, step_R: jax.Array) -> jax.Array:
    """Returns a random key [R] for each row, which depends only on its seed, stream and step."""

    def row_key(seed, stream, step):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)

    return jax.vmap(row_key)(rows.seed, rows.stream, step_R)


def process_scores(spec: DecodeSpec, rows: RowInputs, scores_RV, ids_RS, length_R) -> jax.Array:
    """Applies processors, sampling warpers and normalization to the scores [R, V]."""
    options = rows.options
    context = ProcessorContext(
        ids_RS, length_R, rows.first_valid, rows.prompt_length, rows.min_length, rows.max_length
    )
    scores = apply_processors(scores_RV, context, options, spec.sizes.ngram_sizes, spec.processors)
    # At least one candidate of a beam search must be able to continue.
    min_keep = max(1, spec.num_eos) + 1 if spec.num_beams > 1 else 1
    scores = warp_scores(scores, options, spec.sizes.candidates, min_keep)
    if options.renormalize is not None:
        normalized = jax.nn.log_softmax(scores, -1)
        scores = jnp.where(options.renormalize[:, None], normalized, scores)
    return scores


def ends_row(
    eos: jax.Array, stop_table: jax.Array | None, token: jax.Array, stop_state: Any
) -> tuple[jax.Array, Any]:
    """Returns whether tokens end their rows, and the next stop states; of any shape.

    Args:
      eos: int32 [..., E], ids that end each row; -1 is none.
      stop_table: `build_stop_table`, or None.
      token: int32 tokens [...].
      stop_state: the state of the stop automaton before the token; of the same shape.
    """
    is_end = (token[..., None] == eos).any(-1)
    if stop_table is None:
        return is_end, None
    stop_state, completed = stop_automaton.advance_stop_state(stop_table, stop_state, token)
    return is_end | completed, stop_state


def score_buffers(spec: DecodeSpec, like_RV: jax.Array) -> dict[str, jax.Array]:
    """Returns zeros [steps, R, V] for the scores and the logits that are to be recorded."""
    steps = {"scores": spec.score_steps, "logits": spec.logit_steps}
    return {name: jnp.zeros((n, *like_RV.shape)) for name, n in steps.items() if n}


def record_scores(buffers: dict[str, jax.Array], step, **values: jax.Array) -> dict[str, jax.Array]:
    """Writes the values of this step into those buffers that exist."""
    return {
        name: jax.lax.dynamic_update_index_in_dim(buffer, values[name], step, 0)
        for name, buffer in buffers.items()
    }


def check_logprobs(options: GenerationOptions, logprobs: np.ndarray) -> None:
    """Checks the log-probabilities of tokens that have just been chosen.

    Raises:
      FloatingPointError: one is NaN, so that the tokens mean nothing; not if
        `remove_invalid_values` asks to continue.
    """
    if np.isnan(logprobs).any() and not options.remove_invalid_values:
        raise FloatingPointError(
            "logits: found NaN, expected numbers: the weights are too large for the dtype of the "
            "computation, or were ruined in training; compute in float32, or take an earlier "
            "checkpoint"
        )
