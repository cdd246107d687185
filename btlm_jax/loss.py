"""Next-token cross-entropy in fp32."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from btlm_jax import sharding
from btlm_jax.layers import Spec, project_logits
from btlm_jax.model import BTLM
from btlm_jax.weights import Params

# Positions with this label are left out of the loss, as in PyTorch and transformers.
IGNORE = -100


class LossSum(NamedTuple):
    """A loss as sums, so that parts of a batch can be added before the one division."""

    nll: jax.Array  # fp32, the summed negative log-likelihood in nats
    tokens: jax.Array  # fp32, how many tokens it sums over

    @property
    def mean(self) -> jax.Array:
        """Nats per token; 0 for no token."""
        return self.nll / jnp.maximum(self.tokens, 1.0)


def cross_entropy(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[label], fp32 [B, T]; 0 where the label is `IGNORE`.

    The label's logit is selected by comparison rather than by a gather, so that the vocabulary may
    be split over a mesh axis.
    """
    vocab = jnp.arange(logits_BTV.shape[-1], dtype=labels_BT.dtype)
    parts = jax.typeof(logits_BTV).sharding.spec[-1]
    if parts is not None:
        vocab = jax.sharding.reshard(vocab, jax.sharding.PartitionSpec(parts))
    chosen = jnp.where(vocab == labels_BT[..., None], logits_BTV, 0.0).sum(-1)
    return jnp.where(labels_BT == IGNORE, 0.0, jax.nn.logsumexp(logits_BTV, -1) - chosen)


def next_token_loss(
    model: BTLM,
    params: Params,
    input_ids: ArrayLike,
    *,
    labels: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    positions: ArrayLike | None = None,
) -> LossSum:
    """The loss of predicting every token from those before it.

    Args:
      model, params: the model and its weights.
      input_ids: int [B, T].
      labels: int [B, T], not shifted (the shift by one is made here, as in transformers). A label
        of -100 is left out; any other outside the vocabulary makes the loss NaN. Default:
        `input_ids`, without padding and without the first token of every later segment.
      attention_mask, segment_ids, positions: as in `BTLM.apply`.

    Returns:
      Sums over the T - 1 predictions of every row; `.mean` is the loss transformers reports.

    Raises:
      ValueError: shapes that do not agree; see `BTLM.apply`.
    """
    ids = _int32("input_ids", input_ids)
    if labels is None:
        labels = ids
        if attention_mask is not None:
            mask = jnp.asarray(attention_mask) != 0
            # A prediction made from a padding token has no meaning, so the first real token of a
            # left-padded row has no loss.
            seen = jnp.concatenate([mask[:, :1] & False, mask[:, :-1]], 1)
            labels = jnp.where(mask & seen, labels, IGNORE)
        if segment_ids is not None:
            segments = jnp.asarray(segment_ids)
            same = jnp.concatenate(
                [segments[:, :1] == segments[:, :1], segments[:, 1:] == segments[:, :-1]], 1
            )
            labels = jnp.where(same, labels, IGNORE)
    labels = _int32("labels", labels)
    if labels.shape != ids.shape:
        raise ValueError(
            f"labels: found shape {labels.shape}, expected that of input_ids {ids.shape}"
        )
    h, _ = model.hidden(
        params, ids, attention_mask=attention_mask, segment_ids=segment_ids, positions=positions
    )
    # The last state predicts nothing; it stays, because a split sequence cannot be cut by one.
    targets = jnp.concatenate([labels[:, 1:], jnp.full_like(labels[:, :1], IGNORE)], 1)
    return _head_loss(model.spec(params), params, h, targets)


def target_loss(
    model: BTLM, params: Params, tokens: jax.Array, segment_ids: jax.Array | None = None
) -> LossSum:
    """The loss of training windows: the first T tokens of each are read, the last T predicted.

    Args:
      model, params: the model and its weights.
      tokens: int32 [B, T + 1].
      segment_ids: int32 [B, T + 1]; attention stays within segments, and the first token of a
        segment is not predicted from the segment before.

    Returns:
      Sums over the B * T predictions.
    """
    targets, segments = tokens[:, 1:], None
    if segment_ids is not None:
        segments = segment_ids[:, :-1]
        targets = jnp.where(segment_ids[:, 1:] == segments, targets, IGNORE)
    h, _ = model.hidden(params, tokens[:, :-1], segment_ids=segments)
    return _head_loss(model.spec(params), params, h, targets)


@functools.partial(jax.jit, static_argnames="spec")
def _head_loss(spec: Spec, params: Params, h_BTD: jax.Array, targets_BT: jax.Array) -> LossSum:
    """The loss of predicting `targets_BT`, each from the state there."""
    with sharding.on_mesh(spec.mesh):
        targets = spec.place(targets_BT, "batch", "sequence")
        logits = project_logits(spec, params, h_BTD, sharded=True)
        known = (targets == IGNORE) | ((targets >= 0) & (targets < spec.config.vocab_size))
        nll = jnp.where(known, cross_entropy(logits, targets), jnp.nan)
        return LossSum(nll.sum(), (targets != IGNORE).sum().astype(jnp.float32))


def _int32(name: str, x: ArrayLike) -> jax.Array:
    """As int32: in an unsigned dtype, as token files have, IGNORE would wrap to a token id."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name}: found dtype {x.dtype}, expected integers")
    return x.astype(jnp.int32)
