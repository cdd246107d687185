"""The next-token loss of a model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from btlm_jax.model import forward
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.chunked_loss import IGNORE, LossSum, head_loss
from btlm_jax.model.params import Params
from btlm_jax.model.positions import segment_positions


def next_token_loss(
    model: BTLM,
    params: Params,
    input_ids: ArrayLike,
    *,
    labels: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> LossSum:
    """Computes the loss of predicting every token from the tokens before it.

    Args:
      model: the model.
      params: its weights.
      input_ids: int [B, T].
      labels: int [B, T], not shifted (this function shifts them by one, as transformers does). A
        label of -100 is excluded; any other outside the vocabulary makes the loss NaN. The default
        is `input_ids` without padding and without the first token of every later segment, which
        has no context. Where an EOS begins each segment, as in training with
        `data.mask_documents`, pass `labels=input_ids`.
      attention_mask: as in `BTLM.apply`.
      segment_ids: as in `BTLM.apply`.
      positions: as in `BTLM.apply`.
      weights: [B, T], the weight of every label, not shifted either; a constant to gradients.

    Returns:
      Sums over the T - 1 predictions of every row; `.mean` is the loss transformers reports.

    Raises:
      ValueError: shapes that do not agree; see `BTLM.apply`.
    """
    ids = _as_int32("input_ids", input_ids)
    if labels is None:
        labels = _default_labels(ids, attention_mask, segment_ids)
    labels = _as_int32("labels", labels)
    if labels.shape != ids.shape:
        raise ValueError(
            f"labels: found shape {labels.shape}, expected that of input_ids {ids.shape}"
        )
    if weights is not None:
        weights = _shift_left(_as_weights(weights, ids.shape), 0.0)
    runtime = model.runtime(params)
    h_BTD, _ = forward.hidden(
        runtime,
        params,
        ids,
        attention_mask=attention_mask,
        segment_ids=segment_ids,
        positions=positions,
    )
    return head_loss(runtime, params, h_BTD, _shift_left(labels, IGNORE), weights)[1]


def target_loss(
    model: BTLM,
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    weights: ArrayLike | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, LossSum]:
    """Computes the loss of training windows: their first T tokens are inputs, their last T targets.

    Args:
      model: the model.
      params: its weights.
      tokens: int32 [B, T + 1].
      segment_ids: int32 [B, T + 1], the document of every token as an input, from which the next
        token is predicted: attention stays within equal ids. Every target counts, so the EOS that
        ends a document must begin the segment of the next one, whose first token it predicts
        (`btlm_jax.train.batches.document_segments`).
      weights: [B, T], the weight of every prediction; a constant to gradients.
      z_loss: coefficient of the square of log(sum(exp(logits))), which keeps the softmax normalized
        (PaLM, arXiv 2204.02311, section 5, uses 1e-4).

    Returns:
      The objective to minimize, fp32: cross-entropy and z-loss, times the weights, summed over the
      B * T predictions; and the cross-entropy alone, to report.

    Raises:
      ValueError: the weights have another shape.
    """
    targets, segments, positions = tokens[:, 1:], None, None
    if segment_ids is not None:
        segments = segment_ids[:, :-1]
        positions = segment_positions(model.config, segments)
    if weights is not None:
        weights = _as_weights(weights, targets.shape)
    runtime = model.runtime(params)
    h_BTD, _ = forward.hidden(
        runtime, params, tokens[:, :-1], segment_ids=segments, positions=positions
    )
    return head_loss(runtime, params, h_BTD, targets, weights, z_loss)


def _default_labels(ids_BT: jax.Array, attention_mask, segment_ids) -> jax.Array:
    """Returns the labels that are neither padding nor the first of a segment, unshifted."""
    labels_BT = ids_BT
    if attention_mask is not None:
        mask_BT = jnp.asarray(attention_mask) != 0
        # A prediction made from a padding token has no meaning, so the first valid token of a
        # left-padded row has no loss.
        after_valid_BT = jnp.concatenate([mask_BT[:, :1] & False, mask_BT[:, :-1]], 1)
        labels_BT = jnp.where(mask_BT & after_valid_BT, labels_BT, IGNORE)
    if segment_ids is not None:
        ids_BT = jnp.asarray(segment_ids)
        is_first_BT = jnp.ones_like(ids_BT[:, :1], bool)
        continues_BT = jnp.concatenate([is_first_BT, ids_BT[:, 1:] == ids_BT[:, :-1]], 1)
        labels_BT = jnp.where(continues_BT, labels_BT, IGNORE)
    return labels_BT


def _as_int32(name: str, x: ArrayLike) -> jax.Array:
    """Converts to int32: in unsigned dtypes, as token files have, IGNORE would wrap around."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name}: found dtype {x.dtype}, expected integers")
    return x.astype(jnp.int32)


def _as_weights(x: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    x = jnp.asarray(x, jnp.float32)
    if x.shape != shape:
        raise ValueError(f"weights: found shape {x.shape}, expected that of the labels {shape}")
    return x


def _shift_left(x_BT: jax.Array, last) -> jax.Array:
    """Shifts by one and appends `last`; slicing would change the length of a split sequence."""
    return jnp.concatenate([x_BT[:, 1:], jnp.full_like(x_BT[:, :1], last)], 1)
