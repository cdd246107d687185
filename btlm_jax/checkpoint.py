"""Orbax checkpoints: the one layout on disk, written atomically and restored onto any mesh.

A checkpoint directory is an ordinary Orbax (v1) checkpoint, `ocp.load(path)` reads it without us,
with one leaf per layer (`weights.disk_leaves`), unpadded, and the configuration, stored ALiBi
slopes, format version and origin in its custom metadata. Tokenizer and other small files of the
model lie beside the arrays in `tokenizer/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from btlm_jax import __version__, sharding, weights
from btlm_jax.config import AlibiScaling, BTLMConfig
from btlm_jax.model import BTLM

logger = logging.getLogger(__name__)

FORMAT = 1
_KEY = "btlm_jax"
_LAYOUT = "one leaf per layer"
_MARK = "_CHECKPOINT_METADATA"  # a file Orbax writes into every finished checkpoint


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a checkpoint says about itself.

    Attributes:
      config: the model, with the stored ALiBi slopes.
      leaves: shape and dtype of every stored array, by path.
      origin: where it came from: the converter records the source, its config.json and the dtype of
        the slopes, so that an export gives the same files back.
    """

    config: BTLMConfig
    leaves: Mapping[weights.Path, jax.ShapeDtypeStruct]
    origin: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, uncompressed."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in self.leaves.values())


def save(
    path: str | Path,
    config: BTLMConfig,
    params: Mapping[str, Any],
    *,
    assets: Iterable[Path] = (),
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint: complete under its name, or not at all.

    Args:
      path: a directory that does not exist yet.
      config, params: the model and its stacked weights, sharded or not, padded or not.
      assets: files to carry along (tokenizer).
      origin: JSON-able notes on where the weights came from.
      overwrite: replace an existing checkpoint (only once the new one is complete).

    Raises:
      FileExistsError: `path` exists and `overwrite` is not set.
      ValueError: the weights do not match the configuration.
    """
    weights.check(params, config)
    flat = weights.flatten(params)
    with writer(path, config, assets=assets, origin=origin, overwrite=overwrite) as write:
        for leaves in by_layer(config):
            write({leaf.path: _unstack(flat[leaf.weight.path], leaf) for leaf in leaves})


@contextlib.contextmanager
def writer(
    path: str | Path,
    config: BTLMConfig,
    *,
    assets: Iterable[Path] = (),
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Iterator[Any]:
    """Writes a checkpoint piece by piece, so that no more than a piece is held in memory.

    A context manager; its value is a function that takes `{disk path: array}` and writes it. The
    checkpoint appears under its name when the block ends; if it fails, nothing remains.

    Raises:
      FileExistsError: `path` exists and `overwrite` is not set.
    """
    path = Path(path).absolute()
    refuse_existing(path, overwrite)
    # Staged beside the target (same file system, so the final rename is atomic).
    stage = path.with_name(path.name + ".partial")
    if stage.exists():
        logger.warning("removing %s, left by an interrupted run", stage)
        shutil.rmtree(stage)
    stage.mkdir(parents=True)
    target = stage / "checkpoint"
    metadata: Any = {_KEY: _encode(config, origin or {})}

    def write(leaves: Mapping[weights.Path, Any]) -> None:
        tree: Any = weights.unflatten(leaves)
        ocp.partial.save(str(target), tree, custom_metadata=metadata)

    try:
        yield write
        ocp.partial.finalize(str(target))
        assets = list(assets)
        if assets:
            (target / "tokenizer").mkdir()
            for file in assets:
                shutil.copyfile(file, target / "tokenizer" / Path(file).name)
        replace(target, path)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def refuse_existing(path: Path, overwrite: bool, ours: str = _MARK) -> None:
    """Refuses to write to a `path` that exists, or to replace what we did not write.

    Args:
      ours: a file that every directory of the kind about to be written holds.

    Raises:
      FileExistsError: `path` exists, and `overwrite` is not set or it is something else.
    """
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists: choose another name, or pass --overwrite")
    if not (path / ours).is_file():
        raise FileExistsError(
            f"{path} exists and holds no {ours}: --overwrite only replaces what btlm has written; "
            "choose another name"
        )


def replace(staged: Path, path: Path) -> None:
    """Renames a finished directory to its name; one that has the name is only then removed."""
    if not path.exists():
        os.rename(staged, path)
        return
    old = path.with_name(path.name + ".replaced")
    os.rename(path, old)
    try:
        os.rename(staged, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


def load(
    path: str | Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: sharding.Rules | None = None,
) -> tuple[BTLM, weights.Params]:
    """Reads a checkpoint straight onto a device or a mesh.

    Args:
      path: a checkpoint directory, from `save`, the converter or training.
      dtype: of the weights in memory; None keeps the stored one.
      mesh: shard the weights over it, each process reading only its parts; None puts them on the
        default device.
      rules: logical axis -> mesh axis; default `sharding.RULES`.

    Returns:
      The model and its stacked weights, padded for the mesh.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: not a checkpoint of ours, an unknown format, or arrays that are missing,
        unexpected or of the wrong shape (all listed).
    """
    meta = read_metadata(path)
    model = BTLM(meta.config, rules=rules or sharding.RULES)
    pad = sharding.padding(meta.config, mesh, model.rules) if mesh is not None else {}
    if mesh is not None:
        placed = weights.flatten(sharding.param_shardings(meta.config, mesh, model.rules, pad))
    else:
        single = SingleDeviceSharding(jax.devices()[0])
        placed = {w.path: single for w in weights.table(meta.config)}
    wanted = {}
    for leaf in weights.disk_leaves(meta.config):
        stacked = placed[leaf.weight.path]
        one = stacked
        if isinstance(stacked, NamedSharding) and leaf.layer is not None:
            one = NamedSharding(stacked.mesh, jax.sharding.PartitionSpec(*stacked.spec[1:]))
        stored = meta.leaves[leaf.path].dtype if dtype is None else dtype
        wanted[leaf.path] = jax.ShapeDtypeStruct(leaf.weight.padded(pad), stored, sharding=one)
    arrays = _restore(path, wanted)

    params = {}
    for w in weights.table(meta.config):
        if not w.stacked:
            params[w.path] = arrays.pop(w.path)
            continue
        # Family by family: the copy that stacking makes is never more than one family.
        paths = [weights.DiskLeaf(w, i).path for i in range(meta.config.n_layer)]
        layers = [arrays.pop(p) for p in paths]
        dtypes = sorted({str(x.dtype) for x in layers})
        if len(dtypes) > 1:
            raise ValueError(
                f"{path}: the layers of {w.name} are stored as {', '.join(dtypes)} and cannot be "
                "stacked as they are; pass dtype="
            )
        params[w.path] = _stack(layers, placed[w.path])
    return model, weights.unflatten(params)


def read_leaves(path: str | Path, leaves: Iterable[weights.DiskLeaf]) -> dict[weights.Path, Any]:
    """Reads some stored arrays into host memory, as stored: `{disk path: np.ndarray}`."""
    meta = read_metadata(path)
    # Orbax takes "restore as NumPy" from an example array; this one occupies no memory.
    wanted = {
        leaf.path: np.broadcast_to(np.zeros((), stored.dtype), stored.shape)
        for leaf in leaves
        for stored in (meta.leaves[leaf.path],)
    }
    return _restore(path, wanted, host=True)


def read_metadata(path: str | Path) -> Metadata:
    """Reads what a checkpoint says about itself and checks it against the table of weights.

    Raises:
      FileNotFoundError, ValueError: as `load`.
    """
    path = Path(path).absolute()
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        hint = f"; {partial} is an interrupted run: start it again" if partial.exists() else ""
        raise FileNotFoundError(f"{path}: no such checkpoint{hint}")
    if not (path / _MARK).is_file():  # ocp.is_orbax_checkpoint accepts any directory
        if (path / "config.json").is_file():
            raise ValueError(
                f"{path} is a Hugging Face directory, expected an Orbax checkpoint: convert it "
                f"with `btlm convert {path} DST`"
            )
        raise ValueError(f"{path} is not an Orbax checkpoint; expected one made by btlm")
    try:
        found: Any = ocp.metadata(str(path))
    except Exception as e:  # Orbax raises many types for damaged files
        raise ValueError(f"{path}: damaged checkpoint, its metadata cannot be read ({e})") from e
    notes = (found.custom_metadata or {}).get(_KEY)
    if not isinstance(notes, Mapping):
        raise ValueError(f"{path}: an Orbax checkpoint without BTLM metadata; expected one of ours")
    if notes.get("format") != FORMAT:
        raise ValueError(
            f"{path}: checkpoint format {notes.get('format')!r}, this version reads {FORMAT}; "
            f"it was written by {notes.get('created_by')}: install a matching btlm-jax"
        )
    config = _decode(notes["config"])
    leaves = {
        p: jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)
        for p, x in weights.flatten(found.metadata).items()
    }
    known = {leaf.path: leaf.weight.shape for leaf in weights.disk_leaves(config)}
    problems = [f"missing: {'/'.join(p)}" for p in known if p not in leaves]
    problems += [f"unexpected: {'/'.join(p)}" for p in leaves if p not in known]
    problems += [
        f"{'/'.join(p)}: found shape {leaves[p].shape}, expected {shape}"
        for p, shape in known.items()
        if p in leaves and leaves[p].shape != shape
    ]
    if problems:
        raise ValueError(f"{path} does not match its configuration:\n  " + "\n  ".join(problems))
    return Metadata(config, leaves, notes.get("origin", {}))


def assets_of(path: str | Path) -> list[Path]:
    """The files a checkpoint carries along (tokenizer and the like)."""
    return sorted(p for p in (Path(path) / "tokenizer").glob("*") if p.is_file())


def by_layer(config: BTLMConfig) -> Iterator[list[weights.DiskLeaf]]:
    """The stored arrays in pieces: those outside the layers one by one, then layer by layer."""
    group: list[weights.DiskLeaf] = []
    for leaf in weights.disk_leaves(config):
        if group and (leaf.layer is None or leaf.layer != group[0].layer):
            yield group
            group = []
        group.append(leaf)
    yield group


def _unstack(stacked: Any, leaf: weights.DiskLeaf) -> Any:
    """One stored array out of a stacked, padded, sharded one."""
    w = leaf.weight
    if not isinstance(stacked, jax.Array):
        one = stacked if leaf.layer is None else stacked[leaf.layer]
        return np.asarray(one)[tuple(slice(n) for n in w.shape)]
    return _cut(stacked, leaf.layer, w.shape, sharding.mesh_of(stacked))


@functools.partial(jax.jit, static_argnames=("shape", "mesh"))
def _cut(x: jax.Array, layer: int | None, shape: tuple[int, ...], mesh) -> jax.Array:
    with sharding.on_mesh(mesh):
        if layer is not None:
            x = jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
        if mesh is not None:
            # A padded axis does not divide once it is stripped, so it is gathered first.
            own = jax.typeof(x).sharding.spec
            kept = [s if m == n else None for s, m, n in zip(own, x.shape, shape, strict=True)]
            x = jax.sharding.reshard(x, jax.sharding.PartitionSpec(*kept))
        return x[tuple(slice(n) for n in shape)]


def _stack(layers: list[jax.Array], out: Any) -> jax.Array:
    return jax.jit(lambda xs: jnp.stack(xs), out_shardings=out)(layers)


def _restore(path: str | Path, wanted: Mapping[weights.Path, Any], host: bool = False):
    """Restores arrays by disk path; shapes larger than stored are zero-padded by Orbax."""
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    context.array_options.loading.enable_padding_and_truncation = True
    try:
        with context:
            request: Any = weights.unflatten(wanted)
            tree: Any = ocp.load(str(Path(path).absolute()), request)
    except Exception as e:  # Orbax and TensorStore raise many types for damaged files
        raise ValueError(f"{path}: damaged checkpoint, cannot be read ({e})") from e
    arrays = weights.flatten(tree)
    kind = np.ndarray if host else jax.Array
    # Orbax hands back the request itself for an array that is missing on disk.
    missing = ["/".join(p) for p in wanted if not isinstance(arrays.get(p), kind)]
    if missing:
        raise ValueError(f"{path}: damaged checkpoint, not restored: {', '.join(missing)}")
    return arrays


def _encode(config: BTLMConfig, origin: Mapping[str, Any]) -> dict[str, Any]:
    """The custom metadata. JSON keeps float64 exactly, hence the slopes too."""
    return {
        "format": FORMAT,
        "layout": _LAYOUT,
        "created_by": f"btlm-jax {__version__}",
        "config": dataclasses.asdict(config),
        "origin": dict(origin),
    }


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
