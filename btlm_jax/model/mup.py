"""muP (maximal update parametrization) for the optimizer.

The forward multipliers of muP live in the model and its initial scales in the table of weights.
What is left are the groups of the original's `get_mup_param_groups`: a factor on the learning rate
and one on the weight decay. With m = 1 / mup_width_scale, for AdamW:

| group | members | learning rate | weight decay |
|---|---|---|---|
| hidden | every projection kernel, an untied head | lr / m | wd (see `Decay`) |
| embedding | wte (tied head included), wpe | lr | wd |
| vector | LayerNorm scales, every bias | lr | 0 |

CompleteP (arXiv 2505.01618), transfer in depth, is a matter of the configuration: at d times the
depth of `completep_base_layers`, everything in a layer learns at d ** (alpha - 1) times its rate,
eps becomes eps / m * d ** -alpha, and hidden matrices decay "coupled".

`adamw`, `lion` and `muon` have everything in its place. In a chain of one's own, `scale_by_mup`
must come after what normalizes the gradients (Adam would divide the factor out again), and within
`schedule_free`, never around it. A transformation cannot see its neighbours in `optax.chain`; so
`chain` and `check` look at the optimizer's state, which lists them in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from optax.contrib import MuonDimensionNumbers, ScheduleFreeState, scale_by_muon

from btlm_jax.config import BTLMConfig
from btlm_jax.model import weights
from btlm_jax.model.params import flatten_tree, unflatten_tree

Decay = Literal["original", "coupled", "independent"]
"""What a hidden matrix loses per step, relative to itself; r is its factor on the learning rate.

"original": lr * r * wd, the group's learning rate times wd. AdamW: lr * wd / m, less when wider.
"coupled": lr * wd, the original's `decoupled_wd=False`: its wd is divided by the width's part of r.
"independent": lr * wd at every width and depth. It differs from "coupled" only for CompleteP with
  alpha < 1, where "coupled", the published rule, keeps the depth's part of r.

Embeddings lose lr * wd under each, vectors nothing.
"""

# What normalizes the gradients; "muon_rms" is Muon scaled to a consistent RMS.
Optimizer = Literal["adam", "lion", "muon", "muon_rms"]
# Hidden matrices learn at lr * m ** -power. Adam and Lion move every entry by about lr, which adds
# up over m times as many inputs. Muon's updates have the spectral norm sqrt(max(1, out / in)),
# right at every width; scaled to a constant RMS instead, that norm grows as sqrt(m).
_WIDTH_POWER = {"adam": 1.0, "lion": 1.0, "muon": 0.0, "muon_rms": 0.5}
_ROLES = ("hidden", "embedding", "vector")


def _factors(
    config: BTLMConfig, optimizer: Optimizer, decay: Decay
) -> dict[weights.Path, tuple[float, float]]:
    """The factors on learning rate and weight decay, by path. Every rule of the groups is here."""
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
            # Muon is for the matrices of layers: an untied head stays with Adam.
            width = config.mup_width_scale ** (_WIDTH_POWER[optimizer] if w.stacked else 1.0)
        if base_layers and w.stacked:
            depth = (config.n_layer / base_layers) ** (config.completep_alpha - 1.0)
        divisor = {"original": 1.0, "coupled": width, "independent": width * depth}[decay]
        factors[w.path] = width * depth, 1.0 / divisor if w.decay else 0.0
    return factors


def _eps(config: BTLMConfig, eps: float) -> float:
    """Under CompleteP it follows the size of the gradients, which falls with width and depth."""
    if not config.completep_base_layers:
        return eps
    return eps * config.mup_width_scale * config.residual_scale


def multipliers(config: BTLMConfig, optimizer: Optimizer = "adam") -> dict[str, Any]:
    """The learning-rate multiplier of every weight: a tree of floats like the parameters."""
    factors = _factors(config, optimizer, "coupled")  # any decay: only rates are used
    return unflatten_tree({path: rate for path, (rate, _) in factors.items()})


def decay_mask(config: BTLMConfig) -> dict[str, Any]:
    """Which weights decay: a tree of bools like the parameters (matrices and embeddings do)."""
    return unflatten_tree({w.path: w.decay for w in weights.weight_table(config)})


class ScaleByMupState(NamedTuple):
    """Holds nothing; it marks the place of `scale_by_mup` in the state of an optimizer."""


def scale_by_mup(config: BTLMConfig, optimizer: Optimizer = "adam") -> optax.GradientTransformation:
    """Multiplies updates by `multipliers`: hidden matrices by mup_width_scale. Stateless.

    It belongs after what normalizes the gradients: before Adam it would change nothing.
    `add_decayed_weights` before it gives the "original" decay, after it the "independent" one.
    Under CompleteP, Adam's eps is yours to scale, as `adamw` does. Compose with `mup.chain`, which
    refuses a wrong order.

    Raises:
      ValueError: unknown optimizer; on update, a tree that is not of this configuration's weights.
    """
    scales = flatten_tree(multipliers(config, optimizer))
    return _multiply(scales, config, ScaleByMupState())


def _multiply(factors: Mapping[weights.Path, float], config: BTLMConfig, state: Any):
    """Multiplies updates by the factor of their path; one that is 1 or absent changes no bit."""

    def times(path, u):
        factor = factors.get(path, 1.0)
        return u if factor == 1.0 else u * factor

    def update(updates, state, params=None):
        return _map(times, updates, config), state

    return optax.GradientTransformation(lambda params: state, update)


def _map(f: Callable, tree: Mapping[str, Any], config: BTLMConfig) -> dict[str, Any]:
    """f(path, leaf) over a tree like the parameters; what optax masked (MaskedNode) stays so."""
    flat = flatten_tree(tree)
    if odd := sorted("/".join(p) for p in set(flat) ^ set(weights.weights_by_path(config))):
        raise ValueError(f"mup: the weights do not match the configuration at {odd}")
    return unflatten_tree({p: jax.tree.map(partial(f, p), x) for p, x in flat.items()})


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` whose `init` refuses a misplaced `scale_by_mup` (ValueError; see `check`)."""
    inner = optax.chain(*transforms)

    def init(params):
        state = inner.init(params)
        check(state)
        return state

    return optax.GradientTransformationExtraArgs(init, inner.update)


def check(state: Any) -> None:
    """Checks where `scale_by_mup` stands in any optimizer, by the state that its `init` returned.

    It is wrong before what keeps statistics of its updates (but for momentum, which is linear),
    after `schedule_free`, and a second time in one chain. What normalizes without a state
    (`optax.scale_by_sign`) leaves no trace and goes unseen.

    Raises:
      ValueError: it is misplaced.
    """
    # A chain's state is a bare tuple, in order; named tuples and dicts are parts and branches.
    if type(state) is tuple:
        marked = [i for i, part in enumerate(state) if _holds(part, ScaleByMupState)]
        before, after = (state[: marked[0]], state[marked[0] + 1 :]) if marked else ((), ())
        linear = (optax.TraceState, optax.EmaState)
        statistics = jax.tree.leaves(after, is_leaf=lambda x: isinstance(x, linear))
        wrong = {
            "twice": len(marked) > 1,
            "after schedule_free": _holds(before, ScheduleFreeState),
            "before what normalizes": any(getattr(x, "ndim", 0) for x in statistics),
        }
        for where in (name for name, found in wrong.items() if found):
            raise ValueError(
                f"scale_by_mup: found {where}, expected once, after what normalizes the gradients "
                "and within schedule_free (the optimizers of btlm_jax.mup contain it)"
            )
    if isinstance(state, tuple | list | Mapping):
        for part in state.values() if isinstance(state, Mapping) else state:
            check(part)


def _holds(state: Any, kind: type) -> bool:
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    return any(isinstance(x, kind) for x in nodes)


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
    """AdamW in the original's muP groups. The defaults are those that trained BTLM-3B-8K.

    Equal to torch.optim.AdamW over `get_mup_param_groups(lr, weight_decay)`, after clipping the
    global gradient norm to `clip_norm` (None: no clipping).

    Args:
      learning_rate: of embeddings and vectors, a number or an optax schedule.
      config: of the model whose weights are trained.
      b1, b2: decay per step of the averages of gradients and of their squares.
      weight_decay, decay: of matrices and embeddings, and what hidden ones make of it (`Decay`).
      eps: Adam's; under CompleteP, at the base width and depth.
      mu_dtype: of the first moment; None is the dtype of the weights.

    Raises:
      ValueError: unknown decay, "original" with CompleteP; on update, weights of another config.
    """
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
    """Lion (optax.lion) in the muP groups; arguments and errors are those of `adamw`."""
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
    """Muon for the matrices of the layers, Adam for the rest, as in optax.contrib.muon.

    Every layer is a matrix of its own, and so are its q, k and v, [D, H·K] each. What is not listed
    is as in `adamw`.

    Args:
      learning_rate: of matrices, the same at every width; with `consistent_rms` it is that of the
        base width and becomes lr / sqrt(m).
      beta: Muon's momentum. Both parts are Nesterov's, as in optax.
      consistent_rms: scale updates to this RMS, not to the spectral norm sqrt(max(1, out / in)); at
        0.2 Muon can share Adam's learning rate (arXiv 2502.16982).
      adam_learning_rate: of the rest; None is `learning_rate`.
    """
    rms = consistent_rms is not None
    eps = _eps(config, eps)
    table = weights.weight_table(config)
    seen = {w.path: _matrix(w, rms) for w in table if w.role == "hidden" and w.stacked}
    labels = unflatten_tree({w.path: "muon" if w.path in seen else "adam" for w in table})

    def axes(tree):
        return _map(lambda path, _: seen[path][0], tree, config)

    momentum = scale_by_muon(beta=beta, eps=eps, mu_dtype=mu_dtype, weight_dimension_numbers=axes)
    matrices = optax.chain(
        _on_any_mesh(momentum),
        _multiply({path: factor for path, (_, factor) in seen.items()}, config, optax.EmptyState()),
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
    """The order of every optimizer here. In it a group's learning rate multiplies its decay."""
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


def _matrix(w: weights.Weight, rms: bool) -> tuple[MuonDimensionNumbers, float]:
    """How Muon sees a stacked kernel [L, ...]: its axes, and its factor by shape.

    Axes that are neither inputs nor outputs are batches: L and qkv. The factor is optax's, in fp32,
    but for the true shape: `scale_by_shape` would count the zero padding of a mesh.
    """
    split = next(i for i in range(len(w.shape)) if math.prod(w.shape[:i]) == w.hf_shape[0])
    outputs = [i for i in range(split, len(w.shape)) if w.axes[i] != "qkv"]
    n_in, n_out = w.hf_shape[0], math.prod(w.shape[i] for i in outputs)
    factor = np.sqrt(np.float32(max(n_in, n_out) if rms else max(1, n_out / n_in)))
    inputs = tuple(range(1, split + 1))
    return MuonDimensionNumbers(inputs, tuple(i + 1 for i in outputs)), float(factor)


def _on_any_mesh(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets XLA choose the shardings within `tx.update`; results have those of the arguments.

    On a mesh of explicit type, optax's Muon would have to say how every product is sharded.
    """

    def update(updates, state, params=None):
        mesh = next((jax.typeof(x).sharding.mesh for x in jax.tree.leaves(updates)), None)
        if mesh is None or mesh.empty:
            return tx.update(updates, state)
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        with jax.sharding.use_abstract_mesh(mesh):
            free: Any = jax.sharding.auto_axes(tx.update, axes=mesh.axis_names, out_sharding=specs)
            return free(updates, state)

    return optax.GradientTransformation(tx.init, update)


class ParamGroup(NamedTuple):
    """One group, as the original's optimizer has it."""

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
    """The groups of the original's `get_mup_param_groups`, by default; those of any optimizer here.

    "original" is the original's default, "coupled" its `decoupled_wd=False`. CompleteP with
    alpha < 1 splits the vectors, Muon an untied head from "hidden". Errors are those of `adamw`.

    Args:
      adam_learning_rate: as of `muon`, whose matrices alone then learn at `learning_rate`.
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
    """The groups as a small table, to print at the start of training.

    Its last column is what a weight loses per step, relative to itself: lr * weight_decay.
    """
    lines = ["group      arrays     parameters          lr  weight decay   per step"]
    lines += [
        f"{g.name:<10}{len(g.params):>7}{g.count:>15,}{g.lr:>12.4g}{g.weight_decay:>14.4g}"
        f"{g.lr * g.weight_decay:>11.3g}"
        for g in groups
    ]
    return "\n".join(lines)


def group_norms(tree: Mapping[str, Any], config: BTLMConfig) -> dict[str, jax.Array]:
    """The L2 norm of gradients or updates per muP group: fp32 scalars, replicated on a mesh.

    Padding is zero in both and masked leaves are left out, so neither counts.

    Raises:
      ValueError: the tree is not of this configuration's weights.
    """
    fp32 = flatten_tree(_map(lambda _, x: x.astype(jnp.float32), tree, config))
    return {
        role: optax.tree.norm(
            [fp32[w.path] for w in weights.weight_table(config) if w.role == role]
        )
        for role in _ROLES
    }
