"""Orbax checkpoints: the one layout on disk, written atomically and restored onto any mesh.

A checkpoint directory is an ordinary Orbax (v1) checkpoint, `ocp.load(path)` reads it without us,
with one leaf per layer (`weights.disk_leaves`), unpadded, each in files of its own (`array_files`).
Its custom metadata holds the configuration, the stored ALiBi slopes, the SHA-256 of every array and
carried file, and where it came from, under a seal. Tokenizer and other small files of the model lie
beside the arrays in `tokenizer/`. Extra Orbax items beside the weights (optimizer state, say) are
left alone: everything here reads the item `state` only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from btlm_jax.checkpoint import metadata, orbax_metadata, quantization, zarr
from btlm_jax.checkpoint import unstacked as unstacked_lib
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.config import BTLMConfig
from btlm_jax.model import sharding, weights
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import (
    Params,
    check_params,
    flatten_tree,
    is_unstacked,
    unflatten_tree,
)
from btlm_jax.utils import atomic, paths


class CheckpointWriter:
    """Writes the arrays of a checkpoint, in any order and from several threads."""

    def __init__(self, stage: atomic.StagedDirectory) -> None:
        self._stage = stage

    def finished(self, leaf: weights.DiskLeaf) -> Mapping[str, Any] | None:
        """The record of an array that is written already, by this run or an interrupted one."""
        return self._stage.finished.get(".".join(leaf.path))

    def write(
        self,
        leaf: weights.DiskLeaf,
        dtype: np.dtype,
        blocks: Iterable[np.ndarray],
        errors: Mapping[str, float] | None = None,
    ) -> Mapping[str, Any]:
        """Writes one array.

        Args:
          leaf: which.
          dtype: its dtype.
          blocks: its elements in order: 1-D arrays of `zarr.block_size` elements.
          errors: of the scales of a quantized weight, the errors made (`metadata.Metadata`).

        Returns:
          Its record: `sha256` of its bytes, `nonfinite`, the number of NaN and Inf, and `errors`.

        Raises:
          OSError: the disk is full or fails.
        """
        name = ".".join(leaf.path)
        folder = self._stage.content / metadata.ITEM / name
        digest = zarr.write_blocks(folder, leaf.shape, dtype, blocks)
        record: dict[str, Any] = {"sha256": digest.sha256, "nonfinite": digest.nonfinite}
        if errors is not None:
            record["errors"] = dict(errors)
        self._stage.record(name, record)
        return record


def save(
    path: metadata.PathLike,
    config: BTLMConfig,
    params: Mapping[str, Any],
    *,
    assets: Iterable[metadata.PathLike] = (),
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint: complete under its name, or not at all.

    Args:
      path: a directory that does not exist yet, or a gs:// URL.
      config, params: the model and its stacked weights, sharded or not, padded or not.
      assets: files to carry along (tokenizer).
      origin: JSON-able notes on where the weights came from.
      overwrite: replace an existing checkpoint (only once the new one is complete).

    Raises:
      FileExistsError: `path` exists and `overwrite` is not set.
      ValueError: the weights do not match the configuration, are of a dtype that is not stored, or
        hold something where padding should be.
      OSError: the disk is full or fails.
    """
    if is_unstacked(params):
        raise ValueError(
            "weights to save: found them by layer, expected stacked ones, as init and load give "
            "them; quantized checkpoints are made by `btlm convert --quantize`"
        )
    check_params(params, config)
    flat = flatten_tree(params)
    odd = {
        "/".join(p): str(x.dtype)
        for p, x in flat.items()
        if str(x.dtype) not in weights.STORED_DTYPES
    }
    if odd:
        raise ValueError(
            f"dtypes to store: found {odd}, expected one of {', '.join(weights.STORED_DTYPES)}"
        )
    with open_writer(path, config, assets=assets, origin=origin, overwrite=overwrite) as out:
        for leaf in weights.disk_leaves(config):
            one = np.asarray(_unstack(flat[leaf.weight.path], leaf)).reshape(-1)
            size = zarr.block_size(leaf.weight.shape, one.dtype.itemsize)
            out.write(leaf, one.dtype, (one[i : i + size] for i in range(0, len(one), size)))


@contextlib.contextmanager
def open_writer(
    path: metadata.PathLike,
    config: BTLMConfig,
    *,
    assets: Iterable[metadata.PathLike] = (),
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    key: Mapping[str, Any] | None = None,
    quantized: Quantization | None = None,
) -> Iterator[CheckpointWriter]:
    """Writes a checkpoint array by array, so that no more than a block is held in memory.

    A context manager whose value is a `CheckpointWriter`. The checkpoint appears under its name
    when the block ends; if it fails nothing remains, or with a `key` the finished arrays do.
    What is written depends on the arguments and arrays alone: no clock, no random name.

    Args:
      path, config, assets, origin, overwrite: as for `save`.
      key: see `atomic.new_directory`.
      quantized: what the weights are quantized to (see `quantization.stored_leaves`).

    Raises:
      FileExistsError: `path` exists and `overwrite` is not set.
    """
    with atomic.new_directory(
        path, overwrite=overwrite, ours=metadata.is_btlm_checkpoint, key=key
    ) as stage:
        out = CheckpointWriter(stage)
        yield out
        _finish(stage, config, quantized, [epath.Path(a) for a in assets], origin or {})


def _finish(
    stage: atomic.StagedDirectory,
    config: BTLMConfig,
    to: Quantization | None,
    assets: list[epath.Path],
    origin: Mapping[str, Any],
) -> None:
    """Adds all that makes arrays a checkpoint; the file that marks it complete comes last."""
    names = {".".join(x.path): x.path for x in quantization.stored_leaves(config, to)}
    if missing := [name for name in names if name not in stage.finished]:
        raise ValueError(f"{stage.content}: not written: {', '.join(missing)}")
    asset_sha256 = {}
    if not paths.is_remote(stage.content):  # what an interrupted run carried may be gone since
        (stage.content / "tokenizer").rmtree(missing_ok=True)
    for file in assets:
        atomic.make_directory(stage.content / "tokenizer")
        data = file.read_bytes()
        atomic.write_bytes(stage.content / "tokenizer" / file.name, data)
        asset_sha256[file.name] = hashlib.sha256(data).hexdigest()
    records = {path: stage.finished[name] for name, path in names.items()}
    sha256 = {path: record["sha256"] for path, record in records.items()}
    item = orbax_metadata.array_list(names.values())
    atomic.write_text(stage.content / metadata.ITEM / "_METADATA", item)
    # Orbax knows arrays by a .zarray file in some folder, and would warn that it finds none: Zarr 3
    # names it zarr.json.
    marker = stage.content / metadata.ITEM / ".zarr3"
    atomic.make_directory(marker)
    atomic.write_text(marker / ".zarray", "The arrays are Zarr 3: see zarr.json in each folder.\n")
    structure = metadata.structure_sha256(stage.content, names.values())
    errors = {path[:-1]: r["errors"] for path, r in records.items() if "errors" in r}
    notes = metadata.custom_metadata(config, origin, sha256, asset_sha256, structure, to, errors)
    mark = orbax_metadata.commit_marker(notes)
    if paths.is_remote(stage.content):  # what Orbax looks for in object stores
        atomic.write_text(stage.content / "commit_success.txt", "written by btlm-jax\n")
    atomic.write_text(stage.content / metadata.MARKER_FILE, mark)
    # Checks that the arrays are where the Orbax of this environment looks for them.
    try:
        metadata.read_committed(stage.content)
    except BaseException:
        (stage.content / metadata.MARKER_FILE).unlink(
            missing_ok=True
        )  # in an object store it is in place
        raise


def load(
    path: metadata.PathLike,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: sharding.Rules | None = None,
    unstacked: bool = False,
    by_layer: bool | None = None,
) -> tuple[BTLM, Params]:
    """Reads a checkpoint straight onto a device or a mesh.

    Args:
      path: a checkpoint directory or URL, from `save`, the converter or training.
      dtype: of the weights in memory that are floats; None keeps the stored one.
      mesh: shard the weights over it, each process reading only its parts; None puts them on the
        default device.
      rules: logical axis -> mesh axis; default `sharding.RULES`.
      unstacked: give every layer its own arrays (`unstack_params`), as decoding takes them, without
        stacking them first. Quantized weights are always unstacked. On a CPU without a mesh the
        model then computes in the dtype of its weights (bfloat16 for quantized ones).
      by_layer: the old name of `unstacked`; deprecated.

    Returns:
      The model and its stacked weights, padded for the mesh; or its weights by layer.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: not a checkpoint of ours, an unknown format, or arrays that are missing,
        unexpected or of the wrong shape (all listed).
    """
    unstacked = unstacked_lib.unstacked_option(unstacked, by_layer)
    meta = metadata.read_metadata(path)
    model = BTLM(meta.config, rules=rules or sharding.RULES)
    if unstacked or meta.quantization is not None:
        to, stored = meta.quantization, {path: leaf.dtype for path, leaf in meta.leaves.items()}
        model = dataclasses.replace(
            model, compute_dtype=unstacked_lib.decoding_dtype(meta, dtype, mesh)
        )
        params = unstacked_lib.load_unstacked(
            meta.config,
            meta.part,
            stored,
            quantization=to,
            dtype=dtype,
            mesh=mesh,
            rules=model.rules,
        )
        return model, params
    pad, placed = sharding.param_layout(meta.config, mesh, model.rules)
    stored = {path: leaf.dtype if dtype is None else dtype for path, leaf in meta.leaves.items()}
    arrays = restore_items(
        meta.path, {metadata.ITEM: restore_targets(meta.config, stored, placed, pad)}
    )
    try:
        params = stack_layers(meta.config, flatten_tree(arrays[metadata.ITEM]), placed)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return model, unflatten_tree(params)


def restore_targets(
    config: BTLMConfig,
    dtypes: Mapping[weights.Path, DTypeLike],
    placed: Mapping[weights.Path, Any],
    pad: Mapping[str, int],
) -> Params:
    """What to ask Orbax for: the tree of stored arrays, padded, each where its stack will be.

    Args:
      config: the model.
      dtypes: of every stored array, by its path on disk.
      placed: the sharding of every weight, stacked, by its path in memory; weights that are not
        named are left out.
      pad: padded sizes by logical axis.
    """
    wanted = {}
    for leaf in weights.disk_leaves(config):
        if leaf.weight.path not in placed:
            continue
        out = placed[leaf.weight.path]
        one = out if leaf.layer is None else sharding.layer_sharding(out)
        shape = leaf.weight.padded(pad)
        wanted[leaf.path] = jax.ShapeDtypeStruct(shape, dtypes[leaf.path], sharding=one)
    return unflatten_tree(wanted)


def stack_layers(
    config: BTLMConfig,
    arrays: dict[weights.Path, jax.Array],
    placed: Mapping[weights.Path, Any],
) -> dict[weights.Path, jax.Array]:
    """Stored arrays as they are in memory, by path; `arrays` is emptied on the way.

    Raises:
      ValueError: the layers of a weight are of several dtypes.
    """
    found = {}
    for w in weights.weight_table(config):
        if w.path not in placed:
            continue
        # Weight by weight: the copy that stacking makes is never more than one.
        layers = [arrays.pop(leaf.path) for leaf in weights.disk_leaves_of(w, config)]
        weights.common_dtype(w, (x.dtype for x in layers))
        found[w.path] = _stack(layers, placed[w.path]) if w.stacked else layers[0]
    return found


@functools.partial(jax.jit, static_argnames="config")
def unstack_layers(config: BTLMConfig, stacked: Mapping[weights.Path, jax.Array]):
    """Weights (or what is shaped like them), by path in memory, as stored ones, by path on disk.

    Padding is stripped. Under jit, so that a training step need not wait: `save` checks in addition
    that the padding is zero.
    """
    found = {}
    for leaf in weights.disk_leaves(config):
        if leaf.weight.path in stacked:
            x = stacked[leaf.weight.path]
            found[leaf.path] = _cut_on_device(x, leaf.layer, leaf.weight.shape)[0]
    return found


def _unstack(stacked: Any, leaf: weights.DiskLeaf) -> Any:
    """One stored array out of a stacked, padded, sharded one."""
    w = leaf.weight
    if isinstance(stacked, jax.Array):
        one, rest = _cut_on_device(stacked, leaf.layer, w.shape)
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


@functools.partial(jax.jit, static_argnames="shape")
def _cut_on_device(x: jax.Array, layer: int | None, shape: tuple[int, ...]):
    mesh = sharding.mesh_of(x)
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


def restore_items(path: epath.Path, wanted: Mapping[str, Params]) -> dict[str, Params]:
    """Restores trees of arrays by Orbax item; shapes larger than stored are zero-padded by Orbax.

    Raises:
      ValueError: files that are damaged or missing.
    """
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    context.array_options.loading.enable_padding_and_truncation = True
    try:
        with context:
            items: Any = ocp.load_checkpointables(os.fspath(path), dict(wanted))
    except metadata.NOT_DAMAGE:
        raise
    except Exception as e:  # Orbax and TensorStore raise bare ones for damaged files
        raise metadata.damaged_error(path, e) from e
    for item, tree in wanted.items():
        arrays = flatten_tree(items[item])
        # Orbax hands back the request itself for an array that is missing on disk.
        asked = flatten_tree(tree)
        missing = ["/".join(p) for p in asked if not isinstance(arrays.get(p), jax.Array)]
        if missing:
            raise metadata.damaged_error(path, f"not restored: {', '.join(missing)}")
    return items
