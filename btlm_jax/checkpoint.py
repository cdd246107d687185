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
import json
import math
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

from btlm_jax import __version__, sharding, staging, weights
from btlm_jax.config import AlibiScaling, BTLMConfig
from btlm_jax.model import BTLM

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
      ValueError: the weights do not match the configuration, are of a dtype that is not stored, or
        hold something where padding should be.
    """
    weights.check(params, config)
    flat = weights.flatten(params)
    odd = {
        "/".join(p): str(x.dtype)
        for p, x in flat.items()
        if str(x.dtype) not in weights.STORED_DTYPES
    }
    if odd:
        raise ValueError(
            f"dtypes to store: found {odd}, expected one of {', '.join(weights.STORED_DTYPES)}"
        )
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
    metadata: Any = {_KEY: _encode(config, origin or {})}
    with staging.new_directory(path, overwrite=overwrite, ours=is_ours) as target:

        def write(leaves: Mapping[weights.Path, Any]) -> None:
            tree: Any = weights.unflatten(leaves)
            ocp.partial.save(str(target), tree, custom_metadata=metadata)

        yield write
        ocp.partial.finalize(str(target))
        assets = list(assets)
        if assets:
            (target / "tokenizer").mkdir()
            for file in assets:
                shutil.copyfile(file, target / "tokenizer" / Path(file).name)


def is_ours(path: Path) -> bool:
    """Whether a directory is a checkpoint we wrote."""
    try:
        return _KEY in json.loads((path / _MARK).read_text())["custom_metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


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
        left = ", ".join(str(p) for p in staging.leftovers(path))
        hint = f"; an interrupted run left {left}" if left else ""
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
    except _NOT_DAMAGE:
        raise
    except Exception as e:  # Orbax and TensorStore raise bare ones for damaged files
        raise _damaged(path, e) from e
    if found.metadata is None:
        raise _damaged(path, "the list of its arrays cannot be read")
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
    if isinstance(stacked, jax.Array):
        one, rest = _cut_on_device(stacked, leaf.layer, w.shape, sharding.mesh_of(stacked))
    else:
        one, rest = _cut(
            np.asarray(stacked if leaf.layer is None else stacked[leaf.layer]), w.shape
        )
    # A mistaken configuration looks like padding too: never cut off what is not zero.
    if any(bool(x) for x in rest):
        raise ValueError(
            f"{w.name}: found values beyond its shape {w.shape}, expected zero padding there; does "
            "the configuration belong to these weights?"
        )
    return one


@functools.partial(jax.jit, static_argnames=("shape", "mesh"))
def _cut_on_device(x: jax.Array, layer: int | None, shape: tuple[int, ...], mesh):
    with sharding.on_mesh(mesh):
        if layer is not None:
            x = jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
        if mesh is not None:
            # A padded axis does not divide once it is stripped, so it is gathered first.
            own = jax.typeof(x).sharding.spec
            kept = [s if m == n else None for s, m, n in zip(own, x.shape, shape, strict=True)]
            x = jax.sharding.reshard(x, jax.sharding.PartitionSpec(*kept))
        return _cut(x, shape)


def _cut(x: Any, shape: tuple[int, ...]) -> tuple[Any, list[Any]]:
    """`x` stripped to `shape`, and for every padded axis whether anything there is not zero."""
    rest = [
        (x[(slice(None),) * dim + (slice(n, None),)] != 0).any()
        for dim, n in enumerate(shape)
        if n != x.shape[dim]
    ]
    return (x[tuple(slice(n) for n in shape)] if rest else x), rest


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
    except _NOT_DAMAGE:
        raise
    except Exception as e:  # Orbax and TensorStore raise bare ones for damaged files
        raise _damaged(path, e) from e
    arrays = weights.flatten(tree)
    kind = np.ndarray if host else jax.Array
    # Orbax hands back the request itself for an array that is missing on disk.
    missing = ["/".join(p) for p in wanted if not isinstance(arrays.get(p), kind)]
    if missing:
        raise _damaged(path, f"not restored: {', '.join(missing)}")
    return arrays


# Running out of memory on the host or a device must not be taken for a damaged file.
_NOT_DAMAGE = (MemoryError, jax.errors.JaxRuntimeError)


def _damaged(path: str | Path, why: object) -> ValueError:
    first = (str(why).splitlines() or [""])[0][:300]
    return ValueError(f"{path}: damaged checkpoint ({first}); copy or convert it again")


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
