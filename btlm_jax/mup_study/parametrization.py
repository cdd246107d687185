"""muP and departures from it: one model in several widths, with the rules as arguments.

A departure is a handful of factors (`Rules`) on the values that the configuration and `mup.adamw`
prescribe. They are traced, so one compiled program per width serves every parametrization, learning
rate and seed. At the base width all parametrizations are the same model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from btlm_jax.config import BTLMConfig
from btlm_jax.model import mup, weights
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.loss import target_loss
from btlm_jax.model.params import Params, flatten_tree, unflatten_tree


class Rules(NamedTuple):
    """Factors on the values of muP; all 1 is muP."""

    hidden_rate: Any = 1.0  # on the learning rate of hidden matrices
    embedding_rate: Any = 1.0  # on the learning rate of embeddings
    hidden_init: Any = 1.0  # on the initial values of hidden matrices
    queries: Any = 1.0  # on the attention logits, before ALiBi
    logits: Any = 1.0  # on the logits


PARAMETRIZATIONS: Mapping[str, Callable[[float], Rules]] = {
    # m is the width over the base width, and also the head dimension over that of the base.
    "muP": lambda m: Rules(),
    # Standard: hidden matrices start at 1 / sqrt(inputs), as in muP; nothing else depends on m.
    "SP": lambda m: Rules(hidden_rate=m, logits=m, queries=math.sqrt(m)),
    "hidden rate unscaled": lambda m: Rules(hidden_rate=m),
    "logits unscaled": lambda m: Rules(logits=m),
    "attention by sqrt(d)": lambda m: Rules(queries=math.sqrt(m)),
    "init unscaled": lambda m: Rules(hidden_init=math.sqrt(m)),
    "embedding rate scaled": lambda m: Rules(embedding_rate=1 / m),
}


@dataclasses.dataclass(frozen=True)
class WidthFamily:
    """One model in several widths with a constant number of heads, whose dimension grows.

    With heads of constant size, a wrong factor on the attention logits would not show.

    Attributes:
      shape: the configuration, whose width is ignored.
      widths: the widths, ascending; the first is the base width of muP.

    Raises:
      ValueError: widths that do not divide into the heads, or fewer than two.
    """

    shape: BTLMConfig
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        heads, widths = self.shape.n_head, self.widths
        if len(widths) < 2 or list(widths) != sorted(set(widths)) or widths[0] < 1:
            raise ValueError(
                f"widths: found {', '.join(map(str, widths)) or 'none'}, expected two or more, "
                "ascending"
            )
        if indivisible := [w for w in widths if w % heads]:
            raise ValueError(
                f"widths: found {indivisible[0]}, which does not divide into {heads} heads; "
                f"expected multiples of {heads}"
            )

    def config(self, width: int) -> BTLMConfig:
        """Returns the configuration of one width, under muP."""
        c = self.shape
        return dataclasses.replace(
            c, n_embd=width, n_inner=round(c.n_inner * width / c.n_embd),
            mup_width_scale=self.widths[0] / width, alibi_slopes=None,
        )  # fmt: skip

    def cost(self, width: int) -> float:
        """Returns the approximate duration of a step in steps of the base: power 1.5, measured."""
        return (width / self.widths[0]) ** 1.5

    def rules(self, parametrization: str, width: int) -> Rules:
        """Returns the rules of a parametrization at one width, as arrays.

        A Python float would be static and compile another program.
        """
        rules = PARAMETRIZATIONS[parametrization](width / self.widths[0])
        return Rules(*(np.float32(x) for x in rules))


def family_shape(
    vocab_size: int, layers: int = 2, heads: int = 4, base: BTLMConfig | None = None
) -> BTLMConfig:
    """Returns the shape of a family: a small BTLM, or `base` with these sizes.

    The multipliers of the small BTLM suit a base width of 64: `initializer_range` is 1 / sqrt(64),
    and embeddings enter the residual stream at 0.8.
    """
    if base is None:
        base = dataclasses.replace(
            BTLMConfig.preset("tiny"), n_embd=64, n_inner=171, initializer_range=0.125,
            mup_embeddings_scale=6.4, mup_output_alpha=0.8,
        )  # fmt: skip
    width = heads * max(1, base.n_embd // heads)
    inner = round(base.n_inner * width / base.n_embd)
    return dataclasses.replace(
        base, vocab_size=vocab_size, n_layer=layers, n_head=heads, n_embd=width, n_inner=inner,
        alibi_slopes=None,
    )  # fmt: skip


def reparametrize(model: BTLM, params: Params, rules: Rules) -> Params:
    """Returns weights that make the model apply the factors of `rules` to queries and logits.

    The factor on queries is folded into their projection and the factor on logits into ln_f, which
    feeds nothing else. Gradients flow through the factors as if the model itself had them.
    """
    flat = flatten_tree(params)
    for w in weights.weight_table(model.config):
        if "qkv" in w.axes:  # their projection and its bias, [..., qkv, heads, head_dim]
            factors = jnp.stack([rules.queries, 1.0, 1.0])[:, None, None]
            flat[w.path] = flat[w.path] * factors
        elif w.role == "vector" and not w.stacked:  # ln_f
            flat[w.path] = flat[w.path] * rules.logits
    return unflatten_tree(flat)


class Trial(NamedTuple):
    """Weights and optimizer state of one training run."""

    params: Params
    opt_state: Any


@functools.partial(jax.jit, static_argnames="model")
def initial_trial(model: BTLM, seed: jax.Array, rules: Rules) -> Trial:
    """Returns the initial state of a run, with hidden matrices scaled by `rules.hidden_init`."""
    params = model.init(jax.random.key(seed))
    by_path = weights.weights_by_path(model.config)
    flat = {
        path: x * rules.hidden_init if by_path[path].role == "hidden" else x
        for path, x in flatten_tree(params).items()
    }
    params = unflatten_tree(flat)
    return Trial(params, _optimizer(model).init(params))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="trial")
def trial_step(
    model: BTLM, trial: Trial, tokens: jax.Array, rate: jax.Array, rules: Rules
) -> tuple[Trial, jax.Array]:
    """Takes one step of AdamW on tokens [B, T + 1].

    Returns:
      The new state, and the loss before the step in nats per token.
    """

    def loss_fn(params):
        objective, sums = target_loss(model, reparametrize(model, params, rules), tokens)
        return objective / sums.tokens, sums.mean

    grads, mean = jax.grad(loss_fn, has_aux=True)(trial.params)
    changes, opt_state = _optimizer(model).update(grads, trial.opt_state, trial.params)
    updates: Any = changes
    factors = {"hidden": rules.hidden_rate, "embedding": rules.embedding_rate, "vector": 1.0}
    by_path = weights.weights_by_path(model.config)
    flat = {
        path: u * rate * factors[by_path[path].role] for path, u in flatten_tree(updates).items()
    }
    params: Any = optax.apply_updates(trial.params, unflatten_tree(flat))
    return Trial(params, opt_state), mean


def _optimizer(model: BTLM) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with learning rate 1; updates, decay included, are proportional to the rate."""
    return mup.adamw(1.0, model.config)


@functools.partial(jax.jit, static_argnames="model")
def window_loss(model: BTLM, params: Params, tokens: jax.Array, rules: Rules) -> jax.Array:
    """Returns the loss of windows [N, B, T + 1] in nats per token."""
    batch_loss = functools.partial(target_loss, model, reparametrize(model, params, rules))
    sums = jax.lax.map(lambda x: batch_loss(x)[1], tokens)
    return sums.nll.sum() / sums.tokens.sum()
