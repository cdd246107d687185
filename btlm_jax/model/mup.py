"""muP (maximal update parametrization) for the optimizer.

The forward multipliers of muP are in the model, its initial scales in the table of weights. This
module adds the groups of the original's `get_mup_param_groups`: a factor on the learning rate and
one on the weight decay. With m = 1 / mup_width_scale, for AdamW:

| group | members | learning rate | weight decay |
|---|---|---|---|
| hidden | every projection kernel, an untied head | lr / m | wd (see `Decay`) |
| embedding | wte (tied head included), wpe | lr | wd |
| vector | LayerNorm scales, every bias | lr | 0 |

CompleteP (arXiv 2505.01618), transfer in depth, is turned on in the configuration: at d times the
depth of `completep_base_layers`, all weights of the layers learn at d ** (alpha - 1) times their
rate, eps becomes eps / m * d ** -alpha, and hidden matrices decay "coupled".

`adamw`, `lion` and `muon` are complete optimizers. A custom optimizer is a `chain`:

    mup.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1, mask=mup.decay_mask(config)),
        mup.scale_by_mup(config),
        optax.scale_by_learning_rate(1.2e-2),
    )

`scale_by_mup` must come after the normalization of the gradients (Adam would divide the factor out
again), and inside `schedule_free`, never around it. A transformation cannot see its neighbors in
`optax.chain`, so `chain` and `check` inspect the optimizer's state, which lists them in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from optax.contrib import scale_by_muon

from btlm_jax.config import BTLMConfig
from btlm_jax.model import weights
from btlm_jax.model.muon_matrices import matrix_view, on_any_mesh
from btlm_jax.model.mup_order import ScaleByMupState
from btlm_jax.model.mup_order import chain as chain
from btlm_jax.model.mup_order import check as check
from btlm_jax.model.params import flatten_tree, unflatten_tree
from btlm_jax.utils.dtypes import optional_dtype

# In float16 the averages of small gradients would be zero.
_MU_DTYPES = ("float32", "bfloat16")

Decay = Literal["original", "coupled", "independent"]
"""The relative decay of a hidden matrix per step, where r is its factor on the learning rate.

"original": lr * r * wd, the group's learning rate times wd. AdamW: lr * wd / m, less when wider.
"coupled": lr * wd, the original's `decoupled_wd=False`: wd is divided by the width factor in r.
"independent": lr * wd at every width and depth. It differs from "coupled" only for CompleteP with
  alpha < 1, where "coupled", the published rule, keeps the depth factor in r.

Embeddings decay by lr * wd under every rule, vectors not at all.
"""

# The normalization of the gradients; "muon_rms" is Muon scaled to a consistent RMS.
Optimizer = Literal["adam", "lion", "muon", "muon_rms"]
# Hidden matrices learn at lr * m ** -power. Adam and Lion change every entry by about lr, which
# adds up over m times as many inputs. Muon's updates have the spectral norm sqrt(max(1, out / in)),
# right at every width; scaled to a constant RMS instead, that norm grows as sqrt(m).
_WIDTH_POWER = {"adam": 1.0, "lion": 1.0, "muon": 0.0, "muon_rms": 0.5}
_ROLES = ("hidden", "embedding", "vector")


def _factors(
    config: BTLMConfig, optimizer: Optimizer, decay: Decay
) -> dict[weights.Path, tuple[float, float]]:
    """Returns the factors on learning rate and weight decay by path: all rules of the groups."""
    for name, value, known in (("optimizer", optimizer, Optimizer), ("decay", decay, Decay)):
        if value not in get_args(known):
            raise ValueError(f"{name}: found {value!r}, expected one of {get_args(known)}")
    base_layers = config.completep_base_layers
    if base_layers and decay == "original":
        raise ValueError(
            'decay: found "original" with CompleteP, expected "coupled", its rule, or "independent"'
        )
    factors = {}
    for w in weights.weight_table(config):
        width = depth = 1.0
        if w.role == "hidden":
            # Muon updates only the matrices of the layers; an untied head uses Adam.
            width = config.mup_width_scale ** (_WIDTH_POWER[optimizer] if w.stacked else 1.0)
        if base_layers and w.stacked:
            depth = (config.n_layer / base_layers) ** (config.completep_alpha - 1.0)
        divisor = {"original": 1.0, "coupled": width, "independent": width * depth}[decay]
        factors[w.path] = width * depth, 1.0 / divisor if w.decay else 0.0
    return factors


def _eps(config: BTLMConfig, eps: float) -> float:
    """Scales Adam's eps under CompleteP like the gradients, which shrink with width and depth."""
    if not config.completep_base_layers:
        return eps
    return eps * config.mup_width_scale * config.residual_scale


def multipliers(config: BTLMConfig, optimizer: Optimizer = "adam") -> dict[str, Any]:
    """Returns the learning-rate multipliers: a tree of floats like the parameters."""
    factors = _factors(config, optimizer, "coupled")  # the rates are the same under every decay
    return unflatten_tree({path: rate for path, (rate, _) in factors.items()})


def decay_mask(config: BTLMConfig) -> dict[str, Any]:
    """Returns which weights decay, for `optax.add_decayed_weights`: matrices and embeddings.

    The result is a tree of bools like the parameters.
    """
    return unflatten_tree({w.path: w.decay for w in weights.weight_table(config)})


def scale_by_mup(config: BTLMConfig, optimizer: Optimizer = "adam") -> optax.GradientTransformation:
    """Multiplies updates by `multipliers`: hidden matrices by mup_width_scale. Stateless.

    Place it after the normalization of the gradients: before Adam it would have no effect.
    `add_decayed_weights` before it gives the "original" decay, after it the "independent" one.
    Under CompleteP, scale Adam's eps yourself, as `adamw` does. Compose with `mup.chain`, which
    refuses a wrong order.

    Raises:
      ValueError: unknown optimizer; on update, a tree that does not match the configuration.
    """
    scales = flatten_tree(multipliers(config, optimizer))
    return _multiply(scales, config, ScaleByMupState())


def _multiply(factors: Mapping[weights.Path, float], config: BTLMConfig, state: Any):
    """Multiplies updates by the factor of their path; factors that are 1 or absent are skipped."""

    def scaled(path, u):
        factor = factors.get(path, 1.0)
        return u if factor == 1.0 else u * factor

    def update(updates, state, params=None):
        return _map(scaled, updates, config), state

    return optax.GradientTransformation(lambda params: state, update)


def _map(f: Callable, tree: Mapping[str, Any], config: BTLMConfig) -> dict[str, Any]:
    """Maps f(path, leaf) over a tree like the parameters; MaskedNode of optax stays in place."""
    flat = flatten_tree(tree)
    differing = set(flat) ^ set(weights.weights_by_path(config))
    if names := sorted("/".join(path) for path in differing):
        raise ValueError(f"mup: the weights do not match the configuration at {names}")
    return unflatten_tree({p: jax.tree.map(partial(f, p), x) for p, x in flat.items()})


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    config: BTLMConfig,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    decay: Decay = "original",
    clip_norm: float | None = 1.0,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW in the original's muP groups, with the settings that trained BTLM-3B-8K.

    It equals torch.optim.AdamW over `get_mup_param_groups(lr, weight_decay)`, after clipping the
    global gradient norm to `clip_norm` (None: no clipping).

    Args:
      learning_rate: a number or an optax schedule, for embeddings and vectors; hidden matrices get
        it times mup_width_scale.
      config: configuration of the model.
      b1: decay rate of the average of the gradients.
      b2: decay rate of the average of their squares.
      eps: Adam's epsilon; under CompleteP, its value at the base width and depth.
      weight_decay: weight decay of matrices and embeddings.
      decay: how hidden matrices apply it (`Decay`).
      clip_norm: largest global norm of the gradients; None for no clipping.
      mu_dtype: dtype of the first moment, float32 or bfloat16; None is the dtype of the weights.

    Raises:
      ValueError: unknown decay, or "original" with CompleteP; another `mu_dtype`; on update,
        weights that do not match the configuration.
    """
    mu_dtype = optional_dtype(mu_dtype, "mu_dtype", _MU_DTYPES)
    normalize = optax.scale_by_adam(b1, b2, _eps(config, eps), mu_dtype=mu_dtype)
    rate = optax.scale_by_learning_rate(learning_rate)
    factors = _factors(config, "adam", decay)
    return _optimizer(config, clip_norm, normalize, weight_decay, factors, rate)


def lion(
    learning_rate: optax.ScalarOrSchedule,
    config: BTLMConfig,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.1,
    decay: Decay = "original",
    clip_norm: float | None = 1.0,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns Lion (optax.lion) in the muP groups; arguments and errors are as for `adamw`."""
    mu_dtype = optional_dtype(mu_dtype, "mu_dtype", _MU_DTYPES)
    normalize = optax.scale_by_lion(b1, b2, mu_dtype=mu_dtype)
    rate = optax.scale_by_learning_rate(learning_rate)
    factors = _factors(config, "lion", decay)
    return _optimizer(config, clip_norm, normalize, weight_decay, factors, rate)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    config: BTLMConfig,
    *,
    beta: float = 0.95,
    consistent_rms: float | None = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    decay: Decay = "original",
    clip_norm: float | None = 1.0,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns Muon for the matrices of the layers and Adam for the rest, as optax.contrib.muon.

    Every layer is a separate matrix, and so are its q, k and v, [D, H·K] each. Arguments that are
    not listed are as for `adamw`.

    Args:
      learning_rate: learning rate of matrices, the same at every width; with `consistent_rms` it is
        the rate at the base width and becomes lr / sqrt(m).
      beta: Muon's momentum. Muon and Adam use Nesterov momentum, as in optax.
      consistent_rms: scale updates to this RMS instead of the spectral norm sqrt(max(1, out / in));
        at 0.2 Muon can share Adam's learning rate (arXiv 2502.16982).
      adam_learning_rate: learning rate of the rest; None is `learning_rate`.
    """
    mu_dtype = optional_dtype(mu_dtype, "mu_dtype", _MU_DTYPES)
    rms = consistent_rms is not None
    eps = _eps(config, eps)
    table = weights.weight_table(config)
    views = {w.path: matrix_view(w, rms) for w in table if w.role == "hidden" and w.stacked}
    labels = unflatten_tree({w.path: "muon" if w.path in views else "adam" for w in table})

    def axes(tree):
        return _map(lambda path, _: views[path][0], tree, config)

    momentum = scale_by_muon(beta=beta, eps=eps, mu_dtype=mu_dtype, weight_dimension_numbers=axes)
    matrices = optax.chain(
        on_any_mesh(momentum),
        _multiply(
            {path: factor for path, (_, factor) in views.items()}, config, optax.EmptyState()
        ),
        optax.scale(consistent_rms if rms else 1.0),
    )
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype, nesterov=True)
    normalize = optax.partition({"muon": matrices, "adam": adam}, labels)
    rate = optax.scale_by_learning_rate(learning_rate)
    if adam_learning_rate is not None:
        other = optax.scale_by_learning_rate(adam_learning_rate)
        rate = optax.partition({"muon": rate, "adam": other}, labels)
    factors = _factors(config, "muon_rms" if rms else "muon", decay)
    return _optimizer(config, clip_norm, normalize, weight_decay, factors, rate)


def _optimizer(config, clip_norm, normalize, weight_decay, factors, rate):
    """Chains the steps of every optimizer: a group's learning rate also multiplies its decay."""
    decays = []
    for factor in sorted({decay for _, decay in factors.values()} - {0.0}):
        mask = unflatten_tree({path: decay == factor for path, (_, decay) in factors.items()})
        decays.append(optax.add_decayed_weights(weight_decay * factor, mask))
    return chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        normalize,
        *decays,
        _multiply({path: r for path, (r, _) in factors.items()}, config, ScaleByMupState()),
        rate,
    )


class ParamGroup(NamedTuple):
    """One parameter group of the original's optimizer."""

    name: weights.Role
    lr: float
    weight_decay: float
    params: tuple[str, ...]  # Hugging Face names
    count: int  # trainable parameters


def param_groups(
    config: BTLMConfig,
    learning_rate: float,
    weight_decay: float,
    decay: Decay = "original",
    optimizer: Optimizer = "adam",
    adam_learning_rate: float | None = None,
) -> list[ParamGroup]:
    """Returns the groups of an optimizer; by default those of `get_mup_param_groups`.

    The decay "original" is the original's default, "coupled" its `decoupled_wd=False`. CompleteP
    with alpha < 1 splits the vectors; Muon splits an untied head from "hidden".

    Args:
      config: configuration of the model.
      learning_rate: as for `adamw`.
      weight_decay: as for `adamw`.
      decay: as for `adamw`.
      optimizer: the normalization of the gradients.
      adam_learning_rate: as for `muon`: the rate of all weights but the matrices of the layers.

    Raises:
      ValueError: as `adamw`.
    """
    rest = learning_rate if adam_learning_rate is None else adam_learning_rate
    factors = _factors(config, optimizer, decay)
    members: dict[tuple, list[weights.DiskLeaf]] = {}
    for leaf in weights.disk_leaves(config):
        matrix = leaf.weight.role == "hidden" and leaf.weight.stacked
        rate = learning_rate if matrix else rest
        members.setdefault((leaf.weight.role, rate, *factors[leaf.weight.path]), []).append(leaf)
    groups = []
    for (role, rate, rate_factor, decay_factor), leaves in members.items():
        names = tuple(leaf.hf_name for leaf in leaves)
        count = sum(math.prod(leaf.weight.shape) for leaf in leaves)
        lr, wd = rate * rate_factor, weight_decay * decay_factor
        groups.append(ParamGroup(role, lr, wd, names, count))
    return sorted(groups, key=lambda group: _ROLES.index(group.name))


def format_groups(groups: list[ParamGroup]) -> str:
    """Formats the groups as a table, printed at the start of training.

    The last column is the relative decay of a weight per step: lr * weight_decay.
    """
    lines = ["group      arrays     parameters          lr  weight decay   per step"]
    lines += [
        f"{g.name:<10}{len(g.params):>7}{g.count:>15,}{g.lr:>12.4g}{g.weight_decay:>14.4g}"
        f"{g.lr * g.weight_decay:>11.3g}"
        for g in groups
    ]
    return "\n".join(lines)


def group_norms(tree: Mapping[str, Any], config: BTLMConfig) -> dict[str, jax.Array]:
    """Returns the L2 norm of gradients or updates by muP group: fp32 scalars, replicated.

    Padding is zero and masked leaves are left out, so that neither counts.

    Raises:
      ValueError: the tree does not match the configuration.
    """
    fp32 = flatten_tree(_map(lambda _, x: x.astype(jnp.float32), tree, config))
    return {
        role: optax.tree.norm(
            [fp32[w.path] for w in weights.weight_table(config) if w.role == role]
        )
        for role in _ROLES
    }
