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
    ids_V = jnp.arange(logits_BTV.shape[-1])
    normalizer_BT, label_logit_BT, _ = _log_softmax(logits_BTV, labels_BT, ids_V, ())
    return jnp.where(labels_BT == IGNORE, 0.0, normalizer_BT - label_logit_BT)


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
        targets_BT = runtime.shard(targets_BT, "batch", "sequence")
        is_target_BT = targets_BT != IGNORE
        sum_weights_BT = is_target_BT.astype(jnp.float32)
        if weights_BT is not None:
            constant_BT = jax.lax.stop_gradient(weights_BT)
            sum_weights_BT = sum_weights_BT * runtime.shard(constant_BT, "batch", "sequence")
        is_token_BT = (targets_BT >= 0) & (targets_BT < runtime.config.vocab_size)
        nan_weights_BT = jnp.where(~is_target_BT | is_token_BT, sum_weights_BT, jnp.nan)
        w_VD = _float_head_weight(runtime, params)
        objective, penalty = _weighted_loss(
            runtime, z_loss, rows, w_VD, h_BTD, targets_BT, nan_weights_BT
        )
        return objective, LossSum(objective - jax.lax.stop_gradient(penalty), sum_weights_BT.sum())


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
        targets_BT = runtime.shard(targets_BT, "batch", "sequence")
        w_VD = _float_head_weight(runtime, params).astype(runtime.dtype)
        w_VD = runtime.shard(w_VD, "vocab", None)
        if runtime.mesh is None:
            nll_BT, likeliest_BT = _local_predictions(runtime, rows, (), w_VD, h_BTD, targets_BT)
        else:
            spec = functools.partial(sharding.partition_spec, runtime.rules)
            h_spec, row_spec = spec("batch", "sequence", None), spec("batch", "sequence")
            vocab_axes = sharding.mesh_axes(runtime.rules, "vocab")
            nll_BT, likeliest_BT = jax.shard_map(
                functools.partial(_local_predictions, runtime, rows, vocab_axes),
                in_specs=(spec("vocab", None), h_spec, row_spec),
                out_specs=row_spec,
            )(w_VD, h_BTD, targets_BT)
        is_token_BT = (targets_BT >= 0) & (targets_BT < runtime.config.vocab_size)
        nll_BT = jnp.where(is_token_BT, nll_BT, jnp.nan)
        return TokenPredictions(jnp.where(targets_BT == IGNORE, 0.0, nll_BT), likeliest_BT)


def _float_head_weight(runtime: Runtime, params: Params) -> jax.Array:
    """Returns the weight of the head, [V, D] in floats, as it is stored unless it is packed."""
    return packed.as_array(head_weight(runtime, params).value, runtime.dtype)


def _local_predictions(
    runtime: Runtime, rows: int, vocab_axes, w_VD, h_BTD, targets_BT
) -> tuple[jax.Array, jax.Array]:
    """Computes `token_predictions` on a shard of the vocabulary and of the rows."""
    ids_V = _local_ids(w_VD, vocab_axes)

    def predict_chunk(chunk):
        x_ND, labels_N = chunk
        product_NV = einsum("nd,vd->nv", x_ND, w_VD, runtime.precision)
        logits_NV = head_logits(runtime, product_NV, ids_V)
        normalizer_N, label_logit_N, _ = _log_softmax(logits_NV, labels_N, ids_V, vocab_axes)
        best_N, top_N = ids_V[logits_NV.argmax(-1)], logits_NV.max(-1)
        if vocab_axes:  # like argmax: the lowest id among the shards with the largest logit
            is_top_N = top_N == jax.lax.pmax(top_N, vocab_axes)
            best_N = jnp.where(is_top_N, best_N, jnp.iinfo(best_N.dtype).max)
            best_N = jax.lax.pmin(best_N, vocab_axes)
        return normalizer_N - label_logit_N, best_N == labels_N

    chunks = jax.lax.map(predict_chunk, (_split_rows(h_BTD, rows), _split_rows(targets_BT, rows)))
    shape = targets_BT.shape
    nll_BT, likeliest_BT = (x.reshape(-1)[: targets_BT.size].reshape(shape) for x in chunks)
    return nll_BT, likeliest_BT


# The summed loss and its gradients, in chunks ---------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _weighted_loss(runtime: Runtime, z_loss: float, rows: int, w_VD, h_BTD, targets_BT, weights_BT):
    """Returns the objective, and the z-loss it contains, which has no gradient of its own.

    When differentiated, the forward pass computes the gradients as well.
    """
    arrays = w_VD, h_BTD, targets_BT, weights_BT
    return _chunked_loss(runtime, z_loss, rows, *arrays, with_gradients=False)[0]


def _weighted_loss_forward(runtime, z_loss, rows, w_VD, h_BTD, targets_BT, weights_BT):
    return _chunked_loss(
        runtime, z_loss, rows, w_VD, h_BTD, targets_BT, weights_BT, with_gradients=True
    )


def _weighted_loss_backward(runtime, z_loss, rows, gradients, cotangents):
    factor = cotangents[0]
    # In fp32, because a rounded factor would change every entry alike.
    dw_VD, dh_BTD = ((g.astype(jnp.float32) * factor).astype(g.dtype) for g in gradients)
    return dw_VD, dh_BTD, None, None


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


def _chunked_loss(
    runtime: Runtime, z_loss, rows, w_VD, h_BTD, targets_BT, weights_BT, *, with_gradients: bool
):
    """Returns ((objective, penalty), gradients by w_VD and h_BTD or None)."""
    w = runtime.shard(w_VD.astype(runtime.dtype), "vocab", None)
    local = functools.partial(_local_loss, runtime, z_loss, rows, with_gradients)
    if runtime.mesh is None:
        sums, (dw_VD, dh_BTD) = local((), (), (), w, h_BTD, targets_BT, weights_BT)
    else:
        spec = functools.partial(sharding.partition_spec, runtime.rules)
        w_spec, h_spec = spec("vocab", None), spec("batch", "sequence", None)
        row_spec = spec("batch", "sequence")
        axes = functools.partial(sharding.mesh_axes, runtime.rules)
        row_axes = axes("batch") + axes("sequence")
        # The axes over which both the stored weight and the rows are split.
        scatter_axes = tuple(name for name in axes("embed") if name in row_axes)
        dw_spec = PartitionSpec(*w_spec[:1], scatter_axes or None)
        sums, (dw_VD, dh_BTD) = jax.shard_map(
            functools.partial(local, axes("vocab"), row_axes, scatter_axes),
            in_specs=(w_spec, h_spec, row_spec, row_spec),
            out_specs=(PartitionSpec(), (dw_spec, h_spec) if with_gradients else (None, None)),
        )(w, h_BTD, targets_BT, weights_BT)
    if not with_gradients:
        return sums, None
    if runtime.mesh is not None:
        dw_VD = reshard(dw_VD, jax.typeof(w_VD).sharding)
    return sums, (dw_VD.astype(w_VD.dtype), dh_BTD)


def _local_loss(
    runtime: Runtime, z_loss, rows, with_gradients: bool,
    vocab_axes, row_axes, scatter_axes, w_VD, h_BTD, targets_BT, weights_BT,
) -> Any:  # fmt: skip
    """Computes `_chunked_loss` on a shard of the vocabulary and of the rows."""
    D, count = w_VD.shape[1], targets_BT.size
    ids_V = _local_ids(w_VD, vocab_axes)

    def product(equation, x, y):
        return einsum(equation, x, y, runtime.precision)

    def weighted_sum(x_N, weight_N):  # rows of weight 0 may hold anything
        return jnp.where(weight_N == 0.0, 0.0, x_N * weight_N).sum()

    def add_chunk(total, chunk):
        x_ND, labels_N, weight_N = chunk
        (nll, penalty), dw_VD = total
        logits_NV = head_logits(runtime, product("nd,vd->nv", x_ND, w_VD), ids_V)
        softmax = _log_softmax(logits_NV, labels_N, ids_V, vocab_axes)
        normalizer_N, label_logit_N, is_label_NV = softmax
        nll = nll + weighted_sum(normalizer_N - label_logit_N, weight_N)
        penalty = penalty + weighted_sum(z_loss * jnp.square(normalizer_N), weight_N)
        if not with_gradients:
            return ((nll, penalty), None), None
        p_NV = jnp.exp(logits_NV - normalizer_N[:, None])
        p_NV = p_NV * (1.0 + 2.0 * z_loss * normalizer_N)[:, None]
        dlogits_NV = (p_NV - is_label_NV) * (weight_N * runtime.config.logits_scale)[:, None]
        # Rounded like the gradients in the layers, so that bf16 stays on the matrix units.
        dlogits_NV = dlogits_NV.astype(runtime.dtype)
        dx_ND = _psum(product("nv,vd->nd", dlogits_NV, w_VD), vocab_axes).astype(h_BTD.dtype)
        return ((nll, penalty), dw_VD + product("nv,nd->vd", dlogits_NV, x_ND)), dx_ND

    def zeros(shape, axes):
        x = jnp.zeros(shape, jnp.float32)
        return jax.lax.pcast(x, axes, to="varying") if axes else x

    # Every device holds the whole fp32 [v, D] until it is reduced over devices into the shards of
    # the stored weight: 515 MB for V 50304 and D 2560.
    dw_VD = zeros(w_VD.shape, vocab_axes + row_axes) if with_gradients else None
    start = (zeros((), row_axes), zeros((), row_axes)), dw_VD
    chunks = tuple(_split_rows(x, rows) for x in (h_BTD, targets_BT, weights_BT))
    scanned: Any = jax.lax.scan(add_chunk, start, chunks)
    ((nll, penalty), dw_VD), dh = scanned
    penalty = _psum(penalty, row_axes)
    sums = _psum(nll, row_axes) + penalty, penalty
    if not with_gradients:
        return sums, (None, None)
    if scatter_axes:
        dw_VD = jax.lax.psum_scatter(dw_VD, scatter_axes, scatter_dimension=1, tiled=True)
    dw_VD = _psum(dw_VD, tuple(name for name in row_axes if name not in scatter_axes))
    return sums, (dw_VD, dh.reshape(-1, D)[:count].reshape(h_BTD.shape))


def _local_ids(w_VD: jax.Array, vocab_axes: tuple[str, ...]) -> jax.Array:
    """Returns the token ids of a shard of the head's weight, int [V]."""
    ids_V = jnp.arange(w_VD.shape[0])
    return ids_V + jax.lax.axis_index(vocab_axes) * w_VD.shape[0] if vocab_axes else ids_V


def _split_rows(x: jax.Array, rows: int) -> jax.Array:
    """Reshapes [B, T, ...] to [n, at most `rows`, ...], padded with zeros."""
    count = x.shape[0] * x.shape[1]
    n = -(-count // rows)
    size = -(-count // n)
    x = x.reshape(count, *x.shape[2:])
    x = jnp.pad(x, ((0, n * size - count), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(n, size, *x.shape[1:])
