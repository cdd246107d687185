"""Log-likelihoods of continuations, by which multiple choice is scored, in batches of few shapes.

The rules are those of lm-evaluation-harness's Hugging Face backend: inputs that do not fit are
truncated on the left, and pairs with equal inputs (such as a context with several answers of one
token) are read once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.evaluation.batch_shapes import TOKENS_PER_DEVICE, check_batch_size
from btlm_jax.generation import decode
from btlm_jax.generation.scoring import padded_width
from btlm_jax.model import alibi, forward, sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.chunked_loss import token_predictions
from btlm_jax.model.params import Params

logger = logging.getLogger(__name__)


class ContinuationPair(NamedTuple):
    """A context and a continuation to score."""

    context: tuple[int, ...]  # at least one token
    continuation: tuple[int, ...]  # at least one token


class Likelihood(NamedTuple):
    """The score of a continuation."""

    logprob: float  # nats, summed over the continuation
    is_greedy: bool  # whether each token is the likeliest, the first of equals


class _ScoredSuffix(NamedTuple):
    """A continuation at the end of a row of inputs."""

    key: Hashable
    length: int  # tokens of the continuation
    last: int  # its last token, which is not an input


InputRows = dict[tuple[int, ...], list[_ScoredSuffix]]


def group_by_inputs(pairs: Mapping[Any, ContinuationPair], max_length: int) -> InputRows:
    """Returns the distinct inputs to read, of at most `max_length` tokens, with their scores.

    Raises:
      ValueError: an empty context or continuation, or a continuation longer than `max_length`.
    """
    rows: InputRows = {}
    truncated = 0
    for key, (context, continuation) in pairs.items():
        if not context or not continuation:
            raise ValueError(
                f"found a context of {len(context)} tokens and a continuation of "
                f"{len(continuation)}, expected at least one each"
            )
        if len(continuation) > max_length:
            raise ValueError(
                f"found a continuation of {len(continuation)} tokens, expected at most the "
                f"{max_length} that are read at once (max_length)"
            )
        tokens = context + continuation
        truncated += len(tokens) > max_length + 1
        inputs = tokens[-(max_length + 1) :][:-1]
        rows.setdefault(inputs, []).append(_ScoredSuffix(key, len(continuation), tokens[-1]))
    if truncated:
        logger.warning(
            "%d of %d contexts are longer than max_length = %d with their continuations: they are "
            "truncated on the left", truncated, len(pairs), max_length,
        )  # fmt: skip
    return rows


def score_rows(
    model: BTLM, params: Params, rows: InputRows, *, batch_size: int | None = None
) -> Iterator[tuple[Any, Likelihood]]:
    """Yields (key, likelihood) as rows are read, the longest first.

    Rows are padded on the right, to one of few widths. Under dynamic ALiBi scaling only rows of
    equal length share a batch, so that each is scaled as if it were alone.

    Args:
      model, params: the model and its weights, stacked or unstacked, on a device or a mesh.
      rows: from `group_by_inputs`.
      batch_size: rows per batch, over all devices; rounded up to a multiple of the mesh's shards of
        rows. Default about 8192 tokens on each device.

    Raises:
      ValueError: the batch size is not positive.
    """
    check_batch_size(batch_size, None)
    return _score_batches(model, params, rows, batch_size)


def _score_batches(
    model: BTLM, params: Params, rows: InputRows, batch_size: int | None
) -> Iterator[tuple[Any, Likelihood]]:
    num_shards = decode.num_batch_shards(model, params)
    by_length = alibi.scale_varies(model.config.alibi_scaling, max(map(len, rows), default=1))
    groups: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for inputs in sorted(rows, key=len, reverse=True):
        width = padded_width(model, params, len(inputs))
        groups.setdefault((width, len(inputs) if by_length else 0), []).append(inputs)
    for (width, _), group in groups.items():
        max_rows = batch_size or max(1, TOKENS_PER_DEVICE // width) * num_shards
        # Powers of two, so that small groups need neither a large batch nor many programs.
        size = min(max_rows, 1 << (len(group) - 1).bit_length())
        size = sharding.round_up(size, num_shards)
        for start in range(0, len(group), size):
            yield from _score_batch(model, params, rows, group[start : start + size], (size, width))


def _score_batch(
    model: BTLM,
    params: Params,
    rows: InputRows,
    batch: Sequence[tuple[int, ...]],
    shape: tuple[int, int],
) -> Iterator[tuple[Any, Likelihood]]:
    ids = np.zeros(shape, np.int32)
    lengths = np.ones(len(ids), np.int32)
    for i, inputs in enumerate(batch):
        ids[i, : len(inputs)], lengths[i] = inputs, len(inputs)
    max_suffixes = max(len(rows[inputs]) for inputs in batch)
    # Powers of two, because every number of answers is another program.
    lasts = np.zeros((len(ids), 1 << (max_suffixes - 1).bit_length()), np.int32)
    for i, inputs in enumerate(batch):
        lasts[i, : len(rows[inputs])] = [suffix.last for suffix in rows[inputs]]
    scores = _score_inputs(model, params, ids, lengths, lasts)
    logprobs, greedy, last_logprobs, likeliest = jax.device_get(scores)
    for i, inputs in enumerate(batch):
        for j, suffix in enumerate(rows[inputs]):
            # The continuation's tokens among the inputs, then its last token.
            span = slice(len(inputs) - suffix.length, len(inputs) - 1)
            total = logprobs[i, span].sum(dtype=np.float64) + float(last_logprobs[i, j])
            is_greedy = bool(greedy[i, span].all()) and int(likeliest[i]) == suffix.last
            yield suffix.key, Likelihood(float(total), is_greedy)


@functools.partial(jax.jit, static_argnames="model")
def _score_inputs(
    model: BTLM, params: Params, ids: jax.Array, lengths: jax.Array, lasts: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Scores the next token at every position.

    Args:
      model, params: the model and its weights.
      ids: int32 [B, T], padded on the right.
      lengths: int32 [B], number of valid tokens.
      lasts: int32 [B, A], tokens to score after the last valid token.

    Returns:
      The log-probability of the next input, fp32 [B, T], and whether it is the likeliest, bool
      [B, T]; after the last valid token, the log-probabilities of `lasts`, fp32 [B, A], and the
      likeliest token, int [B].
    """
    runtime = model.runtime(params)
    with sharding.on_mesh(runtime.mesh):
        h, _ = forward.hidden(runtime, params, ids, length=lengths.max())
        targets = jnp.concatenate([ids[:, 1:], ids[:, :1]], 1)
        nll, greedy = token_predictions(runtime, params, h, targets)
        # Select a row's last state by a mask, which gathers nothing from other devices.
        is_last = jnp.arange(ids.shape[1]) == lengths[:, None] - 1
        last = jnp.where(runtime.shard(is_last, "batch", "sequence")[..., None], h, 0).sum(1)
        last_logits = runtime.shard(forward.logits(runtime, params, last), "batch", None)
        log_p = jax.nn.log_softmax(last_logits, -1)
        lasts = runtime.shard(lasts, "batch", None)
        return -nll, greedy, jnp.take_along_axis(log_p, lasts, -1), log_p.argmax(-1)
