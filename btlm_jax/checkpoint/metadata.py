"""What a checkpoint says about itself: Orbax's metadata, and ours inside it under a seal."""

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
from btlm_jax.checkpoint import quantization, zarr
from btlm_jax.checkpoint.orbax_metadata import ITEM, MARKER_FILE
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.config import AlibiScaling, BTLMConfig
from btlm_jax.model import weights
from btlm_jax.model.params import flatten_tree
from btlm_jax.utils import atomic, paths

FORMAT = 2
_KEY = "btlm_jax"
_LAYOUT = "one leaf per layer"

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a checkpoint says about itself.

    Attributes:
      path: where it lies.
      config: the model, with the stored ALiBi slopes.
      leaves: shape and dtype of every stored array, by path.
      origin: where it came from: the converter records the source, its config.json and the dtype of
        the slopes, so that an export gives the same files back.
      sha256: of the bytes of every array, by path; empty if nobody recorded them.
      asset_sha256: of every carried file, by name.
      structure_sha256: of the files that describe the arrays; None if nobody recorded it.
      ocdbt: whether the arrays lie in Orbax's OCDBT database, not in files of their own.
      quantization: what the weights are quantized to; None of floats.
      errors: of every quantized weight, by path: its relative RMS error, and that of Q4_0's rule
        (`quantization.QuantizationErrors.relative`).
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

    @property
    def disk_leaves(self) -> list[weights.DiskLeaf]:
        """Every stored array."""
        return list(quantization.stored_leaves(self.config, self.quantization))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, uncompressed."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in self.leaves.values())

    @property
    def largest_block(self) -> int:
        """Bytes of the largest block that `blocks` brings into memory.

        Orbax's own layout is read by whole arrays, ours by blocks.
        """
        whole = max(math.prod(x.shape) * x.dtype.itemsize for x in self.leaves.values())
        return whole if self.ocdbt else min(whole, zarr.BLOCK_BYTES)

    def blocks(self, leaf: weights.DiskLeaf, width: int | None = None) -> Iterator[np.ndarray]:
        """Yields a stored array as 1-D blocks, as stored.

        Args:
          leaf: which.
          width: bytes per element for which to choose the size of the blocks
            (`zarr.block_size`); default its own.

        Raises:
          ValueError: its files are damaged or missing.
        """
        stored = self.leaves[leaf.path]
        rows = zarr.block_rows(stored.shape, width or stored.dtype.itemsize)
        with self._damage_explained(leaf):
            yield from zarr.read_blocks(self._kvstore(leaf), rows)

    def part(self, leaf: weights.DiskLeaf, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a stored array, of slices with bounds.

        Raises:
          ValueError: its files are damaged or missing.
        """
        with self._damage_explained(leaf):
            return zarr.read_slice(self._kvstore(leaf), index)

    def _kvstore(self, leaf: weights.DiskLeaf) -> Any:
        item, name = self.path / ITEM, ".".join(leaf.path)
        if self.ocdbt:
            return {"driver": "ocdbt", "base": paths.kvstore(item), "path": f"{name}/"}
        return paths.kvstore(item / name)

    @contextlib.contextmanager
    def _damage_explained(self, leaf: weights.DiskLeaf) -> Iterator[None]:
        try:
            yield
        except MemoryError:
            raise
        except Exception as e:  # TensorStore raises ValueError and others for damaged files
            raise damaged_error(self.path, f"{'/'.join(leaf.path)}: {e}") from e


def read_metadata(path: PathLike) -> Metadata:
    """Reads what a checkpoint says about itself and checks it against the table of weights.

    Of a training run's directory, that of its newest checkpoint.

    Raises:
      FileNotFoundError, ValueError: as `checkpoint.load`.
    """
    place = paths.location(path)
    paths.forget_listings(place)
    place = _newest(place)
    left = ", ".join(map(str, atomic.leftovers(place)))
    if not place.exists():
        hint = f"; an interrupted run left {left}: the same command continues it" if left else ""
        raise FileNotFoundError(f"{place}: no such checkpoint{hint}")
    if not (place / MARKER_FILE).exists():  # ocp.is_orbax_checkpoint accepts any directory
        if (place / "config.json").exists():
            raise ValueError(
                f"{place} is a Hugging Face directory, expected an Orbax checkpoint: convert it "
                f"with `btlm convert {place} DST`"
            )
        if left and paths.is_remote(place):
            raise ValueError(f"{place} is unfinished: run the command that was writing it again")
        raise DamagedCheckpoint(f"{place} is not an Orbax checkpoint; expected one made by btlm")
    return read_committed(place)


def read_committed(place: epath.Path) -> Metadata:
    """`read`, of a directory that is known to be a checkpoint."""
    paths.forget_listings(place)
    try:
        ocdbt = json.loads((place / ITEM / "_METADATA").read_text())["use_ocdbt"]
        found: Any = ocp.metadata(os.fspath(place))
    except NOT_DAMAGE:
        raise
    except Exception as e:  # Orbax and TensorStore raise bare ones for damaged files
        raise damaged_error(place, e) from e
    if found.metadata is None:
        raise damaged_error(place, "the list of its arrays cannot be read")
    notes = (found.custom_metadata or {}).get(_KEY)
    if not isinstance(notes, Mapping):
        raise DamagedCheckpoint(
            f"{place}: an Orbax checkpoint without BTLM metadata; expected one of ours"
        )
    if notes.get("format") != FORMAT:
        raise ValueError(
            f"{place}: checkpoint format {notes.get('format')!r}, this version reads {FORMAT}; "
            f"it was written by {notes.get('created_by')}: install a matching btlm-jax"
        )
    if notes.get("seal") != _checksum({k: v for k, v in notes.items() if k != "seal"}):
        raise damaged_error(place, "its metadata does not match its seal")
    parts = {"config", "origin", "sha256", "asset_sha256", "structure_sha256"}
    if missing := parts - set(notes):
        raise damaged_error(place, f"its metadata lacks {', '.join(sorted(missing))}")
    config = _decode(notes["config"])
    leaves = {
        p: jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)
        for p, x in flatten_tree(found.metadata).items()
    }
    to, errors = _quantization(notes.get("quantization"))
    if problems := list(_misfits(leaves, quantization.stored_leaves(config, to))):
        raise DamagedCheckpoint(
            f"{place} does not match its configuration:\n  " + "\n  ".join(problems)
        )
    sha256 = {tuple(name.split(".")): value for name, value in notes["sha256"].items()}
    return Metadata(
        path=place,
        config=config,
        leaves=leaves,
        origin=notes["origin"],
        sha256=sha256,
        asset_sha256=notes["asset_sha256"],
        structure_sha256=notes["structure_sha256"],
        ocdbt=ocdbt,
        quantization=to,
        errors=errors,
    )


def _misfits(
    found: Mapping[weights.Path, jax.ShapeDtypeStruct], expected: Iterable[weights.DiskLeaf]
) -> Iterator[str]:
    """What the arrays of a checkpoint have otherwise than they should."""
    known = {leaf.path: leaf for leaf in expected}
    yield from (f"missing: {'/'.join(p)}" for p in known if p not in found)
    yield from (f"unexpected: {'/'.join(p)}" for p in found if p not in known)
    for path, leaf in known.items():
        if path not in found:
            continue
        shape, dtype = found[path].shape, str(found[path].dtype)
        if shape != leaf.shape:
            yield f"{'/'.join(path)}: found shape {shape}, expected {leaf.shape}"
        if leaf.dtype not in (None, dtype):
            yield f"{'/'.join(path)}: found dtype {dtype}, expected {leaf.dtype}"


def _quantization(
    notes: Mapping[str, Any] | None,
) -> tuple[Quantization | None, dict[weights.Path, Mapping[str, float]]]:
    """What `notes` has under "quantization", which checkpoints of floats lack."""
    if notes is None:
        return None, {}
    errors = {tuple(name.split(".")): value for name, value in notes["errors"].items()}
    return Quantization(**{k: v for k, v in notes.items() if k != "errors"}), errors


def _newest(place: epath.Path) -> epath.Path:
    folder = place / "checkpoints"
    steps = [p for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
    return max(steps, key=lambda p: int(p.name)) if steps else place


# Running out of memory on the host or a device must not be taken for a damaged file.
NOT_DAMAGE = (MemoryError, jax.errors.JaxRuntimeError)


class DamagedCheckpoint(ValueError):
    """What should be a checkpoint of ours is not, or not all of it: another one may do."""


def damaged_error(path: epath.Path, why: object) -> DamagedCheckpoint:
    """The error for a checkpoint whose files cannot be read."""
    first = (str(why).splitlines() or [""])[0][:300]
    return DamagedCheckpoint(f"{path}: damaged checkpoint ({first}); copy or convert it again")


def structure_sha256(place: epath.Path, leaves: Iterable[weights.Path]) -> str | None:
    """SHA-256 over Orbax's list of the arrays and the `zarr.json` of each; None if one is missing.

    Damage there can leave every array readable and equal, and mislead another reader.
    """
    names = ["_METADATA", *(f"{'.'.join(path)}/zarr.json" for path in leaves)]
    hashed = hashlib.sha256()
    for _, data in sorted(paths.read_files(place / ITEM, names).items()):
        if data is None:
            return None
        hashed.update(hashlib.sha256(data).digest())
    return hashed.hexdigest()


def custom_metadata(
    config: BTLMConfig,
    origin: Mapping[str, Any],
    sha256: Mapping[weights.Path, str],
    asset_sha256: Mapping[str, str],
    structure_sha256: str | None,
    to: Quantization | None = None,
    errors: Mapping[weights.Path, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """The custom metadata of a checkpoint; JSON keeps float64 exactly, hence the slopes too.

    Args:
      config, origin, sha256, asset_sha256, structure_sha256, errors: see `Metadata`.
      to: its `quantization`.
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
    if to is not None:
        named = {".".join(path): dict(value) for path, value in (errors or {}).items()}
        values["quantization"] = dataclasses.asdict(to) | {"errors": named}
    return {_KEY: values | {"seal": _checksum(values)}}


def _checksum(notes: Mapping[str, Any]) -> str:
    """SHA-256 over our notes: a flipped bit in a configuration or a hash must not go unseen."""
    return hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()


def is_btlm_checkpoint(path: PathLike) -> bool:
    """Whether a directory is a checkpoint we wrote."""
    try:
        return (
            _KEY in json.loads((paths.location(path) / MARKER_FILE).read_text())["custom_metadata"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _decode(fields: Mapping[str, Any]) -> BTLMConfig:
    values = dict(fields)
    known = {f.name for f in dataclasses.fields(BTLMConfig)}
    if unknown := set(values) - known:
        raise ValueError(f"checkpoint metadata: unknown config fields {sorted(unknown)}")
    if values.get("alibi_scaling") is not None:
        values["alibi_scaling"] = AlibiScaling(**values["alibi_scaling"])
    if values.get("alibi_slopes") is not None:
        values["alibi_slopes"] = tuple(values["alibi_slopes"])
    return BTLMConfig(**values)
