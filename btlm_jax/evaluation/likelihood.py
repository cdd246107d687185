"""Log-likelihoods of continuations, in batches of few shapes: what choices are scored by.

The rules are those of lm-evaluation-harness's Hugging Face backend: what does not fit is cut off on
the left, and pairs that read the same tokens (a context with answers of one token each, say) are
read once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.evaluation.batch_shapes import TOKENS, check_batch_size
from btlm_jax.generation import decode
from btlm_jax.generation.scoring import filled_width
from btlm_jax.model import alibi, sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.loss import token_predictions
from btlm_jax.model.params import Params

logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """What is asked: how likely a continuation is after a context."""

    context: tuple[int, ...]  # one token at least
    continuation: tuple[int, ...]  # likewise


class Likelihood(NamedTuple):
    """What is answered."""

    logprob: float  # nats, summed over the continuation
    is_greedy: bool  # whether each of its tokens is the likeliest, the first of equals


class _Asked(NamedTuple):
    """Of a row of inputs, one continuation."""

    key: Hashable
    length: int  # of the continuation
    last: int  # its last token, which is not among the inputs


Rows = dict[tuple[int, ...], list[_Asked]]


def rows(pairs: Mapping[Any, Pair], max_length: int) -> Rows:
    """What has to be read: inputs of at most `max_length` tokens, each once.

    Raises:
      ValueError: an empty context or continuation, or a continuation longer than `max_length`.
    """
    found: Rows = {}
    cut = 0
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
        both = context + continuation
        cut += len(both) > max_length + 1
        inputs = both[-(max_length + 1) :][:-1]
        found.setdefault(inputs, []).append(_Asked(key, len(continuation), both[-1]))
    if cut:
        logger.warning(
            "%d of %d contexts are longer than max_length = %d with their continuations: they are "
            "cut off on the left", cut, len(pairs), max_length,
        )  # fmt: skip
    return found


def likelihoods(
    model: BTLM, params: Params, rows: Rows, *, batch_size: int | None = None
) -> Iterator[tuple[Any, Likelihood]]:
    """Answers, each with its key, as they come: the longest first.

    Rows are filled up on the right, to one of few widths. Under dynamic ALiBi scaling only rows of
    one length share a batch, so each is scaled as it would be alone.

    Args:
      model, params: the model and its weights, stacked or by layer, on a device or a mesh.
      rows: from the function of that name.
      batch_size: rows at a time, over all devices; on a mesh rounded up to what it divides. Default
        about 8192 tokens on each device.

    Raises:
      ValueError: the size of the batch.
    """
    check_batch_size(batch_size, None)
    return _likelihoods(model, params, rows, batch_size)


def _likelihoods(
    model: BTLM, params: Params, rows: Rows, batch_size: int | None
) -> Iterator[tuple[Any, Likelihood]]:
    parts = decode.ways(model, params)
    exact = alibi.scale_varies(model.config.alibi_scaling, max(map(len, rows), default=1))
    widths: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for inputs in sorted(rows, key=len, reverse=True):
        width = filled_width(model, params, len(inputs))
        widths.setdefault((width, len(inputs) if exact else 0), []).append(inputs)
    for (width, _), same in widths.items():
        most = batch_size or max(1, TOKENS // width) * parts
        # Powers of two, so that few of anything need no large batch and no program of their own.
        full = sharding.round_up(min(most, 1 << (len(same) - 1).bit_length()), parts)
        for start in range(0, len(same), full):
            some = same[start : start + full]
            yield from _answers(model, params, rows, some, (full, width))


def _answers(
    model: BTLM, params: Params, rows: Rows, some: Sequence[tuple[int, ...]], shape: tuple[int, int]
) -> Iterator[tuple[Any, Likelihood]]:
    ids = np.zeros(shape, np.int32)
    lengths = np.ones(len(ids), np.int32)
    for i, inputs in enumerate(some):
        ids[i, : len(inputs)], lengths[i] = inputs, len(inputs)
    most = max(len(rows[inputs]) for inputs in some)
    # Powers of two, as every number is a program.
    lasts = np.zeros((len(ids), 1 << (most - 1).bit_length()), np.int32)
    for i, inputs in enumerate(some):
        lasts[i, : len(rows[inputs])] = [asked.last for asked in rows[inputs]]
    logprobs, greedy, after, best = jax.device_get(_read(model, params, ids, lengths, lasts))
    for i, inputs in enumerate(some):
        for j, asked in enumerate(rows[inputs]):
            # Of the continuation: the inputs among it, then its last token.
            within = slice(len(inputs) - asked.length, len(inputs) - 1)
            total = logprobs[i, within].sum(dtype=np.float64) + float(after[i, j])
            alike = bool(greedy[i, within].all()) and int(best[i]) == asked.last
            yield asked.key, Likelihood(float(total), alike)


@functools.partial(jax.jit, static_argnames="model")
def _read(model: BTLM, params: Params, ids: jax.Array, lengths: jax.Array, lasts: jax.Array) -> Any:
    """What a model says of its inputs [B, T], of which `lengths` [B] are meant.

    Returns:
      Of the token after each: the log-probability, fp32 [B, T], and whether it is the likeliest,
      bool [B, T]; after the last: the log-probabilities of `lasts`, fp32 [B, A], and the likeliest,
      int [B].
    """
    runtime = model.runtime(params)
    positions = None
    if not model.config.alibi:  # the filling must not ask for more than there are
        positions = jnp.minimum(jnp.arange(ids.shape[1]), lengths[:, None] - 1)
    with sharding.on_mesh(runtime.mesh):
        h, _ = model.hidden(params, ids, positions=positions, length=lengths.max())
        targets = jnp.concatenate([ids[:, 1:], ids[:, :1]], 1)
        nll, greedy = token_predictions(runtime, params, h, targets)
        # A row's last state, without gathering the others' devices.
        here = jnp.arange(ids.shape[1]) == lengths[:, None] - 1
        last = jnp.where(runtime.shard(here, "batch", "sequence")[..., None], h, 0).sum(1)
        log_p = jax.nn.log_softmax(runtime.shard(model.logits(params, last), "batch", None), -1)
        lasts = runtime.shard(lasts, "batch", None)
        return -nll, greedy, jnp.take_along_axis(log_p, lasts, -1), log_p.argmax(-1)
