"""A formula for collapsing curves: equations 4 and 5 of arXiv 2509.25087.

    l(t) = ((1 + e1) / (t + e1))^m + b (rate(t) + e2)^q,   divided by l(1),
    b = b_c tau^b_e,  q = q_c TPP^q_e,

with the fraction t of training, the learning rate as a fraction of its peak, AdamW's timescale tau
and TPP tokens per parameter. The first term is a power law, the second the cost of a high learning
rate. A few curves therefore predict those of other timescales and lengths. m, e1 and e2 are taken
from the paper; the paper fits the others by successive grid searches, this module by joint least
squares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

from btlm_jax.scaling.collapse import IGNORED

_M, _E1, _E2 = 0.05, 0.001, 0.1
_STARTS = ((0.1, 0.5), (0.3, 1.0), (0.03, 2.0))  # (b, q)


class ObservedCurve(NamedTuple):
    """A curve to fit.

    Attributes:
      done, loss: [points], as in `collapse.LossCurve`; the loss in any unit.
      rate: [points], the learning rate as a fraction of its peak.
      timescale, tokens_per_parameter: AdamW's timescale and TPP of the run.
    """

    done: np.ndarray
    loss: np.ndarray
    rate: np.ndarray
    timescale: float
    tokens_per_parameter: float


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """The formula with fitted parameters.

    Attributes:
      b_c, b_e: b = b_c tau^b_e.
      q_c, q_e: q = q_c TPP^q_e.
    """

    b_c: float
    b_e: float
    q_c: float
    q_e: float

    def __call__(
        self,
        done: ArrayLike,
        rate: ArrayLike,
        timescale: float,
        tokens_per_parameter: float,
        final_rate: float = 0.0,
    ) -> np.ndarray:
        """Returns loss / final loss, float64 [points].

        Args:
          done: fractions of training, in (0, 1].
          rate: the learning rates there, as fractions of the peak.
          timescale, tokens_per_parameter: AdamW's timescale and TPP of the run.
          final_rate: the learning rate at the end, as a fraction of the peak.
        """
        b = self.b_c * timescale**self.b_e
        q = self.q_c * tokens_per_parameter**self.q_e

        def raw(t: ArrayLike, eta: ArrayLike) -> np.ndarray:
            power_law = ((1 + _E1) / (np.asarray(t, np.float64) + _E1)) ** _M
            return power_law + b * (np.asarray(eta, np.float64) + _E2) ** q

        return raw(done, rate) / raw(1.0, final_rate)


def fit_surrogate(curves: Sequence[ObservedCurve]) -> Surrogate:
    """Fits the formula to logarithms of losses after `IGNORED`, with a free level for each curve.

    An exponent is 0 if the curves cannot determine it, because all have the same timescale or TPP.

    Args:
      curves: one or more.

    Raises:
      ValueError: no curves, fewer than 20 points of one after `IGNORED`, or losses, timescales or
        TPP that are not positive.
    """
    if not curves:
        raise ValueError("surrogate: found no curves, expected one or more")
    valid = []
    for i, c in enumerate(curves):
        used = np.asarray(c.done) > IGNORED
        if used.sum() < 20:
            raise ValueError(
                f"surrogate: found {used.sum()} points of curve {i} after {IGNORED:.0%} of "
                "training, expected 20 or more"
            )
        if min(np.min(c.loss), c.timescale, c.tokens_per_parameter) <= 0:
            raise ValueError(f"surrogate: expected positive losses, timescale and TPP in curve {i}")
        done, loss, rate = (np.asarray(x, np.float64)[used] for x in (c.done, c.loss, c.rate))
        valid.append(c._replace(done=done, loss=loss, rate=rate))
    # The unknowns are b and q at the center of the data, and the two exponents.
    tau = float(np.exp(np.mean([np.log(c.timescale) for c in valid])))
    tpp = float(np.exp(np.mean([np.log(c.tokens_per_parameter) for c in valid])))
    free = np.array([
        True, len({c.timescale for c in valid}) > 1,
        True, len({c.tokens_per_parameter for c in valid}) > 1,
    ])  # fmt: skip

    def surrogate_of(theta: np.ndarray) -> Surrogate:
        log_b, b_e, log_q, q_e = theta
        b_c, q_c = np.exp(log_b) * tau**-b_e, np.exp(log_q) * tpp**-q_e
        return Surrogate(float(b_c), float(b_e), float(q_c), float(q_e))

    def errors(unknown: np.ndarray) -> np.ndarray:
        theta = np.zeros(4)
        theta[free] = unknown
        surrogate, parts = surrogate_of(theta), []
        for c in valid:
            shape = surrogate(c.done, c.rate, c.timescale, c.tokens_per_parameter)
            error = np.log(c.loss / shape)
            parts.append((error - error.mean()) / np.sqrt(len(error)))
        return np.concatenate(parts)

    low = np.array([np.log(1e-4), -3.0, np.log(1e-2), -3.0])[free]
    high = np.array([np.log(1e2), 3.0, np.log(20.0), 3.0])[free]
    results = [
        least_squares(errors, np.array([np.log(b), 0.0, np.log(q), 0.0])[free], bounds=(low, high))
        for b, q in _STARTS
    ]
    theta = np.zeros(4)
    theta[free] = min(results, key=lambda r: r.cost).x
    return surrogate_of(theta)
