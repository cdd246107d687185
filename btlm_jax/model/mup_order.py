"""The position of `mup.scale_by_mup` in an optimizer, checked in the state of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from optax.contrib import ScheduleFreeState


class ScaleByMupState(NamedTuple):
    """An empty state, which shows where `scale_by_mup` is in the state of an optimizer."""


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns `optax.chain` whose `init` refuses a misplaced `scale_by_mup` with a ValueError.

    See `check`.
    """
    inner = optax.chain(*transforms)

    def init(params):
        state = inner.init(params)
        check(state)
        return state

    return optax.GradientTransformationExtraArgs(init, inner.update)


def check(state: Any) -> None:
    """Checks the position of `scale_by_mup` in an optimizer, given the state from its `init`.

    It must not come before a transformation that keeps statistics of its updates (except momentum,
    which is linear), after `schedule_free`, or twice in one chain. Normalization without a state
    (`optax.scale_by_sign`) cannot be detected.

    Raises:
      ValueError: it is misplaced.
    """
    # The state of a chain is a bare tuple, in order; named tuples and dicts are nested states.
    if type(state) is tuple:
        indices = [i for i, s in enumerate(state) if _contains(s, ScaleByMupState)]
        before, after = (state[: indices[0]], state[indices[0] + 1 :]) if indices else ((), ())
        linear = (optax.TraceState, optax.EmaState)
        statistics = jax.tree.leaves(after, is_leaf=lambda x: isinstance(x, linear))
        wrong = {
            "twice": len(indices) > 1,
            "after schedule_free": _contains(before, ScheduleFreeState),
            "before the normalization": any(getattr(x, "ndim", 0) for x in statistics),
        }
        for position in (name for name, is_wrong in wrong.items() if is_wrong):
            raise ValueError(
                f"scale_by_mup: found {position}, expected once, after the normalization of the "
                "gradients and inside schedule_free (the optimizers of btlm_jax.mup contain it)"
            )
    if isinstance(state, tuple | list | Mapping):
        for nested in state.values() if isinstance(state, Mapping) else state:
            check(nested)


def _contains(state: Any, kind: type) -> bool:
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return any(isinstance(x, kind) for x in nodes)
