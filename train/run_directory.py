"""The run directory: it belongs to one run, and all processes of the run share it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from btlm_jax.checkpoint import trained_documents
from btlm_jax.checkpoint.assets import asset_files
from btlm_jax.train.distributed import gather_text, raise_together
from btlm_jax.train.feed import TrainingData
from btlm_jax.train.metrics import METRICS_FILE, read_metrics
from btlm_jax.utils import atomic, json_files

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.json"
LOCK_FILE = "run.lock"
_RESTORE = (
    "restore it from a backup, or name another directory (model.checkpoint can start from this "
    "run's weights)"
)

_PATH_KEYS = ("train", "held_out")  # of section `data`; their contents are compared by fingerprint
_VISIBLE_WITHIN = 60.0  # seconds for which network file systems cache that a file does not exist


class RunDirectory:
    """The directory of a run, held against other runs while the `with` block is open.

    Entering it creates the directory and locks it; nothing else is written before `claim`. If the
    run is refused before that, a directory that did not exist is removed again. A killed process
    leaves no lock. Every process of the run calls every method; process 0 holds the lock.

    Args:
      directory: the run directory.
      identity: "recipe" and "data" (fingerprints of the sources), as written to `RECIPE_FILE`.
      data: the data; the run keeps a copy of its tokenizer.

    Raises:
      ValueError: the directory belongs to another run, or another process was started with another
        recipe or other data, or does not see the same directory.
      FileExistsError: the directory exists and is not a run directory, or a run is using it.
      OSError: the directory cannot be written.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], data: TrainingData) -> None:
        self.path, self._identity, self._data = directory, identity, data
        self._recipe = directory / RECIPE_FILE
        self._exit = contextlib.ExitStack()
        held_out = None if data.held_out is None else data.held_out.fingerprint
        _require_same_identity({**identity, "held_out": held_out})
        with raise_together():
            self._require_free()

    def __enter__(self) -> RunDirectory:
        owner = ""
        with contextlib.ExitStack() as undo:
            undo.callback(self._exit.close)
            with raise_together():
                if jax.process_index() == 0:
                    self.path.mkdir(parents=True, exist_ok=True)
                    owner = self._lock()
                    self._exit.callback(self._remove_if_unclaimed)  # while the lock is held
                    self._require_free()  # another run may have come first
            _require_shared(self.path / LOCK_FILE, owner)
            undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._exit.close()

    def claim(self) -> None:
        """Writes the recipe and the tokenizer: the directory belongs to this run from now on."""
        with raise_together():
            if jax.process_index() == 0:
                if self._recipe.exists() and self._changes():
                    logger.warning("%s: its run took no step, and is replaced", self.path)
                text = json.dumps(self._identity, indent=2)
                atomic.write_text(epath.Path(self._recipe), text)
                folder = self.path / "tokenizer"
                folder.mkdir(exist_ok=True)
                for asset in asset_files(self._data.sources[0].tokens.directory):
                    atomic.write_bytes(epath.Path(folder / asset.name), asset.read_bytes())

    def _require_free(self) -> None:
        """Raises an error if the directory belongs to something else."""
        if (checkpoints := self.path / "checkpoints").is_file():
            raise FileExistsError(
                f"{checkpoints} is a file, expected the directory of the checkpoints: restore it, "
                "or name another run directory"
            )
        if self._recipe.exists():
            begun, changes = _has_begun(self.path), self._changes()
            if begun and not self._trains_first_tokens():
                raise ValueError(
                    f"{self.path} was started by a btlm-jax that left the first token of each "
                    "document out of the loss under data.mask_documents; now the EOS before it "
                    "predicts it. Finish the run with that version, or name another directory and "
                    f"start from this run's weights: --set model.checkpoint={self.path}"
                )
            if begun and changes:
                raise ValueError(
                    f"{self.path} belongs to a run that differs in {', '.join(changes)}; name "
                    "another directory (model.checkpoint can start from this run's weights)"
                )
        elif self.path.exists():
            if not self.path.is_dir():
                raise FileExistsError(f"{self.path} is a file: name another directory")
            # A run that was killed before its first step leaves no more than these.
            names = {p.name for p in self.path.iterdir()} - {LOCK_FILE, "checkpoints"}
            if names or _has_begun(self.path):
                raise FileExistsError(
                    f"{self.path} exists and is not a run: name another directory"
                )

    def _trains_first_tokens(self) -> bool:
        """Returns whether the run of the directory counts the first tokens of documents."""
        existing = self._existing()
        try:
            return trained_documents.read_trained_documents(existing).first_tokens
        except (AttributeError, ValueError) as e:
            raise ValueError(f"{self._recipe} is no recipe of a run ({e}): {_RESTORE}") from None

    def _existing(self) -> dict[str, Any]:
        """Returns the identity of the run that the directory belongs to."""
        return json_files.read_object(self._recipe, _RESTORE)

    def _changes(self) -> list[str]:
        """Returns the differences from the recipe and data that the directory belongs to."""
        try:
            existing = _unchangeable(self._existing())
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{self._recipe} is no recipe of a run: {_RESTORE}") from None
        return sorted(_differences(existing, _unchangeable(self._identity)))

    def _lock(self) -> str:
        """Locks the directory; returns what was written to the lock file."""
        path = self.path / LOCK_FILE
        file = self._exit.enter_context(path.open("a+", encoding="utf-8"))
        try:
            atomic.lock_file(file, self.path)
        except FileExistsError:
            file.seek(0)
            raise FileExistsError(
                f"{self.path} is in use by {_describe_owner(file.read())}: wait for its end, stop "
                "it, or name another directory"
            ) from None
        owner = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
                "id": uuid.uuid4().hex,
            }
        )
        file.truncate(0)
        file.write(owner)
        file.flush()
        return owner

    def _remove_if_unclaimed(self) -> None:
        """Removes what `__enter__` created, unless the directory belongs to a run by now."""
        if self._recipe.exists():
            return
        with contextlib.suppress(OSError):  # it is not empty: others have written to it
            (self.path / LOCK_FILE).unlink(missing_ok=True)
            if (self.path / "checkpoints").exists():
                (self.path / "checkpoints").rmdir()
            self.path.rmdir()


def _has_begun(directory: Path) -> bool:
    """Returns whether the run of a directory has taken a step."""
    folder = directory / "checkpoints"
    saved = folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())
    return saved or bool(read_metrics(directory / METRICS_FILE))


def _describe_owner(text: str) -> str:
    """Returns who holds a lock, from what they wrote to it."""
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
    except (ValueError, KeyError, TypeError):
        return "another run"


def _require_same_identity(identity: Mapping[str, Any]) -> None:
    """Raises ValueError in every process if one was started differently from process 0."""
    local = json.loads(json.dumps(identity))
    for key in _PATH_KEYS:
        local["recipe"]["data"].pop(key, None)
    first, *others = [json.loads(text) for text in gather_text(json.dumps(local))]
    for number, other in enumerate(others, start=1):
        if changed := sorted(_differences(first, other)):
            raise ValueError(
                f"process {number} was started differently from process 0: {', '.join(changed)}; "
                "start all with the same recipe, options and data"
            )


def _require_shared(file: Path, written: str) -> None:
    """Raises ValueError in every process if one does not see what process 0 wrote to the file."""
    expected = gather_text(written)[0]
    with raise_together():
        deadline = time.monotonic() + _VISIBLE_WITHIN
        while not file.exists() or file.read_text() != expected:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{file.parent} is not the directory that process 0 created; all processes "
                    "need one that they share"
                )
            time.sleep(0.2)


def _unchangeable(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that must stay the same when a run is resumed.

    Mesh, intervals and microbatches may change, and so may the paths of the data.
    """
    recipe = json.loads(json.dumps(identity["recipe"]))
    recipe.pop("mesh", None)
    recipe["run"] = {"seed": recipe["run"]["seed"]}
    for phase in recipe["phases"]:
        phase.pop("microbatch", None)
    for key in (*_PATH_KEYS, "held_out_tokens"):
        recipe["data"].pop(key, None)
    return {**recipe, "data_fingerprint": identity["data"]}


def _differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Yields "path (a -> b)" for every value that differs."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {*a, *b}:
            yield from _differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        yield f"{path} ({a} -> {b})"
