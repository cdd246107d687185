"""Rematerialization: which results of a block are saved for the backward pass.

This module does not import jax at the top, because the command line names the policies too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

Remat = Literal["none", "dots", "attention", "full"]

# Results worth saving carry these names (`checkpoint_name`): the projections; attention, with the
# residual its kernel leaves for the backward pass (a log-sum-exp).
PRODUCT, ATTENTION = "product", "attention"

# The results saved besides the input of a block, from most memory to least; None saves all of them.
# Everything else is recomputed. "dots" recomputes LayerNorm, activations and casts, which costs
# less than storing and reading them; "attention" also the projections, a third of the work; "full"
# the whole block. Memory per token and layer, in multiples of D elements: 5 + 2 F/D, 1, 0.
SAVED_NAMES: dict[Remat, tuple[str, ...] | None] = {
    "none": None,
    "dots": (PRODUCT, ATTENTION),
    "attention": (ATTENTION,),
    "full": (),
}


def checkpoint_policy(name: Remat) -> Callable[..., Any] | None:
    """Returns the `jax.checkpoint` policy that saves `SAVED_NAMES[name]`, or None for "none"."""
    import jax

    names = SAVED_NAMES[name]
    if names is None:
        return None
    saves_named = jax.checkpoint_policies.save_only_these_names(*names)

    def saves(primitive, *args, **params):
        # cuDNN's residuals have no names, so its forward primitive is recognized instead.
        is_cudnn = primitive.name.startswith("dot_product_attention_fwd")
        return (is_cudnn and ATTENTION in names) or saves_named(primitive, *args, **params)

    return saves
