"""muP and departures from it: one model in several widths, trained by rules that are arguments.

A departure is a handful of factors (`Rules`) on what the configuration and `mup.adamw` prescribe.
They are traced, so that one compiled program per width serves every parametrization, learning rate
and seed. At the base width all parametrizations are the same model.
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
    """Factors on muP's own; all 1 is muP."""

    hidden_rate: Any = 1.0  # on the learning rate of hidden matrices
    embedding_rate: Any = 1.0  # on that of embeddings
    hidden_init: Any = 1.0  # on the initial values of hidden matrices
    queries: Any = 1.0  # on the attention logits, before ALiBi
    logits: Any = 1.0  # on the logits


PARAMETRIZATIONS: Mapping[str, Callable[[float], Rules]] = {
    # From m, the width and the head dimension over those of the base.
    "muP": lambda m: Rules(),
    # Standard: hidden matrices start at 1 / sqrt(inputs), as in muP, and nothing else knows m.
    "SP": lambda m: Rules(hidden_rate=m, logits=m, queries=math.sqrt(m)),
    "hidden rate unscaled": lambda m: Rules(hidden_rate=m),
    "logits unscaled": lambda m: Rules(logits=m),
    "attention by sqrt(d)": lambda m: Rules(queries=math.sqrt(m)),
    "init unscaled": lambda m: Rules(hidden_init=math.sqrt(m)),
    "embedding rate scaled": lambda m: Rules(embedding_rate=1 / m),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One model in several widths. Heads stay as many, so that their dimension grows.

    With heads of one size instead, a wrong factor on the attention logits would stay unseen.

    Attributes:
      shape: everything but the width.
      widths: ascending; the first is the base of muP.

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
        if odd := [w for w in widths if w % heads]:
            raise ValueError(
                f"widths: found {odd[0]}, which does not divide into {heads} heads; expected "
                f"multiples of {heads}"
            )

    def at(self, width: int) -> BTLMConfig:
        """The configuration of one width, under muP."""
        c = self.shape
        return dataclasses.replace(
            c, n_embd=width, n_inner=round(c.n_inner * width / c.n_embd),
            mup_width_scale=self.widths[0] / width, alibi_slopes=None,
        )  # fmt: skip

    def cost(self, width: int) -> float:
        """About how long a step takes, in steps of the base: measured, the 1.5th power."""
        return (width / self.widths[0]) ** 1.5

    def rules(self, parametrization: str, width: int) -> Rules:
        """Of a parametrization at one width, as arrays: a float would be a program of its own."""
        rules = PARAMETRIZATIONS[parametrization](width / self.widths[0])
        return Rules(*(np.float32(x) for x in rules))


def shape(vocab_size: int, layers: int = 2, heads: int = 4, base: BTLMConfig | None = None):
    """The shape of a family: BTLM's in small, or that of `base` with these sizes.

    The multipliers suit a base width of 64: `initializer_range` is 1 / sqrt(64), embeddings enter
    the residual stream at 0.8.
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


def reparametrized(model: BTLM, params: Params, rules: Rules) -> Params:
    """The weights with which the model computes what `rules` say with `params`.

    The factor on queries goes into their projection, that on logits into ln_f, which only they
    read; gradients come back through the factors, as if the model itself had them.
    """
    flat = flatten_tree(params)
    for w in weights.weight_table(model.config):
        if "qkv" in w.axes:  # their projection and its bias, [..., qkv, heads, head_dim]
            queries_first = jnp.stack([rules.queries, 1.0, 1.0])[:, None, None]
            flat[w.path] = flat[w.path] * queries_first
        elif w.role == "vector" and not w.stacked:  # ln_f
            flat[w.path] = flat[w.path] * rules.logits
    return unflatten_tree(flat)


class Trial(NamedTuple):
    """Weights and optimizer state of one training run."""

    params: Params
    opt_state: Any


@functools.partial(jax.jit, static_argnames="model")
def start(model: BTLM, seed: jax.Array, rules: Rules) -> Trial:
    """Fresh weights of a seed; hidden matrices times `rules.hidden_init`."""
    params = model.init(jax.random.key(seed))
    by_path = weights.weights_by_path(model.config)
    flat = {
        path: x * rules.hidden_init if by_path[path].role == "hidden" else x
        for path, x in flatten_tree(params).items()
    }
    params = unflatten_tree(flat)
    return Trial(params, _optimizer(model).init(params))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="trial")
def step(
    model: BTLM, trial: Trial, tokens: jax.Array, rate: jax.Array, rules: Rules
) -> tuple[Trial, jax.Array]:
    """One step of AdamW on tokens [B, T + 1]. Returns the loss before it too, nats per token."""

    def loss(params):
        objective, found = target_loss(model, reparametrized(model, params, rules), tokens)
        return objective / found.tokens, found.mean

    grads, mean = jax.grad(loss, has_aux=True)(trial.params)
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
    """Of a learning rate of 1: updates, decay included, are proportional to it."""
    return mup.adamw(1.0, model.config)


@functools.partial(jax.jit, static_argnames="model")
def loss(model: BTLM, params: Params, tokens: jax.Array, rules: Rules) -> jax.Array:
    """Nats per token of windows [N, B, T + 1]."""
    one = functools.partial(target_loss, model, reparametrized(model, params, rules))
    sums = jax.lax.map(lambda x: one(x)[1], tokens)
    return sums.nll.sum() / sums.tokens.sum()
