"""Cross-entropy of the head in fp32, in chunks of rows.

Logits are the largest array of a training step, so the full logits are never materialized: a chunk
of rows at a time goes through the head, the loss and back, in one pass that produces the loss and
both gradients. That takes three matrix products, where rematerialization takes four, and the logits
of a chunk stay in fast memory.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, reshard

from btlm_jax.model import packed, sharding
from btlm_jax.model.einsum import einsum
from btlm_jax.model.head import head_logits, head_weight
from btlm_jax.model.packed import PackedWeight
from btlm_jax.model.params import Params
from btlm_jax.model.runtime import Runtime

# Positions with this label are excluded from the loss, as in PyTorch and transformers.
IGNORE = -100

# Rows of logits at a time. Every chunk reads and writes the fp32 gradient of the head for one
# product of rows x V x D: below about 1000 rows an accelerator would wait for its memory. At the
# size of the released model, compiled for TPU v5e, twice the rows take 0.14 GiB more at the peak.
ROWS = 1024


class LossSum(NamedTuple):
    """A loss as sums, so that parts of a batch can be added before the one division.

    Attributes:
      nll: fp32, the summed negative log-likelihood in nats, each term times its weight.
      tokens: fp32, the summed weights; without weights, the number of tokens in the sum.
    """

    nll: jax.Array
    tokens: jax.Array

    @property
    def mean(self) -> jax.Array:
        """Nats per token; 0 without any token."""
        return self.nll / jnp.where(self.tokens == 0.0, 1.0, self.tokens)


def cross_entropy(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """Returns -log softmax(logits)[label], fp32 [B, T]; 0 where the label is `IGNORE`.

    It takes full logits, which `head_loss` does not materialize.
    """
    ids = jnp.arange(logits_BTV.shape[-1])
    normalizer, label_logit, _ = _log_softmax(logits_BTV, labels_BT, ids, ())
    return jnp.where(labels_BT == IGNORE, 0.0, normalizer - label_logit)


def _log_softmax(logits, labels, ids, vocab_axes: tuple[str, ...]):
    """Returns log(sum(exp(logits))), the label's logit, and where it is.

    Args:
      logits: [..., v].
      labels: [...].
      ids: [v], the token ids of the logits. They are compared with the labels instead of indexed,
        so that the vocabulary may be split over mesh axes.
      vocab_axes: these axes, within `jax.shard_map`.

    Returns:
      fp32 [...], fp32 [...], bool [..., v].
    """
    top = jax.lax.stop_gradient(logits).max(-1)
    top = jax.lax.pmax(top, vocab_axes) if vocab_axes else top
    total = _psum(jnp.exp(logits - top[..., None]).sum(-1), vocab_axes)
    is_label = ids == labels[..., None]
    label_logit = _psum(jnp.where(is_label, logits, 0.0).sum(-1), vocab_axes)
    return jnp.log(total) + top, label_logit, is_label


def _psum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x


# Losses of final hidden states ------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("runtime", "z_loss", "rows"))
def head_loss(
    runtime: Runtime,
    params: Params,
    h_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array | None = None,
    z_loss: float = 0.0,
    rows: int = ROWS,
) -> tuple[jax.Array, LossSum]:
    """Computes the loss of final states, each of which predicts the target at its position.

    Args:
      h_BTD: final hidden states.
      targets_BT: token ids or `IGNORE`; any other number turns loss and gradients into NaN.
      rows: the number of rows of logits at a time.

    Further arguments and results as in `loss.target_loss`.
    """
    with sharding.on_mesh(runtime.mesh):
        targets = runtime.shard(targets_BT, "batch", "sequence")
        weights = (targets != IGNORE).astype(jnp.float32)
        if weights_BT is not None:
            constant = jax.lax.stop_gradient(weights_BT)
            weights = weights * runtime.shard(constant, "batch", "sequence")
        is_valid = (targets == IGNORE) | ((targets >= 0) & (targets < runtime.config.vocab_size))
        nan_weights = jnp.where(is_valid, weights, jnp.nan)
        w_VD = _float_head_weight(runtime, params)
        objective, penalty = _weighted_loss(
            runtime, z_loss, rows, w_VD, h_BTD, targets, nan_weights
        )
        return objective, LossSum(objective - jax.lax.stop_gradient(penalty), weights.sum())


class TokenPredictions(NamedTuple):
    """How a model predicts given tokens.

    Attributes:
      nll: fp32 [B, T], -log p in nats.
      likeliest: bool [B, T], whether the token is the argmax, the lowest id among equals.
    """

    nll: jax.Array
    likeliest: jax.Array


@functools.partial(jax.jit, static_argnames=("runtime", "rows"))
def token_predictions(
    runtime: Runtime,
    params: Params,
    h_BTD: jax.Array,
    targets_BT: jax.Array,
    rows: int = ROWS,
) -> TokenPredictions:
    """Computes the loss of every target; arguments as in `head_loss`, which sums them.

    The loss is 0 where the target is `IGNORE`, and NaN where it is outside the vocabulary.
    """
    with sharding.on_mesh(runtime.mesh):
        targets = runtime.shard(targets_BT, "batch", "sequence")
        w_VD = _float_head_weight(runtime, params).astype(runtime.dtype)
        w_VD = runtime.shard(w_VD, "vocab", None)
        if runtime.mesh is None:
            nll, likeliest = _local_predictions(runtime, rows, (), w_VD, h_BTD, targets)
        else:
            spec = functools.partial(sharding.partition_spec, runtime.rules)
            h_spec, row_spec = spec("batch", "sequence", None), spec("batch", "sequence")
            vocab_axes = sharding.mesh_axes(runtime.rules, "vocab")
            nll, likeliest = jax.shard_map(
                functools.partial(_local_predictions, runtime, rows, vocab_axes),
                in_specs=(spec("vocab", None), h_spec, row_spec),
                out_specs=row_spec,
            )(w_VD, h_BTD, targets)
        is_valid = (targets >= 0) & (targets < runtime.config.vocab_size)
        nll = jnp.where(targets == IGNORE, 0.0, jnp.where(is_valid, nll, jnp.nan))
        return TokenPredictions(nll, likeliest)


def _float_head_weight(runtime: Runtime, params: Params) -> jax.Array:
    """Returns the weight of the head, [V, D] in floats."""
    w = head_weight(runtime, params)
    return packed.dequantize(w, runtime.dtype) if isinstance(w, PackedWeight) else w


def _local_predictions(
    runtime: Runtime, rows: int, vocab_axes, w, h, targets
) -> tuple[jax.Array, jax.Array]:
    """Computes `token_predictions` on a shard: weight [v, D], states [b, t, D]."""
    ids = _local_ids(w, vocab_axes)

    def predict_chunk(chunk):
        x, labels = chunk
        logits = head_logits(runtime, einsum("nd,vd->nv", x, w, runtime.precision), ids)
        normalizer, label_logit, _ = _log_softmax(logits, labels, ids, vocab_axes)
        best, top = ids[logits.argmax(-1)], logits.max(-1)
        if vocab_axes:  # like argmax: the lowest id among the shards with the largest logit
            is_top = top == jax.lax.pmax(top, vocab_axes)
            best = jax.lax.pmin(jnp.where(is_top, best, jnp.iinfo(best.dtype).max), vocab_axes)
        return normalizer - label_logit, best == labels

    chunks = jax.lax.map(predict_chunk, (_split_rows(h, rows), _split_rows(targets, rows)))
    nll, likeliest = (x.reshape(-1)[: targets.size].reshape(targets.shape) for x in chunks)
    return nll, likeliest


# The summed loss and its gradients, in chunks ---------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _weighted_loss(runtime: Runtime, z_loss: float, rows: int, w_VD, h_BTD, targets, weights):
    """Returns the objective, and the z-loss it contains, which has no gradient of its own.

    When differentiated, the forward pass computes the gradients as well.
    """
    arrays = w_VD, h_BTD, targets, weights
    return _chunked_loss(runtime, z_loss, rows, *arrays, with_gradients=False)[0]


def _weighted_loss_forward(runtime, z_loss, rows, w_VD, h_BTD, targets, weights):
    return _chunked_loss(runtime, z_loss, rows, w_VD, h_BTD, targets, weights, with_gradients=True)


def _weighted_loss_backward(runtime, z_loss, rows, gradients, cotangents):
    factor = cotangents[0]
    # In fp32, because a rounded factor would change every entry alike.
    dw, dh = ((g.astype(jnp.float32) * factor).astype(g.dtype) for g in gradients)
    return dw, dh, None, None


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


def _chunked_loss(
    runtime: Runtime, z_loss, rows, w_VD, h_BTD, targets, weights, *, with_gradients: bool
):
    """Returns ((objective, penalty), gradients by w_VD and h_BTD or None)."""
    w = runtime.shard(w_VD.astype(runtime.dtype), "vocab", None)
    local = functools.partial(_local_loss, runtime, z_loss, rows, with_gradients)
    if runtime.mesh is None:
        sums, (dw, dh) = local((), (), (), w, h_BTD, targets, weights)
    else:
        spec = functools.partial(sharding.partition_spec, runtime.rules)
        w_spec, h_spec = spec("vocab", None), spec("batch", "sequence", None)
        row_spec = spec("batch", "sequence")
        axes = functools.partial(sharding.mesh_axes, runtime.rules)
        row_axes = axes("batch") + axes("sequence")
        # The axes over which both the stored weight and the rows are split.
        scatter_axes = tuple(name for name in axes("embed") if name in row_axes)
        dw_spec = PartitionSpec(*w_spec[:1], scatter_axes or None)
        sums, (dw, dh) = jax.shard_map(
            functools.partial(local, axes("vocab"), row_axes, scatter_axes),
            in_specs=(w_spec, h_spec, row_spec, row_spec),
            out_specs=(PartitionSpec(), (dw_spec, h_spec) if with_gradients else (None, None)),
        )(w, h_BTD, targets, weights)
    if not with_gradients:
        return sums, None
    if runtime.mesh is not None:
        dw = reshard(dw, jax.typeof(w_VD).sharding)
    return sums, (dw.astype(w_VD.dtype), dh)


def _local_loss(
    runtime: Runtime, z_loss, rows, with_gradients: bool,
    vocab_axes, row_axes, scatter_axes, w, h, targets, weights,
) -> Any:  # fmt: skip
    """Computes `_chunked_loss` on a shard: weight [v, D], states [b, t, D]."""
    D, count = w.shape[1], targets.size
    ids = _local_ids(w, vocab_axes)

    def product(equation, x, y):
        return einsum(equation, x, y, runtime.precision)

    def weighted_sum(x, weight):  # rows of weight 0 may hold anything
        return jnp.where(weight == 0.0, 0.0, x * weight).sum()

    def add_chunk(total, chunk):
        x, labels, weight = chunk
        (nll, penalty), dw = total
        logits = head_logits(runtime, product("nd,vd->nv", x, w), ids)
        normalizer, label_logit, is_label = _log_softmax(logits, labels, ids, vocab_axes)
        nll = nll + weighted_sum(normalizer - label_logit, weight)
        penalty = penalty + weighted_sum(z_loss * jnp.square(normalizer), weight)
        if not with_gradients:
            return ((nll, penalty), None), None
        p = jnp.exp(logits - normalizer[:, None])
        p = p * (1.0 + 2.0 * z_loss * normalizer)[:, None]
        dlogits = (p - is_label) * (weight * runtime.config.logits_scale)[:, None]
        # Rounded like the gradients in the layers, so that bf16 stays on the matrix units.
        dlogits = dlogits.astype(runtime.dtype)
        dx = _psum(product("nv,vd->nd", dlogits, w), vocab_axes).astype(h.dtype)
        return ((nll, penalty), dw + product("nv,nd->vd", dlogits, x)), dx

    def zeros(shape, axes):
        x = jnp.zeros(shape, jnp.float32)
        return jax.lax.pcast(x, axes, to="varying") if axes else x

    # Every device holds the whole fp32 [v, D] until it is reduced over devices into the shards of
    # the stored weight: 515 MB for V 50304 and D 2560.
    dw = zeros(w.shape, vocab_axes + row_axes) if with_gradients else None
    start = (zeros((), row_axes), zeros((), row_axes)), dw
    chunks = tuple(_split_rows(x, rows) for x in (h, targets, weights))
    scanned: Any = jax.lax.scan(add_chunk, start, chunks)
    ((nll, penalty), dw), dh = scanned
    penalty = _psum(penalty, row_axes)
    sums = _psum(nll, row_axes) + penalty, penalty
    if not with_gradients:
        return sums, (None, None)
    if scatter_axes:
        dw = jax.lax.psum_scatter(dw, scatter_axes, scatter_dimension=1, tiled=True)
    dw = _psum(dw, tuple(name for name in row_axes if name not in scatter_axes))
    return sums, (dw, dh.reshape(-1, D)[:count].reshape(h.shape))


def _local_ids(w: jax.Array, vocab_axes: tuple[str, ...]) -> jax.Array:
    """Returns the token ids of a shard of the head's weight, [v]."""
    ids = jnp.arange(w.shape[0])
    return ids + jax.lax.axis_index(vocab_axes) * w.shape[0] if vocab_axes else ids


def _split_rows(x: jax.Array, rows: int) -> jax.Array:
    """Reshapes [B, T, ...] to [n, at most `rows`, ...], padded with zeros."""
    count = x.shape[0] * x.shape[1]
    n = -(-count // rows)
    size = -(-count // n)
    x = x.reshape(count, *x.shape[2:])
    x = jnp.pad(x, ((0, n * size - count), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(n, size, *x.shape[1:])
