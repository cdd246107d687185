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

from btlm_jax import __version__
from btlm_jax.checkpoint import damage, zarr
from btlm_jax.checkpoint.orbax_metadata import ITEM, MARKER_FILE, require_arrays
from btlm_jax.checkpoint.quantization import Quantization, stored_leaves
from btlm_jax.config import AlibiScaling, BTLMConfig
from btlm_jax.model import weights
from btlm_jax.utils import json_files, paths
from btlm_jax.utils.format import join_first, list_first

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
        return _kvstore(self.path / ITEM, ".".join(leaf.path), self.ocdbt)

    @contextlib.contextmanager
    def _explain_damage(self, leaf: weights.DiskLeaf) -> Iterator[None]:
        try:
            yield
        except MemoryError:
            raise
        except Exception as e:  # TensorStore raises ValueError and others for damaged files
            raise damage.reading_error(self.path, e, "/".join(leaf.path)) from e


def _nbytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


# Reading ------------------------------------------------------------------------------------------


def read_metadata(path: PathLike) -> CheckpointMetadata:
    """Reads the metadata of a checkpoint and checks it against the table of weights.

    Args:
      path: directory or URL of a checkpoint; or of a training run, for its newest checkpoint.

    Raises:
      FileNotFoundError, ValueError: as `checkpoint.load`.
    """
    directory = paths.location(path, "path")
    paths.forget_listings(directory)
    directory = _newest(directory)
    if not directory.exists():
        raise damage.missing_error(path, directory)
    damage.require_finished_name(directory)
    if not (directory / MARKER_FILE).exists():  # ocp.is_orbax_checkpoint accepts any directory
        raise damage.other_directory_error(directory)
    return read_committed(directory)


def read_committed(directory: epath.Path) -> CheckpointMetadata:
    """`read_metadata` of a directory that is known to be a checkpoint."""
    paths.forget_listings(directory)
    marker = _read_json(directory, MARKER_FILE)
    notes = marker.get("custom_metadata")
    custom = notes.get(_KEY) if isinstance(notes, Mapping) else None
    if not isinstance(custom, Mapping):
        raise damage.foreign_checkpoint_error(directory, marker)
    if custom.get("format") != FORMAT:
        raise ValueError(
            f"{directory}: checkpoint format {custom.get('format')!r}, this version reads "
            f"{FORMAT}; it was written by {custom.get('created_by')}: install a matching btlm-jax"
        )
    if custom.get(_CHECKSUM) != _checksum({k: v for k, v in custom.items() if k != _CHECKSUM}):
        raise damage.damaged_error(directory, f"{MARKER_FILE} does not match its checksum")
    required = {"config", "origin", "sha256", "asset_sha256", "structure_sha256"}
    if missing := required - set(custom):
        raise damage.damaged_error(directory, f"{MARKER_FILE} lacks {', '.join(sorted(missing))}")
    config = _decode_config(custom["config"])
    quantization, errors = _decode_quantization(custom.get("quantization"))
    leaves, ocdbt = _read_arrays(directory)
    if problems := list(_mismatches(leaves, stored_leaves(config, quantization))):
        raise damage.DamagedCheckpoint(
            f"{directory} does not match its configuration:{list_first(problems)}"
        )
    try:
        require_arrays(directory, leaves)
    except damage.NOT_DAMAGE:
        raise
    except Exception as e:  # Orbax raises bare ones
        raise damage.reading_error(directory, e) from e
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


def _read_json(directory: epath.Path, name: str) -> dict[str, Any]:
    """Returns a JSON object of a checkpoint."""
    try:
        data = (directory / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise damage.damaged_error(directory, f"{name} is missing") from None
    except IsADirectoryError:
        raise damage.damaged_error(directory, f"{name} is a directory") from None
    try:
        return json_files.parse_object(data, name)
    except ValueError as e:
        raise damage.damaged_error(directory, e) from None


def _read_arrays(
    directory: epath.Path,
) -> tuple[dict[weights.Path, jax.ShapeDtypeStruct], bool]:
    """Returns shape and dtype of every array by path, and whether they are in OCDBT's database."""
    listed = _read_json(directory, f"{ITEM}/_METADATA")
    try:
        ocdbt, tree = bool(listed["use_ocdbt"]), listed["tree_metadata"]
        found = [tuple(str(k["key"]) for k in x["key_metadata"]) for x in tree.values()]
    except (KeyError, TypeError, AttributeError) as e:
        raise damage.damaged_error(
            directory, f"{ITEM}/_METADATA is no list of arrays: {type(e).__name__} {e}"
        ) from None
    names = {path: f"{'.'.join(path)}/zarr.json" for path in found}
    try:
        headers = paths.read_files(_kvstore(directory / ITEM, "", ocdbt), names.values())
    except MemoryError:
        raise
    except Exception as e:  # TensorStore raises ValueError and others for a damaged database
        raise damage.reading_error(directory, e) from e
    leaves, problems = {}, []
    for path, name in names.items():
        try:
            leaves[path] = jax.ShapeDtypeStruct(*zarr.parse_header(headers[name]))
        except ValueError as e:
            problems.append(f"{ITEM}/{name} {e}")
    if problems:
        raise damage.damaged_error(directory, join_first(problems, 2))
    return leaves, ocdbt


def _kvstore(item: epath.Path, name: str, ocdbt: bool) -> Any:
    """Returns TensorStore's key-value store of an array, or of all arrays for an empty name."""
    if ocdbt:
        return {"driver": "ocdbt", "base": paths.kvstore(item), "path": f"{name}/" if name else ""}
    return paths.kvstore(item / name if name else item)


def _newest(directory: epath.Path) -> epath.Path:
    """Returns the newest checkpoint of a run directory; any other directory is returned as is."""
    folder = directory / "checkpoints"
    steps = [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    return max(steps, key=lambda p: int(p.name)) if steps else directory


def _mismatches(
    leaves: Mapping[weights.Path, jax.ShapeDtypeStruct], expected: Iterable[weights.DiskLeaf]
) -> Iterator[str]:
    """Yields a description of every difference between stored and expected arrays."""
    known = {leaf.path: leaf for leaf in expected}
    if missing := ["/".join(p) for p in known if p not in leaves]:
        yield f"missing: {join_first(missing, 3)}"
    if unexpected := ["/".join(p) for p in leaves if p not in known]:
        yield f"unexpected: {join_first(unexpected, 3)}"
    for path, leaf in known.items():
        if path not in leaves:
            continue
        shape, dtype = leaves[path].shape, str(leaves[path].dtype)
        if shape != leaf.shape:
            yield f"{'/'.join(path)}: found shape {shape}, expected {leaf.shape}"
        expected_dtypes = weights.STORED_DTYPES if leaf.dtype is None else (leaf.dtype,)
        if dtype not in expected_dtypes:
            yield f"{'/'.join(path)}: found dtype {dtype}, expected {' or '.join(expected_dtypes)}"


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
