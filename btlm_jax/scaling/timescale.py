"""AdamW's timescale, and the tokens, batches and steps on which it depends.

AdamW's weights are a moving average of its updates (arXiv 2405.13698): each step forgets a fraction
lr * weight_decay of them. The timescale is the fraction of the training over which it averages:

    tau = 1 / (lr * weight_decay * steps) = B / (lr * weight_decay * D),

with B tokens per batch and D tokens in total. Under muP, lr and weight_decay are those of the group
of hidden matrices (`btlm_jax.mup.param_groups`), lr at its peak. Runs of different sizes have
training curves of one shape if their schedules, tokens per parameter and timescales are equal
(arXiv 2509.25087).
"""

from __future__ import annotations

import dataclasses
import math

# Fitted to the timescales that arXiv 2509.25087 (Celerity) tuned: 0.175, 0.087 and 0.051 at 20, 80
# and 234 tokens per parameter; within 1 % of each.
_OPTIMUM, _EXPONENT = 0.785, -0.5


def timescale(lr: float, weight_decay: float, steps: float) -> float:
    """Returns tau, as a fraction of the training.

    Args:
      lr: peak learning rate of the hidden matrices, after muP's multiplier.
      weight_decay: weight decay of the hidden matrices.
      steps: number of steps of the whole training.

    Raises:
      ValueError: an argument is not a positive number; without decay there is no timescale.
    """
    _require_positive(lr=lr, weight_decay=weight_decay, steps=steps)
    return 1.0 / (lr * weight_decay * steps)


def weight_decay(timescale: float, lr: float, steps: float) -> float:
    """Returns the weight decay that gives a timescale; the inverse of `timescale`."""
    _require_positive(timescale=timescale, lr=lr, steps=steps)
    return 1.0 / (timescale * lr * steps)


def optimal_timescale(tokens_per_parameter: float) -> float:
    """Returns the best timescale according to a fit: 0.785 * TPP^-0.5.

    The fit is to three tuned values, at 20 to 234 tokens per parameter and 300M to 3.9B parameters
    (arXiv 2509.25087); outside this range it extrapolates.

    Raises:
      ValueError: the argument is not a positive number.
    """
    _require_positive(tokens_per_parameter=tokens_per_parameter)
    return _OPTIMUM * tokens_per_parameter**_EXPONENT


@dataclasses.dataclass(frozen=True)
class Budget:
    """The length of a training.

    Attributes:
      parameters: N, the number of parameters.
      batch_tokens: B, tokens per step.
      steps: number of steps of the whole training.

    Raises:
      ValueError: an attribute is not a positive number.
    """

    parameters: float
    batch_tokens: float
    steps: float

    def __post_init__(self) -> None:
        _require_positive(**dataclasses.asdict(self))

    @classmethod
    def of(cls, parameters: float, batch_tokens: float, tokens_per_parameter: float) -> Budget:
        """Returns the budget for a number of tokens per parameter; its steps may be fractional.

        Raises:
          ValueError: an argument is not a positive number.
        """
        _require_positive(tokens_per_parameter=tokens_per_parameter, batch_tokens=batch_tokens)
        return cls(parameters, batch_tokens, tokens_per_parameter * parameters / batch_tokens)

    @property
    def tokens(self) -> float:
        """D, the tokens of the whole training."""
        return self.batch_tokens * self.steps

    @property
    def tokens_per_parameter(self) -> float:
        """TPP = D / N, tokens per parameter."""
        return self.tokens / self.parameters

    def timescale(self, lr: float, weight_decay: float) -> float:
        """Returns tau for these steps; see `timescale`."""
        return timescale(lr, weight_decay, self.steps)

    def weight_decay(self, lr: float, tau: float | None = None) -> float:
        """Returns the weight decay for a timescale, by default the best one for this TPP."""
        tau = optimal_timescale(self.tokens_per_parameter) if tau is None else tau
        return weight_decay(tau, lr, self.steps)


def _require_positive(**values: float) -> None:
    """Raises ValueError for values that are not positive and finite."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: found {value!r}, expected a positive number")
