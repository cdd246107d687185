"""muP (maximal update parametrisation) for the optimizer.

The forward multipliers of muP live in the model and its initial scales in the table of weights;
what is left is the learning rate of hidden matrices, which the original multiplies by
`mup_width_scale` (its `get_mup_param_groups`). With m = 1 / mup_width_scale:

| group | members | learning rate | weight decay per step |
|---|---|---|---|
| hidden | every projection kernel, an untied head | lr / m | lr * wd / m |
| embedding | wte (tied head included), wpe | lr | lr * wd |
| vector | LayerNorm scales, every bias | lr | 0 |
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from btlm_jax import weights
from btlm_jax.config import BTLMConfig


def multipliers(config: BTLMConfig) -> dict[str, Any]:
    """The learning-rate multiplier of every weight: a tree of floats like the parameters."""
    return weights.unflatten(
        {
            w.path: config.mup_width_scale if w.role == "hidden" else 1.0
            for w in weights.table(config)
        }
    )


def decay_mask(config: BTLMConfig) -> dict[str, Any]:
    """Which weights decay: a tree of bools like the parameters (matrices and embeddings do)."""
    return weights.unflatten({w.path: w.decay for w in weights.table(config)})


def scale_by_mup(config: BTLMConfig) -> optax.GradientTransformation:
    """Multiplies the updates of hidden matrices by mup_width_scale. Stateless.

    It belongs after the part of a chain that normalises (Adam): before it, Adam would divide the
    factor out again and nothing would change. `add_decayed_weights` before it gives the original's
    decay (lr * wd / m for hidden matrices).

    Raises:
      ValueError: the updates are not a tree of this configuration's weights.
    """
    scales = weights.flatten(multipliers(config))

    def update(updates, params=None):
        del params
        flat = weights.flatten(updates)
        if set(flat) != set(scales):
            odd = sorted("/".join(p) for p in set(flat) ^ set(scales))
            raise ValueError(f"scale_by_mup: the updates do not match the configuration at {odd}")
        scaled = {
            path: u if scales[path] == 1.0 else jax.tree.map(lambda x, s=scales[path]: x * s, u)
            for path, u in flat.items()
        }
        return weights.unflatten(scaled)

    return optax.stateless(update)


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    config: BTLMConfig,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW in the original's muP groups. The defaults are those that trained BTLM-3B-8K.

    Equal to torch.optim.AdamW over `get_mup_param_groups(lr, weight_decay)`, after clipping the
    global gradient norm to `clip_norm` (None: no clipping).
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm is not None else optax.identity(),
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask=decay_mask(config)),
        scale_by_mup(config),
        optax.scale_by_learning_rate(learning_rate),
    )
