"""The train step: loss, gradients and update in one jitted function that donates the old state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btlm_jax.model import mup, sharding, weights
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.chunked_loss import LossSum
from btlm_jax.model.loss import target_loss
from btlm_jax.model.params import Params, unflatten_tree


class TrainState(NamedTuple):
    """State between two steps. The optimizer state is sharded like the weights."""

    params: Params
    opt_state: Any
    step: jax.Array  # int32, steps taken, including skipped ones
    skipped: jax.Array  # int32, all steps whose loss, gradients or update were not finite
    bad_in_a_row: jax.Array  # int32, consecutive steps of that kind, up to the newest


# Name -> scalar on the devices. Fetch the metrics of a step one step late to keep devices busy.
StepMetrics = dict[str, jax.Array]


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    mesh = sharding.concrete_mesh_of(params["wte"])

    def start(params):
        zero = jnp.zeros((), jnp.int32)
        return TrainState(params, tx.init(params), zero, zero, zero)

    if mesh is None:
        return jax.jit(start)(params)
    with jax.set_mesh(mesh):
        return jax.jit(start)(params)


def abstract_weights(model: BTLM, mesh: Mesh | None) -> Params:
    """Returns shapes, dtypes and shardings of `model.init(key, mesh=mesh)`."""
    config = model.config
    pad, placed = sharding.param_layout(config, mesh, model.rules)
    shapes = {w.path: weights.stacked_shape(w, config, pad) for w in weights.weight_table(config)}
    return unflatten_tree(
        {p: jax.ShapeDtypeStruct(s, jnp.float32, sharding=placed[p]) for p, s in shapes.items()}
    )


def abstract_state(model: BTLM, tx: optax.GradientTransformation, mesh: Mesh | None) -> TrainState:
    """Returns shapes, dtypes and shardings of `init_state` for fp32 weights."""
    params = abstract_weights(model, mesh)
    alone = params["wte"].sharding if mesh is None else NamedSharding(mesh, PartitionSpec())

    def on_devices(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Types name the mesh without its devices.
        split = mesh is not None and isinstance(x.sharding, NamedSharding)
        place = NamedSharding(mesh, x.sharding.spec) if split else alone
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    with sharding.on_mesh(None if mesh is None else mesh.abstract_mesh):
        opt_state = jax.tree.map(on_devices, jax.eval_shape(tx.init, params))
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=alone)
    return TrainState(params, opt_state, count, count, count)


def move_optimizer_state(opt_state: Any, memory: jax.memory.Space) -> Any:
    """Moves the arrays of an optimizer state to the host's or the device's memory, except scalars.

    On the host, two thirds of the training state (with Adam and fp32 weights) leave the
    accelerator, and cross the host's link in both directions in every step: 16 bytes per parameter.
    """
    return jax.tree.map(lambda x: jax.device_put(x, memory) if x.ndim else x, opt_state)


def make_step(
    model: BTLM,
    tx: optax.GradientTransformation,
    *,
    z_loss: float = 0.0,
    offload_optimizer: bool = False,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Returns the train step: (state, tokens, segment_ids=None) -> (state, metrics).

    Tokens are int32 [A, B, T + 1]: A microbatches of B sequences, of which the first T tokens are
    read and the last T predicted. The gradients are those of the mean over all predicted tokens of
    all microbatches: sums are accumulated in fp32 and divided once. With `segment_ids` (same shape)
    attention stays within segments (`target_loss`). If the loss, the gradients or the update are
    not finite, weights and optimizer state stay unchanged and the step is counted as skipped:
    finite ones stay finite.

    Args:
      model: the model.
      tx: the optimizer.
      z_loss: coefficient of the z-loss that is minimized with the loss (`target_loss`); the metrics
        report the loss alone.
      offload_optimizer: whether the optimizer state lives in the host's memory between steps
        (`move_optimizer_state`).

    Raises:
      ValueError: the configuration asks for dropout, which is not implemented.
    """
    model.config.require_no_dropout()

    def loss_fn(params: Params, tokens: jax.Array, segments: jax.Array | None):
        return target_loss(model, params, tokens, segments, z_loss=z_loss)

    def gradients(params: Params, tokens: jax.Array, segments: jax.Array | None):
        one = jax.value_and_grad(loss_fn, has_aux=True)
        if tokens.shape[0] == 1:
            (_, loss), grads = one(params, tokens[0], None if segments is None else segments[0])
            return loss, grads

        def add(total, microbatch):
            (_, loss), grads = one(params, *microbatch)
            return jax.tree.map(jnp.add, total, (loss, grads)), None

        zero = jnp.zeros((), jnp.float32)
        start = LossSum(zero, zero), jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        return jax.lax.scan(add, start, (tokens, segments))[0]

    def step(
        state: TrainState, tokens: jax.Array, segment_ids: jax.Array | None = None
    ) -> tuple[TrainState, StepMetrics]:
        with sharding.on_mesh(sharding.mesh_of(state.params["wte"])):
            loss, sums = gradients(state.params, tokens, segment_ids)
            grads = jax.tree.map(lambda g: g / jnp.maximum(loss.tokens, 1.0), sums)
            norm = optax.tree.norm(grads)
            old_opt_state = state.opt_state
            if offload_optimizer:
                old_opt_state = move_optimizer_state(old_opt_state, jax.memory.Space.Device)
            changes, opt_state = tx.update(grads, old_opt_state, state.params)
            updates: Any = changes
            params: Any = optax.apply_updates(state.params, changes)
            grad_norms = mup.group_norms(grads, model.config)
            update_norms = mup.group_norms(updates, model.config)
            # Norms of updates are computed anyway, so that this check reads no array again.
            checked = [loss.mean, norm, *update_norms.values()]
            good = jnp.isfinite(jnp.stack(checked)).all()

            def keep(new, old):
                return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

            bad = 1 - good.astype(jnp.int32)
            opt_state = keep(opt_state, old_opt_state)
            if offload_optimizer:
                opt_state = move_optimizer_state(opt_state, jax.memory.Space.Host)
            after = TrainState(
                params=keep(params, state.params),
                opt_state=opt_state,
                step=state.step + 1,
                skipped=state.skipped + bad,
                bad_in_a_row=(state.bad_in_a_row + bad) * bad,
            )
            metrics = {
                "loss": loss.mean,
                "grad_norm": norm,
                **{f"grad_norm/{group}": x for group, x in grad_norms.items()},
                **{f"update_norm/{group}": x for group, x in update_norms.items()},
                "tokens": loss.tokens,
                "skipped": after.skipped,
                "bad_in_a_row": after.bad_in_a_row,
            }
        return after, metrics

    return jax.jit(step, donate_argnums=0)


def make_eval_step(model: BTLM) -> Callable[..., LossSum]:
    """Returns the jitted evaluation step: (params, tokens, segment_ids=None) -> sums of the loss.

    Tokens and segments are int32 [B, T + 1], as in `target_loss`.
    """

    def evaluate(
        params: Params, tokens: jax.Array, segment_ids: jax.Array | None = None
    ) -> LossSum:
        with sharding.on_mesh(sharding.mesh_of(params["wte"])):
            return target_loss(model, params, tokens, segment_ids)[1]

    return jax.jit(evaluate)
