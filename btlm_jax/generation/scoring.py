"""The log-probabilities of the tokens of given texts, and the most likely ones instead."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

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
# Rows of logits that exist at a time.
_LOGIT_ROWS = 32


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


class TopTokens(NamedTuple):
    """The prediction of every token of a text but the first, [T - 1] or [T - 1, k]."""

    logprobs: Any  # fp32, of the tokens of the text
    top_ids: Any  # int32, the most likely tokens, best first
    top_logprobs: Any  # fp32


def top_tokens(model: BTLM, params: Params, input_ids: ArrayLike, k: int) -> TopTokens:
    """Returns the log-probabilities of the tokens of a text, and the k most likely ones instead.

    Full logits are never materialized.

    Args:
      model: the model.
      params: its weights, on a device or a mesh.
      input_ids: int [T].
      k: number of most likely tokens, static.
    """
    ids, _ = prompts.check_prompts(np.asarray(input_ids)[None], None, model.config.vocab_size, None)
    T = ids.shape[1]
    prompts.check_context_length(prompts.LengthLimits(T, 0, T), model.config, None)
    rows = decode.num_batch_shards(model, params)
    width = sharding.round_up(padded_width(model, params, T), _LOGIT_ROWS)
    padded = np.zeros((rows, width), np.int32)
    padded[:, :T] = ids
    best = _top_tokens(model, params, padded, np.int32(T), k)
    return TopTokens(*(np.asarray(x)[: T - 1] for x in best))


@functools.partial(jax.jit, static_argnames=("model", "k"))
def _top_tokens(model: BTLM, params: Params, ids, length, k: int) -> TopTokens:
    runtime = model.runtime(params)
    with sharding.on_mesh(runtime.mesh):
        positions = count_positions(model.config, jnp.ones_like(ids))
        h_BTD, _ = forward.hidden(runtime, params, ids, positions=positions, length=length)
        h_TD = runtime.shard(h_BTD, None, None, None)[0]
        targets_T = jnp.roll(ids[0], -1)

        def of_chunk(chunk):
            h, targets = chunk
            logits = runtime.shard(forward.logits(runtime, params, h[None]), None, None, None)[0]
            logprobs = jax.nn.log_softmax(logits, -1)
            top, top_ids = jax.lax.top_k(logprobs, k)
            own = jnp.take_along_axis(logprobs, targets[:, None], 1)[:, 0]
            return TopTokens(own, top_ids, top)

        chunks = h_TD.reshape(-1, _LOGIT_ROWS, h_TD.shape[-1]), targets_T.reshape(-1, _LOGIT_ROWS)
        best = jax.lax.map(of_chunk, chunks)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), best)


def padded_width(model: BTLM, params: Params, length: int) -> int:
    """Returns the static width for texts of a length: a bucket that the mesh divides."""
    mesh, num_chunks = sharding.mesh_of(params["wte"]), 1
    if mesh is not None:
        num_chunks = sharding.num_chunks(sharding.num_shards(mesh, model.rules, "sequence"))
    width = prompts.bucket_length(length)
    return sharding.round_up(width, math.lcm(min(width, _TILE), num_chunks))
