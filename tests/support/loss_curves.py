"""Synthetic loss curves that collapse (equation 4 of arXiv 2509.25087)."""

from __future__ import annotations

import numpy as np

from btlm_jax.scaling import surrogate
from btlm_jax.scaling.collapse import LossCurve

SHAPE = surrogate.Surrogate(b_c=0.1, b_e=0.0, q_c=0.5, q_e=0.0)
FINALS = (2.6, 2.9, 3.2, 3.4)


def loss_curve(seed, final, points, *, noise=0.01, until=1.0, drift=None) -> LossCurve:
    """Returns a run with a learning rate that falls to 0.

    Args:
      final: the true final loss.
      drift: (fraction of training where a fault begins, relative excess at the end).
    """
    t = (np.arange(points) + 1) / points
    loss = final * SHAPE(t, 1 - t, 1, 1)
    if drift:
        loss *= 1 + drift[1] * np.clip((t - drift[0]) / (1 - drift[0]), 0, None)
    loss *= 1 + noise * np.random.default_rng(seed).standard_normal(points)
    return LossCurve.of(t[t <= until], loss[t <= until])


def family_of_curves(seed, points, **kwargs) -> list[LossCurve]:
    """Returns four finished runs of different final losses."""
    return [loss_curve(100 * seed + i, final, points, **kwargs) for i, final in enumerate(FINALS)]
