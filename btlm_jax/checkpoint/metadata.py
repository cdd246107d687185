"""Metadata of a checkpoint: Orbax's, and inside it ours, protected by a checksum."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from btlm_jax import __version__
from btlm_jax.checkpoint import zarr
from btlm_jax.checkpoint.orbax_metadata import ITEM, MARKER_FILE
from btlm_jax.checkpoint.quantization import Quantization, stored_leaves
from btlm_jax.config import AlibiScaling, BTLMConfig
from btlm_jax.model import weights
from btlm_jax.model.params import flatten_tree
from btlm_jax.utils import atomic, paths

FORMAT = 2
_KEY = "btlm_jax"  # of our metadata among Orbax's custom metadata
_CHECKSUM = "seal"  # its entry with the checksum of all others
_LAYOUT = "one leaf per layer"

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """Description of a checkpoint, as stored in it, and access to its arrays.

    Attributes:
      path: directory of the checkpoint.
      config: the model, with the stored ALiBi slopes.
      leaves: shape and dtype of every stored array, by path.
      origin: where the weights came from. The converter records the source, its config.json and the
        dtype of the slopes, so that an export reproduces the original files.
      sha256: SHA-256 of the bytes of every array, by path; empty if not recorded.
      asset_sha256: SHA-256 of every carried file, by name.
      structure_sha256: SHA-256 of the files that describe the arrays; None if not recorded.
      ocdbt: whether the arrays are in Orbax's OCDBT database and not in files of their own.
      quantization: how the weights are quantized; None for floats.
      errors: for every quantized weight, by path, its relative RMS error and that of Q4_0's rule
        (`QuantizationErrors.relative`).
      nonfinite: number of NaN and Inf of the arrays that hold any, by name; None if not recorded.
    """

    path: epath.Path
    config: BTLMConfig
    leaves: Mapping[weights.Path, jax.ShapeDtypeStruct]
    origin: Mapping[str, Any]
    sha256: Mapping[weights.Path, str]
    asset_sha256: Mapping[str, str]
    structure_sha256: str | None
    ocdbt: bool
    quantization: Quantization | None
    errors: Mapping[weights.Path, Mapping[str, float]]
    nonfinite: Mapping[str, int] | None

    @property
    def disk_leaves(self) -> list[weights.DiskLeaf]:
        """All stored arrays."""
        return list(stored_leaves(self.config, self.quantization))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, uncompressed."""
        return sum(map(_nbytes, self.leaves.values()))

    @property
    def largest_block(self) -> int:
        """Bytes of the largest block that `blocks` reads into memory.

        Orbax's own layout is read in complete arrays, ours in blocks.
        """
        largest = max(map(_nbytes, self.leaves.values()))
        return largest if self.ocdbt else min(largest, zarr.BLOCK_BYTES)

    def blocks(self, leaf: weights.DiskLeaf, width: int | None = None) -> Iterator[np.ndarray]:
        """Yields a stored array as 1-D blocks, in the stored dtype.

        Args:
          leaf: the array.
          width: bytes per element for which to choose the size of the blocks (`zarr.block_size`);
            default that of the stored dtype.

        Raises:
          ValueError: its files are damaged or missing.
        """
        stored = self.leaves[leaf.path]
        rows = zarr.block_rows(stored.shape, width or stored.dtype.itemsize)
        with self._explain_damage(leaf):
            yield from zarr.read_blocks(self._kvstore(leaf), rows)

    def read_part(self, leaf: weights.DiskLeaf, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a stored array.

        Args:
          leaf: the array.
          index: one slice with bounds for every axis.

        Raises:
          ValueError: its files are damaged or missing.
        """
        with self._explain_damage(leaf):
            return zarr.read_slice(self._kvstore(leaf), index)

    def _kvstore(self, leaf: weights.DiskLeaf) -> Any:
        """Returns TensorStore's key-value store of an array."""
        item, name = self.path / ITEM, ".".join(leaf.path)
        if self.ocdbt:
            return {"driver": "ocdbt", "base": paths.kvstore(item), "path": f"{name}/"}
        return paths.kvstore(item / name)

    @contextlib.contextmanager
    def _explain_damage(self, leaf: weights.DiskLeaf) -> Iterator[None]:
        try:
            yield
        except MemoryError:
            raise
        except Exception as e:  # TensorStore raises ValueError and others for damaged files
            raise damaged_error(self.path, f"{'/'.join(leaf.path)}: {e}") from e


def _nbytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


# Reading ------------------------------------------------------------------------------------------

# Running out of memory on the host or a device must not be mistaken for a damaged file.
NOT_DAMAGE = (MemoryError, jax.errors.JaxRuntimeError)


class DamagedCheckpoint(ValueError):
    """The files are not a complete checkpoint of this package; an older checkpoint may be."""


def damaged_error(path: epath.Path, reason: object) -> DamagedCheckpoint:
    """Returns the error for a checkpoint whose files cannot be read."""
    first_line = (str(reason).splitlines() or [""])[0][:300]
    return DamagedCheckpoint(f"{path}: damaged checkpoint ({first_line}); copy or convert it again")


def read_metadata(path: PathLike) -> CheckpointMetadata:
    """Reads the metadata of a checkpoint and checks it against the table of weights.

    Args:
      path: directory or URL of a checkpoint; or of a training run, for its newest checkpoint.

    Raises:
      FileNotFoundError, ValueError: as `checkpoint.load`.
    """
    directory = paths.location(path)
    paths.forget_listings(directory)
    directory = _newest(directory)
    remains = ", ".join(map(str, atomic.leftovers(directory)))
    if not directory.exists():
        hint = f"; an interrupted run left {remains}: the same command continues it"
        raise FileNotFoundError(f"{directory}: no such checkpoint{hint if remains else ''}")
    if not (directory / MARKER_FILE).exists():  # ocp.is_orbax_checkpoint accepts any directory
        if (directory / "config.json").exists():
            raise ValueError(
                f"{directory} is a Hugging Face directory, expected an Orbax checkpoint: convert "
                f"it with `btlm convert {directory} DST`"
            )
        if (directory / "recipe.json").exists():
            raise FileNotFoundError(
                f"{directory} is a training run that has no checkpoint: train until it has one"
            )
        if remains and paths.is_remote(directory):
            raise ValueError(
                f"{directory} is unfinished: run the command that was writing it again"
            )
        raise DamagedCheckpoint(
            f"{directory} is not an Orbax checkpoint; expected one made by btlm"
        )
    return read_committed(directory)


def read_committed(directory: epath.Path) -> CheckpointMetadata:
    """`read_metadata` of a directory that is known to be a checkpoint."""
    paths.forget_listings(directory)
    try:
        ocdbt = json.loads((directory / ITEM / "_METADATA").read_text())["use_ocdbt"]
        orbax: Any = ocp.metadata(os.fspath(directory))
    except NOT_DAMAGE:
        raise
    except Exception as e:  # Orbax and TensorStore raise bare ones for damaged files
        raise damaged_error(directory, e) from e
    if orbax.metadata is None:
        raise damaged_error(directory, "the list of its arrays cannot be read")
    custom = (orbax.custom_metadata or {}).get(_KEY)
    if not isinstance(custom, Mapping):
        raise DamagedCheckpoint(
            f"{directory}: an Orbax checkpoint without BTLM metadata; expected one made by btlm"
        )
    if custom.get("format") != FORMAT:
        raise ValueError(
            f"{directory}: checkpoint format {custom.get('format')!r}, this version reads "
            f"{FORMAT}; it was written by {custom.get('created_by')}: install a matching btlm-jax"
        )
    if custom.get(_CHECKSUM) != _checksum({k: v for k, v in custom.items() if k != _CHECKSUM}):
        raise damaged_error(directory, "its metadata does not match its checksum")
    required = {"config", "origin", "sha256", "asset_sha256", "structure_sha256"}
    if missing := required - set(custom):
        raise damaged_error(directory, f"its metadata lacks {', '.join(sorted(missing))}")
    config = _decode_config(custom["config"])
    leaves = {
        p: jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)
        for p, x in flatten_tree(orbax.metadata).items()
    }
    quantization, errors = _decode_quantization(custom.get("quantization"))
    if problems := list(_mismatches(leaves, stored_leaves(config, quantization))):
        raise DamagedCheckpoint(
            f"{directory} does not match its configuration:\n  " + "\n  ".join(problems)
        )
    return CheckpointMetadata(
        path=directory,
        config=config,
        leaves=leaves,
        origin=custom["origin"],
        sha256={tuple(name.split(".")): value for name, value in custom["sha256"].items()},
        asset_sha256=custom["asset_sha256"],
        structure_sha256=custom["structure_sha256"],
        ocdbt=ocdbt,
        quantization=quantization,
        errors=errors,
        nonfinite=custom.get("nonfinite"),
    )


def _newest(directory: epath.Path) -> epath.Path:
    """Returns the newest checkpoint of a run directory; any other directory is returned as is."""
    folder = directory / "checkpoints"
    steps = [p for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
    return max(steps, key=lambda p: int(p.name)) if steps else directory


def _mismatches(
    leaves: Mapping[weights.Path, jax.ShapeDtypeStruct], expected: Iterable[weights.DiskLeaf]
) -> Iterator[str]:
    """Yields a description of every difference between stored and expected arrays."""
    known = {leaf.path: leaf for leaf in expected}
    yield from (f"missing: {'/'.join(p)}" for p in known if p not in leaves)
    yield from (f"unexpected: {'/'.join(p)}" for p in leaves if p not in known)
    for path, leaf in known.items():
        if path not in leaves:
            continue
        shape, dtype = leaves[path].shape, str(leaves[path].dtype)
        if shape != leaf.shape:
            yield f"{'/'.join(path)}: found shape {shape}, expected {leaf.shape}"
        if leaf.dtype not in (None, dtype):
            yield f"{'/'.join(path)}: found dtype {dtype}, expected {leaf.dtype}"


def _decode_config(fields: Mapping[str, Any]) -> BTLMConfig:
    values = dict(fields)
    known = {f.name for f in dataclasses.fields(BTLMConfig)}
    if unknown := set(values) - known:
        raise ValueError(f"checkpoint metadata: unknown config fields {sorted(unknown)}")
    if values.get("alibi_scaling") is not None:
        values["alibi_scaling"] = AlibiScaling(**values["alibi_scaling"])
    if values.get("alibi_slopes") is not None:
        values["alibi_slopes"] = tuple(values["alibi_slopes"])
    if isinstance(values.get("eos_token_id"), list):
        values["eos_token_id"] = tuple(values["eos_token_id"])
    return BTLMConfig(**values)


def _decode_quantization(
    fields: Mapping[str, Any] | None,
) -> tuple[Quantization | None, dict[weights.Path, Mapping[str, float]]]:
    """Returns the quantization and its errors; `fields` is None for checkpoints of floats."""
    if fields is None:
        return None, {}
    errors = {tuple(name.split(".")): value for name, value in fields["errors"].items()}
    return Quantization(**{k: v for k, v in fields.items() if k != "errors"}), errors


# Writing ------------------------------------------------------------------------------------------


def custom_metadata(
    config: BTLMConfig,
    origin: Mapping[str, Any],
    sha256: Mapping[weights.Path, str],
    asset_sha256: Mapping[str, str],
    structure_sha256: str | None,
    quantization: Quantization | None = None,
    errors: Mapping[weights.Path, Mapping[str, float]] | None = None,
    nonfinite: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Returns the custom metadata of a checkpoint, with its checksum.

    JSON keeps float64 exactly, and so the slopes.

    Args:
      config, origin, sha256, asset_sha256, structure_sha256, quantization, errors, nonfinite: see
        `CheckpointMetadata`.
    """
    values = {
        "format": FORMAT,
        "layout": _LAYOUT,
        "created_by": f"btlm-jax {__version__}",
        "config": dataclasses.asdict(config),
        "origin": dict(origin),
        "sha256": {".".join(path): value for path, value in sha256.items()},
        "asset_sha256": dict(asset_sha256),
        "structure_sha256": structure_sha256,
    }
    if nonfinite is not None:
        values["nonfinite"] = dict(nonfinite)
    if quantization is not None:
        by_name = {".".join(path): dict(value) for path, value in (errors or {}).items()}
        values["quantization"] = dataclasses.asdict(quantization) | {"errors": by_name}
    return {_KEY: values | {_CHECKSUM: _checksum(values)}}


def _checksum(values: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of our metadata, which reveals a flipped bit in any value."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def structure_sha256(directory: epath.Path, leaves: Iterable[weights.Path]) -> str | None:
    """Returns the SHA-256 of Orbax's list of the arrays and every `zarr.json`.

    Damage to these files can leave every array readable and equal, and mislead another reader.

    Args:
      directory: the checkpoint.
      leaves: paths of its arrays.

    Returns:
      Hexadecimal digits; None if a file is missing.
    """
    names = ["_METADATA", *(f"{'.'.join(path)}/zarr.json" for path in leaves)]
    digest = hashlib.sha256()
    for _, data in sorted(paths.read_files(directory / ITEM, names).items()):
        if data is None:
            return None
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def is_btlm_checkpoint(path: PathLike) -> bool:
    """Returns whether a directory is a checkpoint that this package wrote."""
    try:
        marker = json.loads((paths.location(path) / MARKER_FILE).read_text())
        return _KEY in marker["custom_metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
