"""One training step: loss, gradients, update; jitted, with the old state's memory reused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from btlm_jax import sharding
from btlm_jax.loss import next_token_loss
from btlm_jax.model import BTLM
from btlm_jax.weights import Params


class TrainState(NamedTuple):
    """What a step takes and returns. Optimizer state follows the weights' shardings."""

    params: Params
    opt_state: Any
    step: jax.Array  # int32


class Metrics(NamedTuple):
    """Of one step, on the device; fetch them a step late to keep it busy."""

    loss: jax.Array  # nats per token
    grad_norm: jax.Array  # global L2 norm before clipping


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    mesh = sharding.concrete_mesh_of(params["wte"])

    def start(params):
        return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))

    if mesh is None:
        return jax.jit(start)(params)
    with jax.set_mesh(mesh):
        return jax.jit(start)(params)


def make_step(
    model: BTLM, tx: optax.GradientTransformation
) -> Callable[[TrainState, ArrayLike], tuple[TrainState, Metrics]]:
    """Returns the step: (state, input_ids [B, T]) -> (state, metrics).

    Raises:
      ValueError: the configuration asks for dropout, which is not implemented.
    """
    model.config.require_no_dropout()

    def step(state: TrainState, input_ids: ArrayLike) -> tuple[TrainState, Metrics]:
        def loss_fn(params):
            return next_token_loss(model, params, input_ids).mean

        with sharding.on_mesh(sharding.mesh_of(state.params["wte"])):
            loss, grads = jax.value_and_grad(loss_fn)(state.params)
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            metrics = Metrics(loss, optax.tree.norm(grads))
        return TrainState(params, opt_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)
