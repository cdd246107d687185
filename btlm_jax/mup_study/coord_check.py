"""The coordinate check of muP (arXiv 2203.03466, appendix D; microsoft/mup's `coord_check`).

Models of several widths train for a few steps on one batch. Under muP the size of their
activations at the start, and the size of the change by training, are powers of the width that
theory predicts. If a rule of the parametrization is broken, some exponent differs by 1/2 or more.
The check also runs models with one deliberately broken rule each, because a check that they pass
would prove nothing.

Why one small batch: a hidden matrix changes by a sum over tokens of (gradient x input). Applied to
one of those inputs, its own term adds up over all coordinates and keeps its size in every width;
the terms of other tokens add up like a random walk and fall as 1 / sqrt(width) beside it. Only with
fewer different tokens than coordinates is the first, which muP is about, the larger one. With many
tokens the slopes of a correct model lie anywhere between -1/2 and 0, depending on the text.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params
from btlm_jax.mup_study.corpus import Corpus
from btlm_jax.mup_study.parametrization import (
    PARAMETRIZATIONS,
    Rules,
    WidthFamily,
    initial_trial,
    reparametrize,
    trial_step,
)
from btlm_jax.mup_study.slope_test import (
    Interval,
    SlopeFit,
    Verdict,
    fit_slope,
    join_verdicts,
    judge_slope,
)
from btlm_jax.utils.progress import Progress

ALL = tuple(PARAMETRIZATIONS)
FAULTS = tuple(name for name in ALL if name != "muP")
# About the optimum of `transfer` for the default family.
LEARNING_RATE = 2**-6.25
STEPS = 4
SEEDS, BATCH_SIZE, LENGTH = 16, 1, 16

CURVES = ("embedding", "attention logits", "attention", "MLP", "residual stream", "logits")
# The slopes that theory predicts for wide models. At the start, attention logits and logits are
# sums of d independent products, divided by d. Their changes have such a part too, from weights
# that are still random, and one that training lines up, which is constant: which is larger depends
# on the text and the number of steps.
_FLAT, _RANDOM_WALK, _EITHER = Interval(0.0, 0.0), Interval(-0.5, -0.5), Interval(-0.5, 0.0)
AT_START = dict.fromkeys(CURVES, _FLAT) | {"attention logits": _RANDOM_WALK, "logits": _RANDOM_WALK}
CHANGE = dict.fromkeys(CURVES, _FLAT) | {"attention logits": _EITHER, "logits": _EITHER}
# A broken rule is wrong by a factor of sqrt(m) or m, so some slope moves by 1/2 or 1. A limit half
# as far leaves room for models that are not wide.
TOLERANCE = 0.25


@dataclasses.dataclass(frozen=True)
class CoordCheck:
    """The measurements of a coordinate check.

    Attributes:
      widths: widths of the models.
      sizes: parametrization -> curve -> mean |activation| at step 0, then mean |change since
        step 0| after every step, [seeds, steps + 1, widths].
      losses: parametrization -> loss after the last step, nats per token, [seeds, widths].
    """

    widths: tuple[int, ...]
    sizes: dict[str, dict[str, np.ndarray]]
    losses: dict[str, np.ndarray]

    @property
    def seeds(self) -> int:
        """Returns the number of seeds."""
        return len(next(iter(self.sizes["muP"].values())))

    def fit(self, parametrization: str, curve: str, step: int = -1) -> SlopeFit:
        """Returns the slope of log2(size) against log2(width) after a step (0 is the start)."""
        size = self.sizes[parametrization][curve][:, step]
        with np.errstate(divide="ignore"):
            return fit_slope(self.widths, np.log2(np.where(np.isfinite(size), size, np.nan)))

    def verdicts(self, parametrization: str) -> dict[tuple[str, int], Verdict]:
        """Returns (curve, step) -> verdict, for step 0 and the last one."""
        tests = 2 * len(CURVES)
        return {
            (curve, step): judge_slope(
                self.fit(parametrization, curve, step), allowed_slopes(curve, step), tests
            )
            for step in (0, -1)
            for curve in CURVES
        }

    def verdict(self, parametrization: str) -> Verdict:
        """Returns whether a parametrization keeps all activations at the scale of muP."""
        return join_verdicts([*self.verdicts(parametrization).values()])

    def outcome(self) -> Verdict:
        """Returns whether muP passes; undecided too if a broken rule does not fail the same test.

        A check that does not find a broken rule says nothing about the model.
        """
        verdict = self.verdict("muP")
        missed = [p for p in self.sizes if p != "muP" and self.verdict(p) != "fails"]
        return "undecided" if verdict == "passes" and missed else verdict


def allowed_slopes(curve: str, step: int) -> Interval:
    """Returns the slopes that pass: those that theory predicts, give or take `TOLERANCE`."""
    low, high = (CHANGE if step else AT_START)[curve]
    return Interval(low - TOLERANCE, high + TOLERANCE)


def coord_check(
    family: WidthFamily,
    corpus: Corpus,
    *,
    parametrizations: Sequence[str] = ALL,
    learning_rate: float = LEARNING_RATE,
    steps: int = STEPS,
    seeds: int = SEEDS,
    batch_size: int = BATCH_SIZE,
    length: int = LENGTH,
) -> CoordCheck:
    """Trains every parametrization at every width on one batch and measures its activations.

    Args:
      family: the model and its widths.
      corpus: the tokens to train on.
      parametrizations: names in `ALL`: "muP", "SP", and muP with one of its rules broken.
      learning_rate: learning rate of embeddings at every step. It should be near the optimum: far
        above it even activations under muP depend on the width, and far below nothing moves.
      steps: training steps.
      seeds: number of seeds; each has its own weights and its own batch.
      batch_size: sequences per batch. Few tokens are best, see above.
      length: tokens per sequence.
    """
    batches = corpus.batches(seeds, batch_size, length, seed=0)
    shape = (seeds, steps + 1, len(family.widths))
    sizes = {p: {c: np.zeros(shape) for c in CURVES} for p in parametrizations}
    losses = {p: np.zeros((seeds, len(family.widths))) for p in parametrizations}
    work = sum(map(family.cost, family.widths)) * seeds * steps * len(parametrizations)
    with Progress(work, "base step", "coordinate check") as progress:
        for j, width in enumerate(family.widths):
            model = BTLM(family.config(width))
            for name in parametrizations:
                rules, rate = family.rules(name, width), np.float32(learning_rate)
                by_curve, losses[name][:, j] = jax.device_get(
                    _train_and_measure(model, batches, rate, rules, steps)
                )
                progress.update(seeds * steps * family.cost(width), f"{name}, width {width}")
                for curve in CURVES:
                    sizes[name][curve][:, :, j] = by_curve[curve]
    return CoordCheck(family.widths, sizes, losses)


@functools.partial(jax.jit, static_argnames=("model", "steps"))
def _train_and_measure(
    model: BTLM, batches: jax.Array, rate: jax.Array, rules: Rules, steps: int
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Trains once per batch [seeds, B, T + 1] and returns sizes [seeds, steps + 1] and losses.

    All seeds are one program, one after another, so that the memory is that of one model.
    """

    def one_seed(args):
        seed, tokens = args
        trial = initial_trial(model, seed, rules)

        def measure(params):
            return activations(model, params, tokens[:, :-1], rules)

        def step(carry, i):
            trial, initial = carry
            current = measure(trial.params)
            sizes = {c: jnp.abs(current[c] - initial[c]).mean() for c in CURVES}
            initial = jax.tree.map(lambda a, b: jnp.where(i == 0, a, b), current, initial)
            trial, loss = trial_step(model, trial, tokens, rate, rules)
            return (trial, initial), (sizes, loss)

        shapes = jax.eval_shape(measure, trial.params)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        _, (sizes, losses) = jax.lax.scan(step, (trial, zeros), jnp.arange(steps + 1))
        return sizes, losses[-1]

    return jax.lax.map(one_seed, (jnp.arange(len(batches)), batches))


def activations(model: BTLM, params: Params, tokens: jax.Array, rules: Rules) -> dict[str, Any]:
    """Returns the activations that the check measures, by the names of `CURVES`."""
    seen = model.intermediates(reparametrize(model, params, rules), tokens)
    logits = jnp.einsum("lbhtk,lbhsk->lbhts", seen.queries, seen.keys)
    last = seen.hidden_states[-2] + seen.attention_outputs[-1] + seen.mlp_outputs[-1]
    return {
        "embedding": seen.hidden_states[0],
        "attention logits": jnp.tril(logits),  # the others are masked
        "attention": seen.attention_outputs,
        "MLP": seen.mlp_outputs,
        "residual stream": last,
        "logits": seen.logits,
    }
