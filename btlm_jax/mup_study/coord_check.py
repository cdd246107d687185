"""The coordinate check of muP (arXiv 2203.03466, appendix D; microsoft/mup's `coord_check`).

Models of several widths train for a few steps. Under muP their activations change by amounts that
do not depend on the width: the fitted slope of log2(mean |change|) against log2(width) is near 0.
If a rule of the parametrization is broken, some slope is far from 0. The check also runs models
with one deliberately broken rule each, because a check that they pass would prove nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
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
from btlm_jax.utils.progress import Progress

ALL = tuple(PARAMETRIZATIONS)
# About the optimum of `transfer` for the default family.
LEARNING_RATE = 2**-6.25
# Attention logits settle within about twenty steps; before, their slope depends on the text.
STEPS = 24
# The largest |slope| that passes. Attention logits start with random signs, at 1 / sqrt(d), and
# grow towards their final size during these steps, so their slope settles last.
LIMITS = {
    "embedding": 0.2,
    "attention logits": 0.3,
    "attention": 0.2,
    "MLP": 0.2,
    "residual stream": 0.2,
    "logits": 0.2,
}
# A broken rule counts as detected if it changes the slope of each of these curves by this much.
FAULTS: dict[str, tuple[float, tuple[str, ...]]] = {
    "SP": (1.0, ("attention", "MLP", "residual stream")),
    "hidden rate unscaled": (0.3, ("MLP",)),
    "logits unscaled": (0.3, ("attention", "residual stream")),
    "attention by sqrt(d)": (0.2, ("attention logits",)),
    "init unscaled": (0.3, ("MLP",)),
    "embedding rate scaled": (0.3, ("embedding", "logits")),
}


@dataclasses.dataclass(frozen=True)
class CoordCheck:
    """The measurements of a coordinate check.

    Attributes:
      widths: widths of the models.
      sizes: parametrization -> curve -> mean |activation| at step 0, then mean |change since
        step 0| after every step, [seeds, steps + 1, widths].
      losses: parametrization -> loss of the last step, nats per token, [seeds, widths].
    """

    widths: tuple[int, ...]
    sizes: dict[str, dict[str, np.ndarray]]
    losses: dict[str, np.ndarray]

    def slope(self, parametrization: str, curve: str, step: int = -1) -> float:
        """Returns the slope of log2(size) against log2(width) after a step (0 is the start).

        Sizes are means over seeds. The slope is inf if any width has diverged.
        """
        size = self.sizes[parametrization][curve][:, step].mean(0)
        if not np.isfinite(size).all():
            return math.inf
        return float(np.polyfit(np.log2(self.widths), np.log2(size), 1)[0])

    def passes(self, parametrization: str) -> bool:
        """Returns whether every curve is as flat as muP requires."""
        return all(abs(self.slope(parametrization, curve)) <= n for curve, n in LIMITS.items())

    def effect(self, fault: str, curve: str) -> float:
        """Returns the change of a final slope by a broken rule.

        It is measured against muP with the same seeds and batches, where that was trained: most of
        the noise cancels in the difference.
        """
        slope = self.slope(fault, curve)
        if "muP" not in self.sizes or not math.isfinite(slope):
            return slope
        return slope - self.slope("muP", curve)

    def detects(self, fault: str) -> bool:
        """Returns whether a broken rule shows in every curve of `FAULTS`."""
        least, curves = FAULTS[fault]
        return all(abs(self.effect(fault, curve)) >= least for curve in curves)


def coord_check(
    family: WidthFamily,
    corpus: Corpus,
    *,
    parametrizations: Sequence[str] = ALL,
    learning_rate: float = LEARNING_RATE,
    steps: int = STEPS,
    seeds: int = 2,
    batch_size: int = 8,
    length: int = 64,
) -> CoordCheck:
    """Trains every parametrization at every width and measures the activations.

    Args:
      family: the model and its widths.
      corpus: the tokens to train on.
      parametrizations: names in `ALL`: "muP", "SP", and muP with one of its rules broken.
      learning_rate: learning rate of embeddings at every step. It should be near the optimum: far
        above it even activations under muP depend on the width, and far below nothing moves.
      steps: training steps; activations are those of one held-out batch.
      seeds: number of seeds of the weights; the batches are the same.
      batch_size: sequences per batch.
      length: tokens per sequence.
    """
    batches = corpus.batches(steps, batch_size, length, seed=0)
    probe = corpus.windows(1, batch_size, length)[0, :, :-1]
    shape = (seeds, steps + 1, len(family.widths))
    sizes = {p: {c: np.zeros(shape) for c in LIMITS} for p in parametrizations}
    losses = {p: np.zeros((seeds, len(family.widths))) for p in parametrizations}
    work = sum(map(family.cost, family.widths)) * seeds * steps * len(parametrizations)
    with Progress(work, "base step", "coordinate check") as progress:
        for j, width in enumerate(family.widths):
            model = BTLM(family.config(width))
            for name in parametrizations:
                rules = family.rules(name, width)
                for seed in range(seeds):
                    trial, mean = initial_trial(model, np.int32(seed), rules), np.nan
                    initial = activations(model, trial.params, probe, rules)
                    by_step = [_mean_sizes(initial, None)]
                    for tokens in batches:
                        rate = np.float32(learning_rate)
                        trial, mean = trial_step(model, trial, tokens, rate, rules)
                        current = activations(model, trial.params, probe, rules)
                        by_step.append(_mean_sizes(current, initial))
                    losses[name][seed, j], by_step = jax.device_get((mean, by_step))
                    progress.update(steps * family.cost(width), f"{name}, width {width}")
                    for i, by_curve in enumerate(by_step):
                        for curve in LIMITS:
                            sizes[name][curve][seed, i, j] = by_curve[curve]
    return CoordCheck(family.widths, sizes, losses)


@functools.partial(jax.jit, static_argnames="model")
def activations(model: BTLM, params: Params, tokens: jax.Array, rules: Rules) -> dict[str, Any]:
    """Returns the activations that the check measures, by the names of `LIMITS`."""
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


@jax.jit
def _mean_sizes(current: dict[str, Any], initial: dict[str, Any] | None) -> dict[str, jax.Array]:
    change = current if initial is None else jax.tree.map(jnp.subtract, current, initial)
    return jax.tree.map(lambda x: jnp.abs(x).mean(), change)
