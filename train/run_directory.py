"""The run directory belongs to one run, and every process of it sees the same one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from btlm_jax.checkpoint.assets import asset_files
from btlm_jax.train.distributed import gather_text, raise_together
from btlm_jax.utils import atomic

RECIPE_FILE = "recipe.json"

_PATHS = ("train", "held_out")  # of data; what they hold is compared by fingerprint
_VISIBLE_WITHIN = 60.0  # seconds; network file systems remember for as long what was not there


def claim_run_directory(
    directory: Path, identity: Mapping[str, Any], held_out: str | None, tokens: Path
) -> None:
    """Makes the run directory, or checks that it is of the same run. Every process calls it.

    Args:
      directory: of the run.
      identity: "recipe" and "data" (fingerprints), as they are written to `RECIPE_FILE`.
      held_out: the fingerprint of the held-out data.
      tokens: the directory whose tokenizer the run keeps.

    Raises:
      ValueError: the directory is of another run, another process was started with another recipe
        or other data, or sees another directory.
      FileExistsError: it is something else.
      OSError: it cannot be written.
    """
    _require_same(identity, held_out)
    file = directory / RECIPE_FILE
    with raise_together():
        if file.exists():
            before = json.loads(file.read_text())
            changed = sorted(_differences(_fixed(before), _fixed(identity)))
            if changed:
                raise ValueError(
                    f"{directory} is of a run that differs in {', '.join(changed)}; name another "
                    "directory (model.checkpoint can start from this run's weights)"
                )
        elif directory.exists() and any(directory.iterdir()):
            raise FileExistsError(f"{directory} exists and is not a run: name another directory")
    with raise_together():
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            atomic.write_text(epath.Path(file), json.dumps(identity, indent=2))
            (directory / "tokenizer").mkdir(exist_ok=True)
            for asset in asset_files(tokens):
                atomic.write_bytes(
                    epath.Path(directory / "tokenizer" / asset.name), asset.read_bytes()
                )
    _require_shared(file)


def _require_same(identity: Mapping[str, Any], held_out: str | None) -> None:
    """Raises ValueError, in every process, if one was started otherwise than process 0."""
    seen = json.loads(json.dumps({**identity, "held_out": held_out}))
    for name in _PATHS:
        seen["recipe"]["data"].pop(name, None)
    first, *others = [json.loads(text) for text in gather_text(json.dumps(seen))]
    for number, other in enumerate(others, start=1):
        if changed := sorted(_differences(first, other)):
            raise ValueError(
                f"process {number} was started otherwise than process 0: {', '.join(changed)}; "
                "start all with the same recipe, options and data"
            )


def _require_shared(file: Path) -> None:
    """Raises ValueError, in every process, if one does not see what process 0 has just written."""

    def written() -> int:
        return int(file.stat().st_mtime) if file.exists() else 0

    expected = int(gather_text(str(written()))[0])
    with raise_together():
        deadline = time.monotonic() + _VISIBLE_WITHIN
        while written() != expected:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{file.parent} is not the directory that process 0 has made; all processes "
                    "need one that they share"
                )
            time.sleep(0.2)


def _fixed(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What must not change when a run goes on; mesh, intervals and microbatches may."""
    recipe = json.loads(json.dumps(identity["recipe"]))
    recipe.pop("mesh", None)
    recipe["run"] = {"seed": recipe["run"]["seed"]}
    for phase in recipe["phases"]:
        phase.pop("microbatch", None)
    for name in (*_PATHS, "held_out_tokens"):  # the fingerprint counts, not the path
        recipe["data"].pop(name, None)
    return {**recipe, "data_fingerprint": identity["data"]}


def _differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {*a, *b}:
            yield from _differences(a.get(key), b.get(key), f"{where}.{key}" if where else key)
    elif a != b:
        yield f"{where} ({a} -> {b})"
