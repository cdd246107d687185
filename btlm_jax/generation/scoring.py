"""`score`: the log-probability of every token of given texts."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from btlm_jax.generation import decode, prompts
from btlm_jax.model import sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.chunked_loss import token_predictions
from btlm_jax.model.params import Params

# Widths of more are multiples of it.
_TILE = 128


def score(
    model: BTLM,
    params: Params,
    input_ids: ArrayLike,
    *,
    attention_mask: ArrayLike | None = None,
) -> np.ndarray:
    """The log-probability of every token given those before it.

    Compiled once per bucket of lengths; whole logits are never held.

    Args:
      model, params: the model and its weights, on a device or a mesh.
      input_ids: int [B, T]; shorter texts are padded on the left.
      attention_mask: [B, T], nonzero for real tokens.

    Returns:
      fp32 [B, T]; NaN for padding and for each row's first token, which follows nothing.

    Raises:
      ValueError: an empty text, tokens outside the vocabulary, right padding, or more tokens than
        there are learned positions.
    """
    c = model.config
    ids, mask = prompts.check_prompts(input_ids, attention_mask, c.vocab_size, None)
    rows, T = ids.shape
    prompts.check_context_length(prompts.LengthLimits(T, 0, T), c, None)
    extra, width = -rows % decode.num_batch_shards(model, params), padded_width(model, params, T)

    def filled(x):
        return np.pad(x, ((0, extra), (0, width - T)), mode="edge") * (np.arange(width) < T)

    found = _score(model, params, filled(ids), filled(mask), np.int32(T))
    logprobs = np.asarray(found)[:rows, :T]
    known = mask * np.pad(mask[:, :-1], ((0, 0), (1, 0))) != 0
    return np.where(known, logprobs, np.float32(np.nan))


@functools.partial(jax.jit, static_argnames="model")
def _score(model: BTLM, params: Params, ids, mask, length):
    runtime = model.runtime(params)
    with sharding.on_mesh(runtime.mesh):
        at = None if model.config.alibi else jnp.maximum(jnp.cumsum(mask, 1) - 1, 0)
        h, _ = model.hidden(params, ids, attention_mask=mask, positions=at, length=length)
        after = jnp.concatenate([ids[:, 1:], ids[:, :1]], 1)
        found = runtime.shard(-token_predictions(runtime, params, h, after).nll, "batch", None)
        # Of the token at a place, from the state before it.
        return jnp.concatenate([found[:, -1:], found[:, :-1]], 1)


def padded_width(model: BTLM, params: Params, length: int) -> int:
    """The static shape for texts of a length: few programs, splits over a mesh."""
    mesh, parts = sharding.mesh_of(params["wte"]), 1
    if mesh is not None:
        parts = sharding.num_chunks(sharding.num_shards(mesh, model.rules, "sequence"))
    width = prompts.bucket_length(length)
    return sharding.round_up(width, math.lcm(min(width, _TILE), parts))
