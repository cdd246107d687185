"""The coordinate check of muP (arXiv 2203.03466, appendix D; microsoft/mup's `coord_check`).

Models of several widths train for a few steps. Under muP what they compute changes by amounts that
do not depend on the width; the fitted slope of log2(mean |change|) against log2(width) is near 0.
Wherever a rule of the parametrization is broken, some slope is far from it, and the check runs such
models too: one that they pass would prove nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params
from btlm_jax.mup_study.corpus import Corpus
from btlm_jax.mup_study.parametrization import (
    PARAMETRIZATIONS,
    Family,
    Rules,
    reparametrized,
    start,
    step,
)
from btlm_jax.utils import plots
from btlm_jax.utils.progress import Progress

ALL = tuple(PARAMETRIZATIONS)
# About the best one of `transfer`, for the default family.
LEARNING_RATE = 2**-6.25
# The greatest |slope| that passes. Attention logits start with random signs, at 1 / sqrt(d), and
# grow towards their final size within these steps: their slope is the last to settle.
LIMITS = {
    "embedding": 0.2,
    "attention logits": 0.3,
    "attention": 0.2,
    "MLP": 0.2,
    "residual stream": 0.2,
    "logits": 0.2,
}
# What a broken rule must show at least, in each of these curves, for the check to have found it.
FAULTS: dict[str, tuple[float, tuple[str, ...]]] = {
    "SP": (1.0, ("attention", "MLP", "residual stream")),
    "hidden rate unscaled": (0.5, ("MLP",)),
    "logits unscaled": (0.5, ("attention", "residual stream")),
    "attention by sqrt(d)": (0.35, ("attention logits",)),
    "init unscaled": (0.5, ("MLP",)),
    "embedding rate scaled": (0.5, ("embedding", "logits")),
}


@dataclasses.dataclass(frozen=True)
class CoordCheck:
    """What was measured.

    Attributes:
      widths: of the models.
      sizes: parametrization -> curve -> mean |activation| at step 0, then mean |change since then|
        after every step, [seeds, steps + 1, widths].
      losses: parametrization -> of the last step, nats per token, [seeds, widths].
    """

    widths: tuple[int, ...]
    sizes: dict[str, dict[str, np.ndarray]]
    losses: dict[str, np.ndarray]

    def slope(self, parametrization: str, curve: str, at: int = -1) -> float:
        """Of log2(size) against log2(width) after a step (0: at the start), mean over seeds; inf
        where some width has diverged."""
        size = self.sizes[parametrization][curve][:, at].mean(0)
        if not np.isfinite(size).all():
            return math.inf
        return float(np.polyfit(np.log2(self.widths), np.log2(size), 1)[0])

    def passes(self, parametrization: str) -> bool:
        """Whether every curve is as flat as muP's should be."""
        return all(abs(self.slope(parametrization, curve)) <= n for curve, n in LIMITS.items())

    def found(self, fault: str) -> bool:
        """Whether a broken rule shows in every curve in which it must."""
        least, curves = FAULTS[fault]
        return all(abs(self.slope(fault, curve)) >= least for curve in curves)


def coord_check(
    family: Family,
    corpus: Corpus,
    *,
    parametrizations: Sequence[str] = ALL,
    learning_rate: float = LEARNING_RATE,
    steps: int = 10,
    seeds: int = 2,
    batch_size: int = 8,
    length: int = 64,
) -> CoordCheck:
    """Trains every parametrization at every width, and measures what they compute.

    Args:
      family, corpus: what is trained in which widths, and on what.
      parametrizations: of `ALL`: "muP", "SP", and muP with one of its rules broken.
      learning_rate: of embeddings, at every step. It should be near the best one: far above it even
        muP's activations depend on the width, far below nothing moves.
      steps: to train; activations are those of one held-out batch.
      seeds: of weights; batches are the same.
      batch_size, length: sequences and tokens of every batch.
    """
    batches = corpus.batches(steps, batch_size, length, seed=0)
    seen = corpus.windows(1, batch_size, length)[0, :, :-1]
    shape = (seeds, steps + 1, len(family.widths))
    sizes = {p: {c: np.zeros(shape) for c in LIMITS} for p in parametrizations}
    losses = {p: np.zeros((seeds, len(family.widths))) for p in parametrizations}
    work = sum(map(family.cost, family.widths)) * seeds * steps * len(parametrizations)
    with Progress(work, "base step", "coordinate check") as progress:
        for j, width in enumerate(family.widths):
            model = BTLM(family.at(width))
            for name in parametrizations:
                rules = family.rules(name, width)
                for seed in range(seeds):
                    trial, mean = start(model, np.int32(seed), rules), np.nan
                    first = activations(model, trial.params, seen, rules)
                    found = [_sizes(first, None)]
                    for tokens in batches:
                        rate = np.float32(learning_rate)
                        trial, mean = step(model, trial, tokens, rate, rules)
                        now = activations(model, trial.params, seen, rules)
                        found.append(_sizes(now, first))
                    losses[name][seed, j], found = jax.device_get((mean, found))
                    progress.update(steps * family.cost(width), f"{name}, width {width}")
                    for i, one in enumerate(found):
                        for curve in LIMITS:
                            sizes[name][curve][seed, i, j] = one[curve]
    return CoordCheck(family.widths, sizes, losses)


@functools.partial(jax.jit, static_argnames="model")
def activations(model: BTLM, params: Params, tokens: jax.Array, rules: Rules) -> dict[str, Any]:
    """What the check looks at, by the names of `LIMITS`."""
    got = model.intermediates(reparametrized(model, params, rules), tokens)
    logits = jnp.einsum("lbhtk,lbhsk->lbhts", got.queries, got.keys)
    last = got.hidden_states[-2] + got.attention_outputs[-1] + got.mlp_outputs[-1]
    return {
        "embedding": got.hidden_states[0],
        "attention logits": jnp.tril(logits),  # no others count
        "attention": got.attention_outputs,
        "MLP": got.mlp_outputs,
        "residual stream": last,
        "logits": got.logits,
    }


@jax.jit
def _sizes(now: dict[str, Any], before: dict[str, Any] | None) -> dict[str, jax.Array]:
    change = now if before is None else jax.tree.map(jnp.subtract, now, before)
    return jax.tree.map(lambda x: jnp.abs(x).mean(), change)


def table(found: CoordCheck) -> Iterator[str]:
    """Slopes by parametrization and curve, and the verdicts, as lines of text."""
    curves = list(LIMITS)
    yield f"{'slope of log2 size against log2 width':<40}" + "".join(f"{c:>18}" for c in curves)
    for name, by_curve in found.sizes.items():
        final, initial = ([found.slope(name, c, at) for c in by_curve] for at in (-1, 0))
        yield f"{name + ', change':<40}" + "".join(f"{x:>+18.2f}" for x in final)
        if name == "muP":
            yield f"{name + ', at the start':<40}" + "".join(f"{x:>+18.2f}" for x in initial)
    yield f"{'limit':<40}" + "".join(f"{LIMITS[c]:>18.2f}" for c in curves)
    yield ""
    yield from (line for _, line in verdicts(found))


def verdicts(found: CoordCheck) -> Iterator[tuple[bool, str]]:
    """Whether each parametrization does as it must, and that in words."""
    for name in found.sizes:
        steepest = max(LIMITS, key=lambda c: abs(found.slope(name, c)) / LIMITS[c])
        slope = f"steepest {steepest} {found.slope(name, steepest):+.2f}"
        if name == "muP":
            good = found.passes(name)
            says = "passes" if good else "FAILS, and should pass"
        else:
            good = found.found(name)
            least, curves = FAULTS[name]
            says = "fails, as it must" if good else (
                f"is NOT FOUND: expected at least {least} in {', '.join(curves)}"
            )  # fmt: skip
        yield good, f"{name}: {says} ({slope})"


def to_json(found: CoordCheck) -> dict[str, Any]:
    """Everything, as plain values."""
    curves = {
        p: {
            c: {"slope": found.slope(p, c), "limit": n, "passes": abs(found.slope(p, c)) <= n}
            for c, n in LIMITS.items()
        }
        for p in found.sizes
    }
    return {
        "widths": list(found.widths),
        "verdicts": curves,
        "faults": {p: {"least": n, "in": list(shown)} for p, (n, shown) in FAULTS.items()},
        "slopes_at_start": {p: {c: found.slope(p, c, 0) for c in LIMITS} for p in found.sizes},
        "as_it_must": dict(zip(found.sizes, (good for good, _ in verdicts(found)), strict=True)),
        "sizes": {p: {c: x.tolist() for c, x in s.items()} for p, s in found.sizes.items()},
        "losses": {p: x.tolist() for p, x in found.losses.items()},
    }


def draw(path: Path, found: CoordCheck) -> None:
    """A row of panels for every parametrization: change against width, a line per step."""
    from matplotlib import colormaps

    names, curves = list(found.sizes), list(LIMITS)
    made, panels = plots.new_figure(len(curves), len(names), size=(2.6, 2.1))
    for row, name in zip(panels, names, strict=True):
        for axes, curve in zip(row, curves, strict=True):
            size = found.sizes[name][curve].mean(0)
            for i in range(1, len(size)):
                color = colormaps["viridis"]((i - 1) / max(len(size) - 2, 1))
                axes.plot(found.widths, size[i], color=color, linewidth=1.2)
            slope = found.slope(name, curve)
            good = abs(slope) <= LIMITS[curve]
            axes.set_title(f"{curve} {slope:+.2f}", fontsize=9, color="black" if good else "C3")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(found.widths, [str(w) for w in found.widths], fontsize=7)
            axes.tick_params(axis="y", labelsize=7)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"{name}\nmean |change|", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("width", fontsize=8)
    steps = len(next(iter(found.sizes[names[0]].values()))[0]) - 1
    made.suptitle(
        f"Coordinate check: mean |change| after steps 1 (dark) to {steps} (light), and its slope "
        "after the last; red: steeper than muP may be", fontsize=11,
    )  # fmt: skip
    plots.save_png(path, made, dpi=90)  # a page of panels would be more than a megabyte
