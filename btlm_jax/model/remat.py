"""What the forward pass keeps of a block for the backward pass: the policies of `BTLM.remat`.

Importing this module does not import jax: the command line names the policies too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

Remat = Literal["none", "dots", "attention", "full"]

# The names that results worth keeping get from `checkpoint_name`: of the projections, and of
# attention, with what its kernel leaves for the backward pass (a log-sum-exp).
PRODUCT, ATTENTION = "product", "attention"

# What is kept besides a block's input, from most memory to least; None is everything. The rest is
# computed again: of "dots" LayerNorm, activations and casts, which costs less than storing and
# reading them; of "attention" the projections too, a third of the work; of "full" everything. Per
# token and layer, in multiples of D elements: 5 + 2 F/D, 1, 0.
SAVED_NAMES: dict[Remat, tuple[str, ...] | None] = {
    "none": None,
    "dots": (PRODUCT, ATTENTION),
    "attention": (ATTENTION,),
    "full": (),
}


def policy(name: Remat) -> Callable[..., Any] | None:
    """Returns the `jax.checkpoint` policy that saves `SAVED_NAMES[name]`, or None for "none"."""
    import jax

    names = SAVED_NAMES[name]
    if names is None:
        return None
    named = jax.checkpoint_policies.save_only_these_names(*names)

    def keep(primitive, *args, **params):
        # cuDNN's residuals have no names, but the operation that makes them has.
        fused = primitive.name.startswith("dot_product_attention_fwd")
        return (fused and ATTENTION in names) or named(primitive, *args, **params)

    return keep
