"""Scaling laws, fitted as in Chinchilla (arXiv 2203.15556).

The fit minimizes the Huber loss of log losses by L-BFGS, from many starting points, and takes the
best result. A law is a sum of terms, each a coefficient times powers of the variables. Terms are
computed as logarithms and summed by log-sum-exp, so that 1e9 parameters and 1e12 tokens cause no
rounding. The unknowns are the logarithms of the terms at the center of the data: a coefficient such
as A in A / N^alpha depends so strongly on alpha that L-BFGS would converge slowly.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

# Starting points and bounds of the search: for a term, as a fraction of the loss at the center of
# the data; for an exponent; for a shift, as a fraction of its variable there.
_TERM = (0.05, 0.5), (1e-9, 1e2)
_EXPONENT = (0.2, 0.6), (0.0, 3.0)
_SHIFT = (0.1,), (1e-4, 10.0)
_STARTS = 64


class PowerFactor(NamedTuple):
    """(variable + shift) ** (sign * exponent); `exponent` and `shift` are names of parameters."""

    variable: str
    exponent: str
    sign: int
    shift: str | None = None


class LawTerm(NamedTuple):
    """The parameter named `coefficient` times powers."""

    coefficient: str
    powers: tuple[PowerFactor, ...] = ()


@dataclasses.dataclass(frozen=True)
class ScalingLaw:
    """The form of a law.

    Attributes:
      formula: the formula as text.
      terms: the terms whose sum is the loss.
    """

    formula: str
    terms: tuple[LawTerm, ...]

    @property
    def variables(self) -> tuple[str, ...]:
        """The names of the inputs."""
        return tuple(dict.fromkeys(p.variable for t in self.terms for p in t.powers))

    @property
    def coefficients(self) -> tuple[str, ...]:
        """The names of the terms' coefficients."""
        return tuple(t.coefficient for t in self.terms)

    @property
    def exponents(self) -> tuple[str, ...]:
        """The names of the exponents."""
        return tuple(dict.fromkeys(p.exponent for t in self.terms for p in t.powers))

    @property
    def shifts(self) -> tuple[str, ...]:
        """The names of the shifts that are added to variables."""
        return tuple(dict.fromkeys(p.shift for t in self.terms for p in t.powers if p.shift))

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all fitted parameters."""
        return self.coefficients + self.exponents + self.shifts

    def predict(self, values: Mapping[str, float], **variables: ArrayLike) -> np.ndarray:
        """Returns the losses, float64, for given values of the parameters.

        Raises:
          ValueError: other variables than those of the law, or values that are not positive.
        """
        x = _check_variables(self, variables)
        logs = [
            np.log(values[t.coefficient])
            + sum(
                p.sign * values[p.exponent]
                * np.log(x[p.variable] + (values[p.shift] if p.shift else 0.0))
                for p in t.powers
            )
            for t in self.terms
        ]  # fmt: skip
        return np.exp(logsumexp(np.stack(np.broadcast_arrays(*logs)), axis=0))


CHINCHILLA = ScalingLaw(
    "L(N, D) = E + A / N^alpha + B / D^beta",
    (
        LawTerm("E"),
        LawTerm("A", (PowerFactor("N", "alpha", -1),)),
        LawTerm("B", (PowerFactor("D", "beta", -1),)),
    ),
)
"""The loss at N parameters and D tokens (arXiv 2203.15556, approach 3)."""

D_CPT = ScalingLaw(
    "L(N, D, r) = E + A / N^alpha + B r^eta / D^beta + C / (r + epsilon)^gamma",
    (
        LawTerm("E"),
        LawTerm("A", (PowerFactor("N", "alpha", -1),)),
        LawTerm("B", (PowerFactor("r", "eta", 1), PowerFactor("D", "beta", -1))),
        LawTerm("C", (PowerFactor("r", "gamma", -1, "epsilon"),)),
    ),
)
"""The loss of continued pre-training; r is the domain's share of the data (arXiv 2406.01375)."""


@dataclasses.dataclass(frozen=True)
class FittedLaw:
    """A law with fitted parameters.

    Attributes:
      law: the form of the law.
      values: the parameters, by name.
      rms: root mean square of log(predicted / observed) over the points.
      agreeing: number of starts that ended within 1 % of the best objective; if only one did, more
        starts may give a better fit.
      starts: number of starts.
      at_bound: parameters that ended at a bound of the search: the data do not determine them.
    """

    law: ScalingLaw
    values: dict[str, float]
    rms: float
    agreeing: int
    starts: int
    at_bound: tuple[str, ...]

    def predict(self, **variables: ArrayLike) -> np.ndarray:
        """Returns the losses at other points; see `ScalingLaw.predict`."""
        return self.law.predict(self.values, **variables)


def fit_law(
    law: ScalingLaw,
    losses: ArrayLike,
    *,
    delta: float = 1e-3,
    starts: int = _STARTS,
    seed: int = 0,
    **variables: ArrayLike,
) -> FittedLaw:
    """Fits a law to losses.

    Args:
      law: the form of the law, such as `CHINCHILLA`.
      losses: [points], nats.
      delta: value of log(predicted / observed) at which the Huber loss turns from squares to
        absolute values; the default is Chinchilla's.
      starts: the largest number of starting points, drawn at random from a grid.
      seed: seed of that draw.
      **variables: the inputs, each [points].

    Raises:
      ValueError: too few points, other variables than those of the law, different lengths, or
        values that are not positive and finite.
    """
    if not delta > 0:
        raise ValueError(f"delta: found {delta!r}, expected a positive number")
    if starts < 1:
        raise ValueError(f"starts: found {starts!r}, expected a positive int")
    x, y = _check_variables(law, variables), _as_positive("losses", losses)
    if y.ndim != 1 or any(v.shape != y.shape for v in x.values()):
        shapes = {"losses": y.shape} | {name: v.shape for name, v in x.items()}
        raise ValueError(f"points: found shapes {shapes}, expected one length for all")
    if len(y) <= len(law.parameters):
        raise ValueError(
            f"points: found {len(y)}, expected more than the {len(law.parameters)} parameters of "
            f"{law.formula}: add runs, or use a law with fewer"
        )
    center = {name: float(np.exp(np.log(v).mean())) for name, v in x.items()}
    level = float(np.exp(np.log(y).mean()))
    scaled = {name: v / center[name] for name, v in x.items()}
    log_y = np.log(y / level)
    shifts = {p.shift: center[p.variable] for t in law.terms for p in t.powers if p.shift}

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        # Per point and in units of delta, because the tolerances of L-BFGS are absolute.
        predicted, slopes = _log_sum(law, scaled, theta)
        error = (predicted - log_y) / delta
        size = np.abs(error)
        value = np.where(size < 1, 0.5 * size**2, size - 0.5).mean()
        return float(value), slopes @ np.clip(error, -1, 1) / (delta * len(y))

    kinds = [
        *[_TERM] * len(law.coefficients),
        *[_EXPONENT] * len(law.exponents),
        *[tuple(tuple(v / shifts[name] for v in pair) for pair in _SHIFT) for name in law.shifts],
    ]
    logs = np.array([name not in law.exponents for name in law.parameters])
    axes = [np.log(s) if log else np.array(s) for (s, _), log in zip(kinds, logs, strict=True)]
    bounds = [np.log(b) if log else np.array(b) for (_, b), log in zip(kinds, logs, strict=True)]
    options = {"maxiter": 5000, "maxfun": 10_000, "ftol": 1e-13, "gtol": 1e-9}
    results = [
        minimize(objective, s, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        for s in _starting_points(axes, starts, seed)
    ]
    best = min(results, key=lambda r: r.fun)
    values = dict(zip(law.parameters, np.where(logs, np.exp(best.x), best.x), strict=True))
    for name, unit in shifts.items():
        values[name] *= unit
    for t in law.terms:  # from terms at the center of the data to coefficients
        values[t.coefficient] *= level
        for p in t.powers:
            values[t.coefficient] /= center[p.variable] ** (p.sign * values[p.exponent])
    error = _log_sum(law, scaled, best.x)[0] - log_y
    return FittedLaw(
        law,
        {name: float(v) for name, v in values.items()},
        rms=float(np.sqrt(np.mean(error**2))),
        agreeing=sum(bool(r.fun <= 1.01 * best.fun + 1e-9) for r in results),
        starts=len(results),
        at_bound=tuple(
            name
            for name, value, (low, high) in zip(law.parameters, best.x, bounds, strict=True)
            if min(value - low, high - value) <= 1e-6 * (high - low)
        ),
    )


def _log_sum(
    law: ScalingLaw, x: Mapping[str, np.ndarray], theta: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the log of the law [points] and its gradient [parameters, points].

    Args:
      theta: log coefficients, exponents and log shifts, in the order of `law.parameters`.
    """
    index = {name: i for i, name in enumerate(law.parameters)}
    points = next(iter(x.values())).shape
    logs = np.empty((len(law.terms), *points))
    slopes = np.zeros((len(law.terms), len(theta), *points))
    for i, term in enumerate(law.terms):
        logs[i] = theta[index[term.coefficient]]
        slopes[i, index[term.coefficient]] = 1.0
        for p in term.powers:
            shift = np.exp(theta[index[p.shift]]) if p.shift else 0.0
            log_x, exponent = np.log(x[p.variable] + shift), theta[index[p.exponent]]
            logs[i] += p.sign * exponent * log_x
            slopes[i, index[p.exponent]] += p.sign * log_x
            if p.shift:
                slopes[i, index[p.shift]] += p.sign * exponent * shift / (x[p.variable] + shift)
    return logsumexp(logs, axis=0), np.einsum("tn,tpn->pn", softmax(logs, axis=0), slopes)


def _starting_points(axes: list[np.ndarray], count: int, seed: int) -> list[np.ndarray]:
    """Returns the grid of starting points, or `count` of them drawn at random."""
    grid = [np.array(point) for point in itertools.product(*axes)]
    if len(grid) <= count:
        return grid
    chosen = np.random.default_rng(seed).choice(len(grid), count, replace=False)
    return [grid[i] for i in sorted(chosen)]


def _check_variables(law: ScalingLaw, variables: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    if set(variables) != set(law.variables):
        raise ValueError(
            f"variables: found {', '.join(sorted(variables)) or 'none'}, expected "
            f"{', '.join(law.variables)} of {law.formula}"
        )
    return {name: _as_positive(name, variables[name]) for name in law.variables}


def _as_positive(name: str, values: ArrayLike) -> np.ndarray:
    """Returns values as float64; raises ValueError unless they are positive and finite."""
    array = np.asarray(values, np.float64)
    invalid = ~(np.isfinite(array) & (array > 0))
    if invalid.any():
        raise ValueError(
            f"{name}: found {array[invalid].flat[0]} at index {int(np.flatnonzero(invalid)[0])}, "
            "expected positive, finite numbers"
        )
    return array
