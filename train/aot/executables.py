"""Compiled programs as files: made without the hardware, loaded where it is.

A file is a zip of `about.json` (what it is and for what), `program` (XLA's own serialization) and
`trees` (the pytrees of arguments and results, pickled). Loading runs code from the file: load only
files you made.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.experimental import serialize_executable

from btlm_jax.utils import atomic

_FORMAT = 1


def require_new_file(path: Path) -> None:
    """Raises FileExistsError if there is something under the name."""
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another name, or delete it first")


def save_executable(path: Path, compiled: jax.stages.Compiled, about: Mapping[str, Any]) -> None:
    """Writes a compiled program, as a whole or not at all.

    Args:
      path: a new file.
      compiled: as `jax.stages.Lowered.compile` returns it.
      about: JSON-able notes, which `load_executable` returns.

    Raises:
      FileExistsError: there is one.
    """
    require_new_file(path)
    program, in_tree, out_tree = serialize_executable.serialize(compiled)
    devices = _devices(compiled)
    notes = {
        "format": _FORMAT,
        "jax": jax.__version__,
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        **about,
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("about.json", json.dumps(notes, indent=1))
        file.writestr("program", program)
        file.writestr("trees", pickle.dumps((in_tree, out_tree)))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(epath.Path(path), buffer.getvalue())


def read_executable_metadata(path: Path) -> dict[str, Any]:
    """What a file holds and for what it was compiled; runs nothing of it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is not such a file, or of another format.
    """
    try:
        with zipfile.ZipFile(path) as file:
            notes = json.loads(file.read("about.json"))
    except (zipfile.BadZipFile, KeyError, ValueError):
        raise ValueError(f"{path}: not written by `btlm compile --save`, or damaged") from None
    if notes.get("format") != _FORMAT:
        raise ValueError(f"{path}: format {notes.get('format')}, expected {_FORMAT}: compile again")
    return notes


def load_executable(
    path: Path, devices: Sequence[jax.Device] | None = None
) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """Loads a program that `save_executable` wrote, onto the devices it was compiled for.

    Args:
      path: the file. Its contents are executed: load only files you made.
      devices: default all of this process's backend; as many, and in the same order, as when it was
        compiled.

    Returns:
      The program, called with arguments sharded as the lowered ones were and, where the compiler
      chose (the cache of a step of decoding), laid out as its `input_formats` say; and what `read_executable_metadata`
      returns.

    Raises:
      FileNotFoundError, ValueError: see `read_executable_metadata`; or it is for another JAX or other devices.
    """
    notes = read_executable_metadata(path)
    devices = list(devices) if devices is not None else jax.devices()
    here = {
        "jax": jax.__version__,
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
    }
    for name, value in here.items():
        if notes[name] != value:
            raise ValueError(
                f"{path}: compiled for {name} = {notes[name]!r}, found {value!r} here: compile it "
                "again for what is here"
            )
    with zipfile.ZipFile(path) as file:
        program, trees = file.read("program"), file.read("trees")
    in_tree, out_tree = pickle.loads(trees)
    loaded = serialize_executable.deserialize_and_load(
        program, in_tree, out_tree, devices[0].client, devices
    )
    return loaded, notes


def _devices(compiled: jax.stages.Compiled) -> list[jax.Device]:
    shardings = jax.tree.leaves(compiled.input_shardings)
    return list(shardings[0]._device_assignment)
