"""The arrays of an Optax state by name, so that they can be stored like weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from btlm_jax.config import BTLMConfig
from btlm_jax.model import weights


class OptimizerArrays(NamedTuple):
    """The arrays of an optimizer state.

    Attributes:
      per_weight: name -> path of a weight -> array of the weight's shape (Adam's moments, say).
      single: name -> array (a step count, say).
    """

    per_weight: dict[str, dict[weights.Path, Any]]
    single: dict[str, Any]


def split_opt_state(config: BTLMConfig, opt_state: Any) -> OptimizerArrays:
    """Returns the arrays of an optimizer state by name.

    A leaf belongs to a weight if its keys end in the weight's path, as in every Optax state.
    """
    known = weights.weights_by_path(config)
    arrays = OptimizerArrays({}, {})
    for keys, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        name, path = _split_keys(keys, known)
        if path is None:
            arrays.single[name] = leaf
        else:
            arrays.per_weight.setdefault(name, {})[path] = leaf
    return arrays


def join_opt_state(config: BTLMConfig, like: Any, arrays: OptimizerArrays) -> Any:
    """Returns an optimizer state with the structure of `like`; inverse of `split_opt_state`."""
    known = weights.weights_by_path(config)
    flat, structure = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for keys, _ in flat:
        name, path = _split_keys(keys, known)
        leaves.append(arrays.single[name] if path is None else arrays.per_weight[name][path])
    return jax.tree.unflatten(structure, leaves)


def _split_keys(keys: tuple, known: Mapping[weights.Path, Any]) -> tuple[str, weights.Path | None]:
    """Returns the name of a leaf, and the path of the weight it belongs to, if any."""
    trailing: list[str] = []
    for key in reversed(keys):
        if not isinstance(key, jax.tree_util.DictKey):
            break
        trailing.insert(0, str(key.key))
    for start in range(len(trailing)):
        path = tuple(trailing[start:])
        if path in known:
            return _format_keys(keys[: len(keys) - len(path)]), path
    return _format_keys(keys), None


def _format_keys(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="-").replace(".", "_") or "state"
