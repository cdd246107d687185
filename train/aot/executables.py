"""Compiled programs as files: saved without the hardware, loaded on it.

A file is a zip of `about.json` (metadata: what was compiled, and for which devices), `program`
(XLA's serialization) and `trees` (the pytrees of arguments and results, pickled). Loading runs code
from the file: load only files that you created.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.experimental import serialize_executable

from btlm_jax.utils import atomic, json_files
from btlm_jax.utils.local_paths import local_path

_FORMAT = 1


def require_new_file(path: Path) -> None:
    """Raises FileExistsError if the path exists."""
    if (path := local_path(path, "path")).exists():
        raise FileExistsError(f"{path} exists: choose another name, or delete it first")


def save_executable(path: Path, compiled: jax.stages.Compiled, metadata: Mapping[str, Any]) -> None:
    """Writes a compiled program atomically.

    Args:
      path: a new file.
      compiled: the result of `jax.stages.Lowered.compile`.
      metadata: more values for the file's metadata, which JSON can hold.

    Raises:
      FileExistsError: the file exists.
    """
    path = local_path(path, "path")
    require_new_file(path)
    program, in_tree, out_tree = serialize_executable.serialize(compiled)
    metadata = {"format": _FORMAT, **_describe_devices(_devices(compiled)), **metadata}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("about.json", json.dumps(metadata, indent=1))
        file.writestr("program", program)
        file.writestr("trees", pickle.dumps((in_tree, out_tree)))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(epath.Path(path), buffer.getvalue())


def read_executable_metadata(path: Path) -> dict[str, Any]:
    """Returns the metadata of a file without running any code from it.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file was not written by `save_executable`, or has another format.
    """
    path = local_path(path, "path")
    try:
        with zipfile.ZipFile(path) as file:
            metadata = json_files.parse_object(file.read("about.json"), "about.json")
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, zlib.error):
        raise ValueError(
            f"{path}: not written by `btlm compile --save`, or damaged: compile it again"
        ) from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: found format {metadata.get('format')}, expected {_FORMAT}: compile it again"
        )
    return metadata


def load_executable(
    path: Path, devices: Sequence[jax.Device] | None = None
) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """Loads a program that `save_executable` wrote, onto the devices it was compiled for.

    Args:
      path: the file. Loading runs code from it: load only files that you created.
      devices: as many devices, in the same order, as the program was compiled for; by default all
        devices of the backend.

    Returns:
      The program and the metadata. Call the program with arguments sharded like those it was
      lowered with. Where the compiler chose a layout (the cache of a decoding step), arguments need
      the program's `input_formats`.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file was not written by `save_executable`, or the program was compiled for
        another JAX version or other devices.
    """
    metadata = read_executable_metadata(path)
    devices = list(devices) if devices is not None else jax.devices()
    for name, value in _describe_devices(devices).items():
        if metadata[name] != value:
            raise ValueError(
                f"{path}: compiled for {name} = {metadata[name]!r}, found {value!r} here: compile "
                "it again for this machine"
            )
    with zipfile.ZipFile(path) as file:
        program, trees = file.read("program"), file.read("trees")
    in_tree, out_tree = pickle.loads(trees)
    loaded = serialize_executable.deserialize_and_load(
        program, in_tree, out_tree, devices[0].client, devices
    )
    return loaded, metadata


def _describe_devices(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Returns the values that must be equal where a program is compiled and where it is loaded."""
    return {
        "jax": jax.__version__,
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
    }


def _devices(compiled: jax.stages.Compiled) -> list[jax.Device]:
    shardings = jax.tree.leaves(compiled.input_shardings)
    return list(shardings[0]._device_assignment)
