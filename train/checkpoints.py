"""Checkpoints of a training run: asynchronous, atomic, restored onto any mesh and any hosts.

The directory of each step is a checkpoint like every other (`btlm_jax.checkpoint`: item `state`,
one leaf per layer, unpadded), so that `btlm_jax.load`, `btlm export` and `btlm generate` read it
unchanged. Beside the weights lies the item `optimizer`, whose weight-shaped arrays are stored in
the same layout. The metadata holds the step, the recipe and the fingerprint of the data: the step
determines the position in the data and every random draw.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from btlm_jax.checkpoint import checkpoint, damage, metadata, stacking
from btlm_jax.checkpoint.assets import asset_hashes, warn_of_changed_assets
from btlm_jax.config import BTLMConfig
from btlm_jax.model import finite, sharding, weights
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import flatten_tree, unflatten_tree
from btlm_jax.train.distributed import any_process, barrier
from btlm_jax.train.optimizer_tree import OptimizerArrays, join_opt_state, split_opt_state
from btlm_jax.train.step import TrainState, abstract_state
from btlm_jax.utils import atomic, side_output
from btlm_jax.utils.deadline import Deadline, StalledError, run_with_deadline

logger = logging.getLogger(__name__)

_OPTIMIZER = "optimizer"
_COUNTERS = ("step", "skipped", "bad_in_a_row")
# A checkpoint has stalled when it takes longer than this; without a request to stop, ten times as
# long, as slow file systems may recover.
_STOP_SECONDS = 60.0
_SLOWEST_DISK = 50e6  # bytes per second
_PATIENCE = 10


class Checkpoints:
    """The checkpoints of one run. Every process calls every method, in the same order.

    Args:
      directory: holds one directory per step; created if missing. Incomplete checkpoints of killed
        runs are removed from it.
      keep_last: number of the newest checkpoints to keep.
      keep_every: checkpoints at multiples of this many steps are kept too; 0 for none.

    Attributes:
      directory: as above.
      stopping: returns whether the run has been asked to stop, and should not wait for long.
    """

    def __init__(self, directory: Path, *, keep_last: int, keep_every: int) -> None:
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(keep_last)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        any_policy: Any = policies.AnyPreservationPolicy(kept)
        self.directory = directory
        self._keep_last, self._keep_every = keep_last, keep_every
        self.stopping: Callable[[], bool] = lambda: False
        self._failed = self._stalled = False
        self._writing: int | None = None  # the step whose checkpoint is not known to be complete
        self._nbytes = 0  # of a checkpoint
        self._writer = ocp.training.Checkpointer(
            os.fspath(directory),
            preservation_policy=any_policy,
            cleanup_tmp_directories=True,
        )

    def save(self, config: BTLMConfig, state: TrainState, step: int, origin: Mapping[str, Any]):
        """Starts to write a checkpoint; returns once the arrays are copied.

        It first waits for a save that is still being written.

        Raises:
          FloatingPointError: the state is not finite; nothing is saved, and no checkpoint removed.
          OSError: the save before this one failed or stalled, or this one cannot be started.
        """
        if counts := nonfinite_in_state(state):
            newest = self.describe_newest(step)
            raise FloatingPointError(
                f"step {step}: not saved, because the state holds "
                f"{finite.describe_nonfinite(counts)}; {newest}"
            )
        items: dict[str, Any] = {
            metadata.ITEM: unflatten_tree(
                stacking.unstack_layers(config, flatten_tree(state.params))
            ),
            _OPTIMIZER: _optimizer_item(config, state),
        }
        origin = {**origin, "step": step}
        custom: Any = metadata.custom_metadata(
            config, origin, {}, self._asset_hashes, None, nonfinite={}
        )
        self.wait()
        self._nbytes = sum(x.nbytes for x in jax.tree.leaves(state))
        self._writing = step
        with self._explain_failure():
            self._run(
                lambda: self._writer.save_checkpointables_async(
                    step, items, force=True, custom_metadata=custom
                )
            )

    @functools.cached_property
    def _asset_hashes(self) -> dict[str, str]:
        """The SHA-256 of the run's tokenizer files, as they were at its first save."""
        return asset_hashes(self.directory / "first")

    def require_space(self, state: TrainState, steps: Iterable[int]) -> None:
        """Raises OSError if the disk lacks room for the checkpoints of `steps`, to be saved.

        One more than `keep_last` must fit: the newest is complete before the oldest is removed.
        """
        steps = list(steps)
        permanent = [s for s in steps if self._keep_every and s % self._keep_every == 0]
        temporary = len(steps) - len(permanent)
        free_slots = max(self._keep_last + 1 - len(self.steps()), 1)
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        atomic.require_space(self.directory, size * (len(permanent) + min(temporary, free_slots)))

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, ascending."""
        return [c.step for c in self._writer.checkpoints]

    def path(self, step: int) -> Path:
        """Returns the directory of a step."""
        return self.directory / str(step)

    def describe_newest(self, last_good: int) -> str:
        """Returns a clause that names the newest checkpoint, after waiting for pending saves.

        Args:
          last_good: the last step whose loss was finite. It is the loss of the weights before that
            step, so that a checkpoint of the step itself holds weights that no finite loss proves.
        """
        self.wait()
        proven = [step for step in self.steps() if step < last_good]
        doubtful = [step for step in self.steps() if step >= last_good]
        text = "there is no checkpoint from before"
        if proven:
            text = f"the newest checkpoint from before is {self.path(proven[-1])}"
        if doubtful:
            names = ", ".join(str(self.path(step)) for step in doubtful)
            text += f" ({names} may hold the cause: delete it to resume from before)"
        return text

    def wait(self) -> None:
        """Returns once everything is on disk; warns while it takes long.

        Raises:
          OSError: a save failed, or takes so long that the file system must hang.
        """
        with self._explain_failure():
            self._run(self._writer.wait)
        self._writing = None

    def close(self) -> None:
        """Waits as `wait` does, and ends the threads, unless one of them has stalled."""
        if not self._stalled:
            with self._explain_failure():
                self._run(self._writer.close)

    def _run(self, work: Callable[[], Any]) -> None:
        """Does work of the writer, which waits for the disk."""
        step = self._writing
        doing = f"writing {self.directory if step is None else self.path(step)}"
        seconds = _STOP_SECONDS + self._nbytes / _SLOWEST_DISK
        deadline = Deadline(_PATIENCE * seconds, seconds, self.stopping)
        try:
            run_with_deadline(work, doing, deadline)
        except (StalledError, KeyboardInterrupt):
            self._stalled = True
            raise

    @contextlib.contextmanager
    def _explain_failure(self) -> Iterator[None]:
        """Turns the error of a failed save into one that says where, and how to resume."""
        try:
            yield
        except damage.NOT_DAMAGE:
            raise
        except Exception as e:  # Orbax and TensorStore raise many kinds, often without the path
            if self._failed:  # it was raised before, and is raised again when the writer closes
                return
            self._failed = True
            steps = [step for step in self.steps() if step != self._writing]
            newest = f"the newest complete one is {self.path(steps[-1])}" if steps else "none is"
            raise OSError(
                f"a checkpoint could not be written to {self.directory} "
                f"({side_output.describe_error(e)}); {newest}. Free space or mend the disk, then "
                "run the same command again: it resumes from there"
            ) from e

    def restore_newest(
        self, model: BTLM, tx: optax.GradientTransformation, mesh: Mesh | None
    ) -> TrainState | None:
        """Returns the state of the newest readable checkpoint; None if there is no checkpoint.

        A checkpoint that is damaged or not finite is reported, and the previous one is read. Only
        when that succeeds is it renamed (not deleted), so that its step can be written again.

        Raises:
          ValueError: there are checkpoints but none can be read, or a readable one belongs to
            another model or optimizer.
        """
        steps = self.steps()
        unusable = []
        for step in reversed(steps):
            state, reason = None, None
            try:
                state = restore_train_state(self.path(step), model, tx, mesh)
                if counts := nonfinite_in_state(state):
                    reason = f"it holds {finite.describe_nonfinite(counts)}"
            except (damage.DamagedCheckpoint, FileNotFoundError) as e:
                reason = str(e)
            # Each process reads its own shards, so that only some of them may notice damage.
            if not any_process(reason is not None):
                self._set_aside(unusable)
                return state
            reason = reason or "another process cannot read it"
            logger.warning("checkpoint %s cannot be used: %s", self.path(step), reason)
            unusable.append(step)
        if steps:
            raise ValueError(
                f"{self.directory}: none of its checkpoints {steps} can be used (see the warnings "
                "above); restore one that can from a backup, or name another directory to start "
                "from scratch"
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Renames damaged checkpoints; their steps will be trained and saved again."""
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                path = self.path(step)
                renamed = path.with_name(f"damaged-{step}")
                if renamed.exists():  # the step was damaged, trained again, and damaged again
                    renamed = path.with_name(f"damaged-{step}-{time.time_ns()}")
                os.rename(path, renamed)
                logger.warning("%s is kept as %s", path, renamed)
        barrier("damaged checkpoints are renamed")
        self._writer.reload()


def nonfinite_in_state(state: TrainState) -> dict[str, int]:
    """Returns the number of NaN and Inf of the arrays of a state that hold any, by name.

    An optimizer state that lives in the host's memory is not read: finite gradients keep it finite.
    """
    on_device = [
        x for x in jax.tree.leaves(state.opt_state) if x.sharding.memory_kind != "pinned_host"
    ]
    whole = len(on_device) == len(jax.tree.leaves(state.opt_state))
    checked = {"weights": state.params, "optimizer": state.opt_state if whole else on_device}
    return finite.nonfinite_by_array(checked)


def restore_train_state(
    path: Path, model: BTLM, tx: optax.GradientTransformation, mesh: Mesh | None
) -> TrainState:
    """Reads a training checkpoint onto a device or mesh.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the checkpoint is damaged, or belongs to another model or optimizer.
    """
    meta = metadata.read_metadata(path)
    warn_of_changed_assets(meta)
    config = model.config
    if meta.config != config:
        raise ValueError(f"{path} is of another model: {meta.config}, expected {config}")
    pad, shardings = sharding.param_layout(config, mesh, model.rules)
    abstract = abstract_state(model, tx, mesh)
    arrays = split_opt_state(config, abstract.opt_state)
    counters = {name: getattr(abstract, name) for name in _COUNTERS}

    targets: dict[str, Any] = {**counters, **arrays.single}
    for name, by_path in arrays.per_weight.items():
        dtypes = {
            leaf.path: by_path[leaf.weight.path].dtype
            for leaf in weights.disk_leaves(config)
            if leaf.weight.path in by_path
        }
        out = {p: shardings[p] for p in by_path}
        targets[name] = checkpoint.restore_targets(config, dtypes, out, pad)
    _check_optimizer(path, targets)
    stored_dtypes = {leaf_path: leaf.dtype for leaf_path, leaf in meta.leaves.items()}
    restored = checkpoint.restore_items(
        meta.path,
        {
            metadata.ITEM: checkpoint.restore_targets(config, stored_dtypes, shardings, pad),
            _OPTIMIZER: targets,
        },
    )

    def stack(tree: Any, paths: Iterable[weights.Path]) -> dict[weights.Path, jax.Array]:
        return stacking.stack_layers(config, flatten_tree(tree), {p: shardings[p] for p in paths})

    params = stack(restored[metadata.ITEM], shardings)
    optimizer = restored[_OPTIMIZER]
    stacked = OptimizerArrays(
        {name: stack(optimizer[name], by_path) for name, by_path in arrays.per_weight.items()},
        {name: optimizer[name] for name in arrays.single},
    )
    return TrainState(
        unflatten_tree(params),
        join_opt_state(config, abstract.opt_state, stacked),
        **{name: optimizer[name] for name in _COUNTERS},
    )


def _optimizer_item(config: BTLMConfig, state: TrainState) -> dict[str, Any]:
    """Returns the optimizer state and the counters as the item `optimizer` stores them."""
    arrays = split_opt_state(config, state.opt_state)
    item = {name: getattr(state, name) for name in _COUNTERS} | arrays.single
    for name, by_path in arrays.per_weight.items():
        item[name] = unflatten_tree(stacking.unstack_layers(config, by_path))
    return item


def _check_optimizer(path: Path, targets: Mapping[str, Any]) -> None:
    """Raises ValueError if the stored optimizer state differs in structure from `targets`."""
    try:
        stored: Any = ocp.checkpointables_metadata(os.fspath(path)).metadata[_OPTIMIZER]
    except damage.NOT_DAMAGE:
        raise
    except Exception as e:
        raise damage.reading_error(epath.Path(path), e, _OPTIMIZER) from e
    if stored is None:
        raise damage.DamagedCheckpoint(
            f"{path} holds no optimizer state: start from it with model.checkpoint"
        )
    differing = sorted(set(flatten_tree(stored)) ^ set(flatten_tree(targets)))
    if differing:
        raise ValueError(
            f"{path}: its optimizer state does not fit the recipe's optimizer, at "
            f"{', '.join('/'.join(p) for p in differing[:5])}: was optimizer.name changed?"
        )
