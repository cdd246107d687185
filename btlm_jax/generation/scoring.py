"""`score`: the log-probability of every token of given texts."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from btlm_jax.generation import decode, prompts
from btlm_jax.model import forward, sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.chunked_loss import token_predictions
from btlm_jax.model.params import Params
from btlm_jax.model.positions import count_positions

# Widths above this are multiples of it.
_TILE = 128


def score(
    model: BTLM,
    params: Params,
    input_ids: ArrayLike,
    *,
    attention_mask: ArrayLike | None = None,
) -> np.ndarray:
    """Returns the log-probability of every token given the tokens before it.

    A program is compiled once per bucket of lengths. Full logits are never materialized.

    Args:
      model: the model.
      params: its weights, on a device or a mesh.
      input_ids: int [B, T]; shorter texts are padded on the left.
      attention_mask: [B, T], nonzero for valid tokens.

    Returns:
      fp32 [B, T]; NaN for padding and for each row's first token, which has no context.

    Raises:
      ValueError: an empty text, tokens outside the vocabulary, padding on the right, or more tokens
        than learned positions.
    """
    c = model.config
    ids, mask = prompts.check_prompts(input_ids, attention_mask, c.vocab_size, None)
    rows, T = ids.shape
    prompts.check_context_length(prompts.LengthLimits(T, 0, T), c, None)
    extra_rows = -rows % decode.num_batch_shards(model, params)
    width = padded_width(model, params, T)

    def pad(x):
        return np.pad(x, ((0, extra_rows), (0, width - T)), mode="edge") * (np.arange(width) < T)

    padded_logprobs = _score(model, params, pad(ids), pad(mask), np.int32(T))
    logprobs = np.asarray(padded_logprobs)[:rows, :T]
    has_context = mask * np.pad(mask[:, :-1], ((0, 0), (1, 0))) != 0
    return np.where(has_context, logprobs, np.float32(np.nan))


@functools.partial(jax.jit, static_argnames="model")
def _score(model: BTLM, params: Params, ids, mask, length):
    runtime = model.runtime(params)
    with sharding.on_mesh(runtime.mesh):
        positions = count_positions(model.config, mask)
        h, _ = forward.hidden(
            runtime, params, ids, attention_mask=mask, positions=positions, length=length
        )
        targets = jnp.concatenate([ids[:, 1:], ids[:, :1]], 1)
        nll = token_predictions(runtime, params, h, targets).nll
        logprobs = runtime.shard(-nll, "batch", None)
        # Entry t predicts token t + 1: shift it there.
        return jnp.concatenate([logprobs[:, -1:], logprobs[:, :-1]], 1)


def padded_width(model: BTLM, params: Params, length: int) -> int:
    """Returns the static width for texts of a length: a bucket that the mesh divides."""
    mesh, num_chunks = sharding.mesh_of(params["wte"]), 1
    if mesh is not None:
        num_chunks = sharding.num_chunks(sharding.num_shards(mesh, model.rules, "sequence"))
    width = prompts.bucket_length(length)
    return sharding.round_up(width, math.lcm(min(width, _TILE), num_chunks))
