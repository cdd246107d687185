"""Checkpoints of a training run: asynchronous, atomic, restored onto any mesh and any hosts.

Each step's directory is a checkpoint like every other (`btlm_jax.checkpoint`: item `state`, one
leaf per layer, unpadded), so that `btlm_jax.load`, `btlm export` and `btlm generate` take it as it
is. Beside the weights lies the item `optimizer`, in which whatever is shaped like weights is stored
like them. The step, the recipe and the fingerprint of the data stand in the metadata: with the
step, the position in the data and every random draw are known.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from btlm_jax.checkpoint import checkpoint, metadata, stacking
from btlm_jax.config import BTLMConfig
from btlm_jax.model import sharding, weights
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import flatten_tree, unflatten_tree
from btlm_jax.train.distributed import any_process, barrier
from btlm_jax.train.step import TrainState, abstract_state
from btlm_jax.utils import atomic

logger = logging.getLogger(__name__)

_OPTIMIZER = "optimizer"
_COUNTERS = ("step", "skipped", "bad_in_a_row")


class Checkpoints:
    """The checkpoints of one run. Every process calls every method, in the same order.

    Args:
      directory: where; made if needed. What killed runs left half-written in it is removed.
      keep_last: how many of the newest stay.
      keep_every: checkpoints at multiples of this many steps stay too; 0 for none.
    """

    def __init__(self, directory: Path, *, keep_last: int, keep_every: int) -> None:
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(keep_last)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        either: Any = policies.AnyPreservationPolicy(kept)
        self.directory = directory
        self._keep_last, self._keep_every = keep_last, keep_every
        self._writer = ocp.training.Checkpointer(
            os.fspath(directory),
            preservation_policy=either,
            cleanup_tmp_directories=True,
        )

    def save(self, config: BTLMConfig, state: TrainState, step: int, origin: Mapping[str, Any]):
        """Starts to write; returns once the arrays are copied, before they are on the disk.

        A save that is still being written is waited for. An error of an earlier one is raised here.
        """
        items: dict[str, Any] = {
            metadata.ITEM: unflatten_tree(
                stacking.unstack_layers(config, flatten_tree(state.params))
            ),
            _OPTIMIZER: _stored(config, state),
        }
        notes: Any = metadata.custom_metadata(config, {**origin, "step": step}, {}, {}, None)
        self._writer.save_checkpointables_async(step, items, force=True, custom_metadata=notes)

    def require_space(self, state: TrainState, to_come: Iterable[int]) -> None:
        """Raises OSError if the disk lacks room for the checkpoints of the steps to come.

        One more than `keep_last` must fit: the newest is complete before the oldest goes.
        """
        steps = list(to_come)
        staying = [s for s in steps if self._keep_every and s % self._keep_every == 0]
        passing = len(steps) - len(staying)
        more = max(self._keep_last + 1 - len(self.steps()), 1)
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        atomic.require_space(self.directory, size * (len(staying) + min(passing, more)))

    def steps(self) -> list[int]:
        """Of the complete checkpoints, ascending."""
        return [c.step for c in self._writer.checkpoints]

    def path(self, step: int) -> Path:
        """The directory of a step."""
        return self.directory / str(step)

    def wait(self) -> None:
        """Returns once all is on the disk. Raises what a save has raised."""
        self._writer.wait()

    def close(self) -> None:
        """Waits, and ends the threads."""
        self._writer.close()

    def restore_newest(
        self, model: BTLM, tx: optax.GradientTransformation, mesh: Mesh | None
    ) -> tuple[TrainState, metadata.CheckpointMetadata] | None:
        """The state of the newest checkpoint that can be read; None if there is none.

        A damaged one is reported and the one before is taken; only then is the damaged one renamed
        (it is not deleted), so that its step can be written again.

        Raises:
          ValueError: there are checkpoints and none can be read; or one that can be is of another
            model or optimizer.
        """
        steps = self.steps()
        unusable = []
        for step in reversed(steps):
            try:
                found, why = restore(self.path(step), model, tx, mesh), None
            except (metadata.DamagedCheckpoint, FileNotFoundError) as e:
                found, why = None, e
            # Each process reads its own parts: damage may show in one and not in another.
            if not any_process(why is not None):
                self._set_aside(unusable)
                return found
            why = why or "another process cannot read it"
            logger.warning("checkpoint %s cannot be used: %s", self.path(step), why)
            unusable.append(step)
        if steps:
            raise ValueError(
                f"{self.directory}: none of its checkpoints {steps} can be read (see the warnings "
                "above); put back one that can, or name another directory to start afresh"
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """A step that is trained again must find its name free."""
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                path = self.path(step)
                kept = path.with_name(f"damaged-{step}")
                if kept.exists():  # damaged before, trained again, and damaged again
                    kept = path.with_name(f"damaged-{step}-{time.time_ns()}")
                os.rename(path, kept)
                logger.warning("%s is kept as %s", path, kept)
        barrier("set aside")
        self._writer.reload()


def restore(
    path: Path, model: BTLM, tx: optax.GradientTransformation, mesh: Mesh | None
) -> tuple[TrainState, metadata.CheckpointMetadata]:
    """Reads a training checkpoint onto a device or mesh.

    Raises:
      FileNotFoundError, ValueError: no checkpoint, a damaged one, or one of another model or
        optimizer.
    """
    meta = metadata.read_metadata(path)
    if meta.config != model.config:
        raise ValueError(f"{path} is of another model: {meta.config}, expected {model.config}")
    config = model.config
    pad, placed = sharding.param_layout(config, mesh, model.rules)
    like = abstract_state(model, tx, mesh)
    parts = _parts(config, like.opt_state)

    stored = {leaf_path: leaf.dtype for leaf_path, leaf in meta.leaves.items()}
    wanted: dict[str, Any] = {
        metadata.ITEM: checkpoint.restore_targets(config, stored, placed, pad),
        _OPTIMIZER: {},
    }
    for name, part in parts.items():
        if isinstance(part, Mapping):
            dtypes = {
                leaf.path: part[leaf.weight.path].dtype
                for leaf in weights.disk_leaves(config)
                if leaf.weight.path in part
            }
            places = {p: placed[p] for p in part}
            wanted[_OPTIMIZER][name] = checkpoint.restore_targets(config, dtypes, places, pad)
        else:
            wanted[_OPTIMIZER][name] = part
    for name in _COUNTERS:
        wanted[_OPTIMIZER][name] = getattr(like, name)
    _check_optimizer(path, wanted[_OPTIMIZER])
    found = checkpoint.restore_items(meta.path, wanted)

    params = stacking.stack_layers(config, flatten_tree(found[metadata.ITEM]), placed)
    optimizer = found[_OPTIMIZER]
    for name, part in parts.items():
        if isinstance(part, Mapping):
            places = {p: placed[p] for p in part}
            parts[name] = stacking.stack_layers(config, flatten_tree(optimizer[name]), places)
        else:
            parts[name] = optimizer[name]
    opt_state = _from_parts(config, like.opt_state, parts)
    counters = {name: optimizer[name] for name in _COUNTERS}
    return TrainState(unflatten_tree(params), opt_state, **counters), meta


def _stored(config: BTLMConfig, state: TrainState) -> dict[str, Any]:
    """Optimizer state and counters, as the item `optimizer` holds them."""
    stored: dict[str, Any] = {name: getattr(state, name) for name in _COUNTERS}
    for name, part in _parts(config, state.opt_state).items():
        if isinstance(part, Mapping):
            stored[name] = unflatten_tree(stacking.unstack_layers(config, part))
        else:
            stored[name] = part
    return stored


def _parts(config: BTLMConfig, opt_state: Any) -> dict[str, Any]:
    """An optimizer state by name: dicts of what is shaped like weights, by path, and single arrays.

    A leaf belongs to a weight if its keys end in the weight's path, as in every Optax state.
    """
    known = weights.weights_by_path(config)
    parts: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        name, weight = _split(keys, known)
        if weight is None:
            parts[name] = leaf
        else:
            parts.setdefault(name, {})[weight] = leaf
    return parts


def _from_parts(config: BTLMConfig, like: Any, parts: Mapping[str, Any]) -> Any:
    known = weights.weights_by_path(config)
    flat, tree = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for keys, _ in flat:
        name, weight = _split(keys, known)
        leaves.append(parts[name] if weight is None else parts[name][weight])
    return jax.tree.unflatten(tree, leaves)


def _split(keys: tuple, known: Mapping[weights.Path, Any]) -> tuple[str, weights.Path | None]:
    """The name of the state a leaf belongs to, and the path of its weight if it has one."""
    trailing: list[str] = []
    for key in reversed(keys):
        if not isinstance(key, jax.tree_util.DictKey):
            break
        trailing.insert(0, str(key.key))
    for start in range(len(trailing)):
        path = tuple(trailing[start:])
        if path in known:
            return _name(keys[: len(keys) - len(path)]), path
    return _name(keys), None


def _name(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="-").replace(".", "_") or "state"


def _check_optimizer(path: Path, wanted: Mapping[str, Any]) -> None:
    """Raises ValueError if the stored optimizer state is not what the recipe's optimizer has."""
    try:
        found: Any = ocp.checkpointables_metadata(os.fspath(path)).metadata[_OPTIMIZER]
    except metadata.NOT_DAMAGE:
        raise
    except Exception as e:
        raise metadata.damaged_error(
            epath.Path(path), f"its optimizer state cannot be read: {e}"
        ) from e
    if found is None:
        raise metadata.DamagedCheckpoint(
            f"{path} holds no optimizer state: start from it with model.checkpoint"
        )
    have = {p: tuple(x.shape) for p, x in flatten_tree(found).items()}
    want = {p for p, _ in flatten_tree(wanted).items()}
    odd = ["/".join(p) for p in sorted(set(have) ^ want)]
    if odd:
        raise ValueError(
            f"{path}: its optimizer state does not fit the recipe's optimizer, at "
            f"{', '.join(odd[:5])}: was optimizer.name changed?"
        )
