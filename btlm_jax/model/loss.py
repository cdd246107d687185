"""Next-token cross-entropy in fp32.

Logits are the largest array of a training step, so they are never whole: a chunk of rows at a time
goes through the head, the loss and back, in one pass that leaves the loss and both gradients. That
is three matrix products where rematerialization takes four, and the logits of a chunk stay close.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, reshard
from jax.typing import ArrayLike

from btlm_jax.model import einsum, packed, sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.layers import head_logits, head_weight
from btlm_jax.model.packed import PackedWeight
from btlm_jax.model.params import Params
from btlm_jax.model.runtime import Runtime

# Positions with this label are left out of the loss, as in PyTorch and transformers.
IGNORE = -100

# Rows of logits at a time. Each chunk reads and writes the weight's gradient, in fp32, for one
# product of rows x V x D: below about 1000 rows an accelerator would wait for its memory. At the
# size of the released model, compiled for TPU v5e, twice the rows take 0.14 GiB more at the peak.
ROWS = 1024


class LossSum(NamedTuple):
    """A loss as sums, so that parts of a batch can be added before the one division."""

    nll: jax.Array  # fp32, the summed negative log-likelihood in nats, each times its weight
    tokens: jax.Array  # fp32, the summed weights: without any, how many tokens it sums over

    @property
    def mean(self) -> jax.Array:
        """Nats per token; 0 for no token."""
        return self.nll / jnp.where(self.tokens == 0.0, 1.0, self.tokens)


def cross_entropy(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[label], fp32 [B, T]; 0 where the label is `IGNORE`.

    Of whole logits: `next_token_loss` and `target_loss` do not hold them.
    """
    ids = jnp.arange(logits_BTV.shape[-1])
    total, chosen, _ = _log_softmax(logits_BTV, labels_BT, ids, ())
    return jnp.where(labels_BT == IGNORE, 0.0, total - chosen)


def _log_softmax(logits, labels, ids, axes: tuple[str, ...]):
    """log(sum(exp(logits))) and the label's logit, [...]; and where that is, bool [..., v].

    Args:
      ids: of the vocabulary, [v]. They are compared rather than looked up, so that the vocabulary
        may be split over mesh axes.
      axes: within `jax.shard_map`, these axes.
    """
    top = jax.lax.stop_gradient(logits).max(-1)
    top = jax.lax.pmax(top, axes) if axes else top
    total = _psum(jnp.exp(logits - top[..., None]).sum(-1), axes)
    hit = ids == labels[..., None]
    chosen = _psum(jnp.where(hit, logits, 0.0).sum(-1), axes)
    return jnp.log(total) + top, chosen, hit


def _psum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x


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
    """The loss of predicting every token from those before it.

    Args:
      model, params: the model and its weights.
      input_ids: int [B, T].
      labels: int [B, T], not shifted (the shift by one is made here, as in transformers). A label
        of -100 is left out; any other outside the vocabulary makes the loss NaN. Default:
        `input_ids`, without padding and without the first token of every later segment.
      attention_mask, segment_ids, positions: as in `BTLM.apply`.
      weights: [B, T], the weight of every label, not shifted either; a constant to gradients.

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
    if weights is not None:
        weights = _left(_weights(weights, ids.shape), 0.0)
    h, _ = model.hidden(
        params, ids, attention_mask=attention_mask, segment_ids=segment_ids, positions=positions
    )
    return head_loss(model.runtime(params), params, h, _left(labels, IGNORE), weights)[1]


def target_loss(
    model: BTLM,
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    weights: ArrayLike | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, LossSum]:
    """The loss of training windows: the first T tokens of each are read, the last T predicted.

    Args:
      model, params: the model and its weights.
      tokens: int32 [B, T + 1].
      segment_ids: int32 [B, T + 1]; attention stays within segments, and the first token of a
        segment is not predicted from the segment before.
      weights: [B, T], the weight of every prediction; a constant to gradients.
      z_loss: coefficient of the square of log(sum(exp(logits))), which keeps the softmax normalized
        (PaLM, arXiv 2204.02311, section 5, has 1e-4).

    Returns:
      What to minimize, fp32: cross-entropy and z-loss, times the weights, summed over the B * T
      predictions. And the cross-entropy alone, to report.

    Raises:
      ValueError: weights of another shape.
    """
    targets, segments = tokens[:, 1:], None
    if segment_ids is not None:
        segments = segment_ids[:, :-1]
        targets = jnp.where(segment_ids[:, 1:] == segments, targets, IGNORE)
    if weights is not None:
        weights = _weights(weights, targets.shape)
    h, _ = model.hidden(params, tokens[:, :-1], segment_ids=segments)
    return head_loss(model.runtime(params), params, h, targets, weights, z_loss)


@functools.partial(jax.jit, static_argnames=("runtime", "z_loss"))
def head_loss(
    runtime: Runtime,
    params: Params,
    h_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, LossSum]:
    """The loss of final states [B, T, D], each predicting the target at its place.

    Targets are `IGNORE` or of the vocabulary: others turn loss and gradients into NaN. Further
    arguments and results as in `target_loss`.
    """
    with sharding.on_mesh(runtime.mesh):
        targets = runtime.shard(targets_BT, "batch", "sequence")
        counted = (targets != IGNORE).astype(jnp.float32)
        if weights_BT is not None:
            counted = counted * runtime.shard(
                jax.lax.stop_gradient(weights_BT), "batch", "sequence"
            )
        known = (targets == IGNORE) | ((targets >= 0) & (targets < runtime.config.vocab_size))
        weights = jnp.where(known, counted, jnp.nan)
        w = _head(runtime, params)
        objective, penalty = _summed(runtime, z_loss, w, h_BTD, targets, weights)
        return objective, LossSum(objective - jax.lax.stop_gradient(penalty), counted.sum())


class Predictions(NamedTuple):
    """What a model says of given tokens."""

    nll: jax.Array  # fp32 [B, T], -log p in nats
    likeliest: jax.Array  # bool [B, T], whether no token is likelier, nor as likely and of lower id


@functools.partial(jax.jit, static_argnames="runtime")
def token_predictions(
    runtime: Runtime, params: Params, h_BTD: jax.Array, targets_BT: jax.Array
) -> Predictions:
    """The loss of every target on its own, in chunks as `head_loss`, which sums them.

    0 where the target is `IGNORE`, NaN where it is outside the vocabulary. Arguments as there.
    """
    with sharding.on_mesh(runtime.mesh):
        targets = runtime.shard(targets_BT, "batch", "sequence")
        w = runtime.shard(_head(runtime, params).astype(runtime.dtype), "vocab", None)
        if runtime.mesh is None:
            nll, likeliest = _local_predictions(runtime, (), w, h_BTD, targets)
        else:
            axes = functools.partial(sharding.partition_spec, runtime.rules)
            of_h, of_rows = axes("batch", "sequence", None), axes("batch", "sequence")
            vocab_axes = sharding.mesh_axes(runtime.rules, "vocab")
            nll, likeliest = jax.shard_map(
                functools.partial(_local_predictions, runtime, vocab_axes),
                in_specs=(axes("vocab", None), of_h, of_rows),
                out_specs=of_rows,
            )(w, h_BTD, targets)
        known = (targets >= 0) & (targets < runtime.config.vocab_size)
        nll = jnp.where(targets == IGNORE, 0.0, jnp.where(known, nll, jnp.nan))
        return Predictions(nll, likeliest)


def _local_predictions(runtime: Runtime, vocab_axes, w, h, targets) -> tuple[jax.Array, jax.Array]:
    """`token_predictions` on a shard: [v, D] of the vocabulary and [b, t, D] of the states."""
    ids = _ids(w, vocab_axes)

    def of_chunk(chunk):
        x, labels = chunk
        logits = head_logits(runtime, einsum.einsum("nd,vd->nv", x, w, runtime.precision), ids)
        normalizer, chosen, _ = _log_softmax(logits, labels, ids, vocab_axes)
        best, top = ids[logits.argmax(-1)], logits.max(-1)
        if vocab_axes:  # as argmax has it: of the shards with the largest logit the lowest id
            first = top == jax.lax.pmax(top, vocab_axes)
            best = jax.lax.pmin(jnp.where(first, best, jnp.iinfo(best.dtype).max), vocab_axes)
        return normalizer - chosen, best == labels

    found = jax.lax.map(of_chunk, (_chunks(h), _chunks(targets)))
    nll, likeliest = (x.reshape(-1)[: targets.size].reshape(targets.shape) for x in found)
    return nll, likeliest


def _head(runtime: Runtime, params: Params) -> jax.Array:
    """The head's weight [V, D], as floats."""
    w = head_weight(runtime, params)
    return packed.dequantize(w, runtime.dtype) if isinstance(w, PackedWeight) else w


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(runtime: Runtime, z_loss: float, w_VD, h_BTD, targets_BT, weights_BT):
    """The objective, and the z-loss in it: that has no gradient of its own.

    The forward pass, when differentiated, computes the gradients as well.
    """
    return _chunked(runtime, z_loss, w_VD, h_BTD, targets_BT, weights_BT, gradients=False)[0]


def _forward(runtime, z_loss, w_VD, h_BTD, targets_BT, weights_BT):
    return _chunked(runtime, z_loss, w_VD, h_BTD, targets_BT, weights_BT, gradients=True)


def _backward(runtime, z_loss, gradients, cotangents):
    scale = cotangents[0]
    # In fp32: a rounded factor would change every entry alike.
    dw, dh = ((g.astype(jnp.float32) * scale).astype(g.dtype) for g in gradients)
    return dw, dh, None, None


_summed.defvjp(_forward, _backward)


def _chunked(runtime: Runtime, z_loss, w_VD, h_BTD, targets_BT, weights_BT, *, gradients: bool):
    """(objective, penalty) and, if asked for, the objective's gradients by w_VD and h_BTD."""
    w = runtime.shard(w_VD.astype(runtime.dtype), "vocab", None)
    local = functools.partial(_local, runtime, z_loss, gradients=gradients)
    if runtime.mesh is None:
        found = local((), (), (), w, h_BTD, targets_BT, weights_BT)
    else:
        axes = functools.partial(sharding.partition_spec, runtime.rules)
        of_w, of_h = axes("vocab", None), axes("batch", "sequence", None)
        of_rows = axes("batch", "sequence")
        names = functools.partial(sharding.mesh_axes, runtime.rules)
        row_axes = names("batch") + names("sequence")
        # The axes over which the weight rests in shards and the rows are split as well.
        split = tuple(name for name in names("embed") if name in row_axes)
        of_dw = PartitionSpec(*of_w[:1], split or None)
        found = jax.shard_map(
            functools.partial(local, names("vocab"), row_axes, split),
            in_specs=(of_w, of_h, of_rows, of_rows),
            out_specs=(PartitionSpec(), (of_dw, of_h) if gradients else (None, None)),
        )(w, h_BTD, targets_BT, weights_BT)
    sums, (dw, dh) = found
    if not gradients:
        return sums, None
    if runtime.mesh is not None:
        dw = reshard(dw, jax.typeof(w_VD).sharding)
    return sums, (dw.astype(w_VD.dtype), dh)


def _local(
    runtime: Runtime,
    z_loss,
    vocab_axes,
    row_axes,
    split,
    w,
    h,
    targets,
    weights,
    *,
    gradients: bool,
) -> Any:
    """`_chunked` on a shard: [v, D] of the vocabulary and [b, t, D] of the states."""
    D, count = w.shape[1], targets.size
    ids = _ids(w, vocab_axes)

    def product(equation, x, y):
        return einsum.einsum(equation, x, y, runtime.precision)

    def weighted(x, weight):
        return jnp.where(weight == 0.0, 0.0, x * weight).sum()  # rows left out may hold anything

    def add(total, chunk):
        x, labels, weight = chunk
        (nll, penalty), dw = total
        logits = head_logits(runtime, product("nd,vd->nv", x, w), ids)
        normalizer, chosen, hit = _log_softmax(logits, labels, ids, vocab_axes)
        nll = nll + weighted(normalizer - chosen, weight)
        penalty = penalty + weighted(z_loss * jnp.square(normalizer), weight)
        if not gradients:
            return ((nll, penalty), None), None
        p = jnp.exp(logits - normalizer[:, None])
        p = p * (1.0 + 2.0 * z_loss * normalizer)[:, None]
        d = (p - hit) * (weight * runtime.config.logits_scale)[:, None]
        # Rounded as the products of the layers round gradients: bf16 stays on the matrix units.
        d = d.astype(runtime.dtype)
        dx = _psum(product("nv,vd->nd", d, w), vocab_axes).astype(h.dtype)
        return ((nll, penalty), dw + product("nv,nd->vd", d, x)), dx

    def zeros(shape, axes):
        x = jnp.zeros(shape, jnp.float32)
        return jax.lax.pcast(x, axes, to="varying") if axes else x

    # Whole, fp32 [v, D], on every device until it is summed over devices and cut into the shards in
    # which the weight rests: 515 MB for V 50304 and D 2560.
    dw = zeros(w.shape, vocab_axes + row_axes) if gradients else None
    start = (zeros((), row_axes), zeros((), row_axes)), dw
    scanned: Any = jax.lax.scan(add, start, tuple(map(_chunks, (h, targets, weights))))
    ((nll, penalty), dw), dh = scanned
    penalty = _psum(penalty, row_axes)
    sums = _psum(nll, row_axes) + penalty, penalty
    if not gradients:
        return sums, (None, None)
    if split:
        dw = jax.lax.psum_scatter(dw, split, scatter_dimension=1, tiled=True)
    dw = _psum(dw, tuple(name for name in row_axes if name not in split))
    return sums, (dw, dh.reshape(-1, D)[:count].reshape(h.shape))


def _ids(w: jax.Array, vocab_axes: tuple[str, ...]) -> jax.Array:
    """The ids of a shard of the head's weight, [v]."""
    ids = jnp.arange(w.shape[0])
    return ids + jax.lax.axis_index(vocab_axes) * w.shape[0] if vocab_axes else ids


def _chunks(x: jax.Array) -> jax.Array:
    """[B, T, ...] as [n, rows, ...], of at most `ROWS` rows each, filled up with zeros."""
    count = x.shape[0] * x.shape[1]
    n = -(-count // ROWS)
    size = -(-count // n)
    x = x.reshape(count, *x.shape[2:])
    x = jnp.pad(x, ((0, n * size - count), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(n, size, *x.shape[1:])


def _int32(name: str, x: ArrayLike) -> jax.Array:
    """As int32: in an unsigned dtype, as token files have, IGNORE would wrap to a token id."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name}: found dtype {x.dtype}, expected integers")
    return x.astype(jnp.int32)


def _left(x_BT: jax.Array, last) -> jax.Array:
    """Shifted by one. `last` fills up: a split sequence cannot be cut by one."""
    return jnp.concatenate([x_BT[:, 1:], jnp.full_like(x_BT[:, :1], last)], 1)


def _weights(x: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    x = jnp.asarray(x, jnp.float32)
    if x.shape != shape:
        raise ValueError(f"weights: found shape {x.shape}, expected that of the labels {shape}")
    return x
