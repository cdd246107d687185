"""The run directory: it belongs to one run, and all processes of the run share it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from btlm_jax.checkpoint import trained_documents
from btlm_jax.checkpoint.assets import asset_files
from btlm_jax.train.distributed import gather_text, raise_together
from btlm_jax.train.feed import TrainingData
from btlm_jax.utils import atomic

RECIPE_FILE = "recipe.json"

_PATH_KEYS = ("train", "held_out")  # of section `data`; their contents are compared by fingerprint
_VISIBLE_WITHIN = 60.0  # seconds for which network file systems cache that a file does not exist


def claim_run_directory(directory: Path, identity: Mapping[str, Any], data: TrainingData) -> None:
    """Creates the run directory, or checks that it belongs to the same run.

    Every process calls this.

    Args:
      directory: the run directory.
      identity: "recipe" and "data" (fingerprints of the sources), as written to `RECIPE_FILE`.
      data: the data; the run keeps a copy of its tokenizer.

    Raises:
      ValueError: the directory belongs to another run, or another process was started with another
        recipe or other data, or does not see the same directory.
      FileExistsError: the directory exists and is not a run directory.
      OSError: the directory cannot be written.
    """
    held_out = None if data.held_out is None else data.held_out.fingerprint
    _require_same_identity({**identity, "held_out": held_out})
    file = directory / RECIPE_FILE
    with raise_together():
        if file.exists():
            existing = json.loads(file.read_text())
            if not trained_documents.read_trained_documents(existing).first_tokens:
                raise ValueError(
                    f"{directory} was started by a btlm-jax that left the first token of each "
                    "document out of the loss under data.mask_documents; now the EOS before it "
                    "predicts it. Finish the run with that version, or name another directory and "
                    f"start from this run's weights: --set model.checkpoint={directory}"
                )
            changed = sorted(_differences(_unchangeable(existing), _unchangeable(identity)))
            if changed:
                raise ValueError(
                    f"{directory} belongs to a run that differs in {', '.join(changed)}; name "
                    "another directory (model.checkpoint can start from this run's weights)"
                )
        elif directory.exists() and any(directory.iterdir()):
            raise FileExistsError(f"{directory} exists and is not a run: name another directory")
    with raise_together():
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            atomic.write_text(epath.Path(file), json.dumps(identity, indent=2))
            folder = directory / "tokenizer"
            folder.mkdir(exist_ok=True)
            for asset in asset_files(data.sources[0].tokens.directory):
                atomic.write_bytes(epath.Path(folder / asset.name), asset.read_bytes())
    _require_shared(file)


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


def _require_shared(file: Path) -> None:
    """Raises ValueError in every process if one does not see the file that process 0 wrote."""

    def modification_time() -> int:
        return int(file.stat().st_mtime) if file.exists() else 0

    expected = int(gather_text(str(modification_time()))[0])
    with raise_together():
        deadline = time.monotonic() + _VISIBLE_WITHIN
        while modification_time() != expected:
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
