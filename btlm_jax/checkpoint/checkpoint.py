"""Orbax checkpoints: one layout on disk, written atomically and restored onto any mesh.

A checkpoint directory is an ordinary Orbax (v1) checkpoint, which `ocp.load(path)` reads without
this package. It has one unpadded leaf per layer (`weights.disk_leaves`), each in files of its own
(`zarr`). Its custom metadata holds the configuration, the stored ALiBi slopes, the SHA-256 of every
array and carried file, and the origin of the weights, protected by a checksum. The tokenizer and
other small files of the model are in `tokenizer/`. Other Orbax items beside the weights, such as
optimizer state, are ignored: this package reads the item `state` only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from btlm_jax.checkpoint import damage, metadata, narrowing, orbax_metadata, stacking, zarr
from btlm_jax.checkpoint import unstacked as unstacked_lib
from btlm_jax.checkpoint.assets import warn_of_changed_assets
from btlm_jax.checkpoint.quantization import Quantization, stored_leaves
from btlm_jax.config import BTLMConfig
from btlm_jax.data.tokenizer import tokenizer_directory
from btlm_jax.hf_generation_config import read_generation_config
from btlm_jax.model import finite, sharding, weights
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params, check_params, flatten_tree, is_unstacked, unflatten_tree
from btlm_jax.utils import atomic, paths
from btlm_jax.utils.dtypes import checked_dtype, optional_dtype
from btlm_jax.utils.format import join_first

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the arrays of a checkpoint, in any order and from several threads."""

    def __init__(self, stage: atomic.StagedDirectory) -> None:
        self._stage = stage

    def finished(self, leaf: weights.DiskLeaf) -> Mapping[str, Any] | None:
        """Returns the record of an array that this or an interrupted run wrote; None otherwise."""
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
          leaf: the array.
          dtype: its dtype.
          blocks: its elements in order: 1-D arrays of `zarr.block_size` elements.
          errors: for the scales of a quantized weight, the errors of the weight
            (`metadata.CheckpointMetadata.errors`).

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
    """Writes a checkpoint that is complete under its name or absent.

    Weights with NaN or Inf are saved too, with a warning.

    Args:
      path: a directory that does not exist yet, or a gs:// URL.
      config: the model.
      params: its stacked weights, sharded or not, padded or not.
      assets: files to carry along, such as the tokenizer.
      origin: JSON-able description of where the weights came from.
      overwrite: replace an existing checkpoint once the new one is complete.

    Raises:
      FileExistsError: `path` exists and `overwrite` is not set.
      ValueError: the weights do not match the configuration, have a dtype that cannot be stored, or
        are not zero in their padding.
      OSError: the disk is full or fails.
    """
    paths.location(path, "path")
    assets = [paths.location(asset, "assets") for asset in assets]
    if is_unstacked(params):
        raise ValueError(
            "weights to save: found unstacked ones, expected stacked ones, as init and load "
            "return them; quantized checkpoints are made by `btlm convert --quantize`"
        )
    check_params(params, config)
    flat = flatten_tree(params)
    for tensor_path, array in flat.items():
        checked_dtype(array.dtype, f"dtype of {'/'.join(tensor_path)}", weights.STORED_DTYPES)
    nonfinite: dict[str, int] = {}
    with open_writer(path, config, assets=assets, origin=origin, overwrite=overwrite) as writer:
        for leaf in weights.disk_leaves(config):
            array = np.asarray(stacking.unstack_layer(flat[leaf.weight.path], leaf))
            record = writer.write(leaf, array.dtype, zarr.split_blocks(array))
            if record["nonfinite"]:
                nonfinite["/".join(leaf.path)] = record["nonfinite"]
    if nonfinite:
        logger.warning(
            "%s was saved with %s: it can be loaded with allow_nonfinite=True only",
            path, finite.describe_nonfinite(nonfinite),
        )  # fmt: skip


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
    """Writes a checkpoint array by array, with at most a few blocks in memory.

    The checkpoint appears under its name when the `with` block ends. If the block fails, nothing
    remains, or with a `key` the finished arrays do. The bytes depend on the arguments and arrays
    only: there are no clock readings or random names.

    Args:
      path, config, assets, origin, overwrite: as for `save`.
      key: see `atomic.new_directory`.
      quantized: how the weights are quantized (see `quantization.stored_leaves`).

    Yields:
      The writer of the arrays.

    Raises:
      FileExistsError: `path` exists and `overwrite` is not set.
    """
    located: Any = [paths.location(asset, "assets") for asset in assets]
    with atomic.new_directory(
        path, overwrite=overwrite, ours=metadata.is_btlm_checkpoint, key=key
    ) as stage:
        yield CheckpointWriter(stage)
        _commit(stage, config, quantized, located, origin or {})


def _commit(
    stage: atomic.StagedDirectory,
    config: BTLMConfig,
    quantized: Quantization | None,
    assets: list[epath.Path],
    origin: Mapping[str, Any],
) -> None:
    """Writes all files besides the arrays; the marker of a complete checkpoint is the last one."""
    names = {".".join(x.path): x.path for x in stored_leaves(config, quantized)}
    if missing := [name for name in names if name not in stage.finished]:
        raise ValueError(f"{stage.content}: not written: {join_first(missing)}")
    asset_sha256 = _write_assets(stage.content, assets)
    records = {path: stage.finished[name] for name, path in names.items()}
    item = stage.content / metadata.ITEM
    atomic.write_text(item / "_METADATA", orbax_metadata.array_list(names.values()))
    # Orbax recognizes arrays by a .zarray file in any directory, and would warn that there is none:
    # in Zarr 3 it is called zarr.json.
    atomic.make_directory(item / ".zarr3")
    notice = "The arrays are Zarr 3: see zarr.json in each folder.\n"
    atomic.write_text(item / ".zarr3" / ".zarray", notice)
    custom = metadata.custom_metadata(
        config,
        origin,
        {path: record["sha256"] for path, record in records.items()},
        asset_sha256,
        metadata.structure_sha256(stage.content, names.values()),
        quantized,
        {path[:-1]: r["errors"] for path, r in records.items() if "errors" in r},
        {"/".join(path): r["nonfinite"] for path, r in records.items() if r["nonfinite"]},
    )
    commit_marker = orbax_metadata.commit_marker(custom)
    if paths.is_remote(stage.content):  # Orbax looks for this file in object stores
        atomic.write_text(stage.content / "commit_success.txt", "written by btlm-jax\n")
    atomic.write_text(stage.content / metadata.MARKER_FILE, commit_marker)
    # Checks that the installed Orbax finds the arrays where they are.
    try:
        metadata.read_committed(stage.content)
    except BaseException:
        # In an object store the checkpoint is already under its name.
        (stage.content / metadata.MARKER_FILE).unlink(missing_ok=True)
        raise


def _write_assets(content: epath.Path, assets: list[epath.Path]) -> dict[str, str]:
    """Copies the carried files to `tokenizer/`. Returns their SHA-256 by name."""
    folder = content / "tokenizer"
    if not paths.is_remote(content):  # an interrupted run may have carried other files
        folder.rmtree(missing_ok=True)
    sha256 = {}
    for file in assets:
        atomic.make_directory(folder)
        data = file.read_bytes()
        atomic.write_bytes(folder / file.name, data)
        sha256[file.name] = hashlib.sha256(data).hexdigest()
    return sha256


def load(
    path: metadata.PathLike,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: sharding.Rules | None = None,
    unstacked: bool = False,
    by_layer: bool | None = None,
    allow_nonfinite: bool = False,
) -> tuple[BTLM, Params]:
    """Reads a checkpoint straight onto a device or a mesh.

    Args:
      path: a checkpoint directory or URL, written by `save`, the converter or training.
      dtype: dtype of float weights in memory, one of `weights.STORED_DTYPES`; None keeps the stored
        one.
      mesh: the weights are sharded over it, and each process reads only its parts; None puts them
        on the default device.
      rules: logical axis -> mesh axis; default `sharding.RULES`.
      unstacked: return unstacked weights (`params.unstack_params`), which decoding uses, without
        stacking them first. Quantized weights are always unstacked. On a CPU without a mesh the
        model then computes in the dtype of its weights (bfloat16 for quantized ones).
      by_layer: the old name of `unstacked`; deprecated.
      allow_nonfinite: load weights with NaN or Inf too, to inspect them.

    Returns:
      The model and its weights: stacked and padded for the mesh, or unstacked.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: not a checkpoint of this package, an unknown format, or arrays that are missing,
        unexpected or of the wrong shape; all are listed. Or the weights hold NaN or Inf, or finite
        ones would be infinite in `dtype`.
    """
    unstacked = unstacked_lib.unstacked_option(unstacked, by_layer)
    dtype = optional_dtype(dtype, "dtype", weights.STORED_DTYPES)
    meta = metadata.read_metadata(path)
    if meta.nonfinite and not allow_nonfinite:
        raise nonfinite_error(meta.path, meta.nonfinite)
    warn_of_changed_assets(meta)
    model = BTLM(
        meta.config,
        rules=rules or sharding.RULES,
        generation_config=read_generation_config(tokenizer_directory(meta.path)),
    )
    dtypes = {path: leaf.dtype for path, leaf in meta.leaves.items()}
    if unstacked or meta.quantization is not None:
        compute_dtype = unstacked_lib.decoding_dtype(meta, dtype, mesh)
        params = unstacked_lib.load_unstacked(
            meta.config,
            meta.read_part,
            dtypes,
            quantization=meta.quantization,
            dtype=dtype,
            mesh=mesh,
            rules=model.rules,
        )
        _check_values(meta, params, dtype, allow_nonfinite)
        return dataclasses.replace(model, compute_dtype=compute_dtype), params
    padding, shardings = sharding.param_layout(meta.config, mesh, model.rules)
    if dtype is not None:
        dtypes = dict.fromkeys(dtypes, dtype)
    targets = {metadata.ITEM: restore_targets(meta.config, dtypes, shardings, padding)}
    arrays = restore_items(meta.path, targets)[metadata.ITEM]
    try:
        params = stacking.stack_layers(meta.config, flatten_tree(arrays), shardings)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    params = unflatten_tree(params)
    _check_values(meta, params, dtype, allow_nonfinite)
    return model, params


def _check_values(
    meta: metadata.CheckpointMetadata, params: Params, dtype: np.dtype | None, allowed: bool
) -> None:
    """Checks that weights survived a conversion, and are finite if no record says so."""
    leaves = [leaf for leaf in meta.disk_leaves if leaf.part is None]
    stored = {path: leaf.dtype for path, leaf in meta.leaves.items()}
    narrowing.check_narrowed(params, leaves, stored, dtype, meta.read_part)
    unknown = meta.nonfinite is None and not allowed
    if unknown and (counts := finite.nonfinite_by_array(params)):
        raise nonfinite_error(meta.path, counts)


def nonfinite_error(path: metadata.PathLike, counts: Mapping[str, int]) -> ValueError:
    """Returns the error for a checkpoint whose weights are not finite.

    Args:
      path: the checkpoint.
      counts: as from `finite.nonfinite_by_array`.
    """
    return ValueError(
        f"{path} holds {finite.describe_nonfinite(counts)}, from which nothing can be computed: "
        "take an earlier checkpoint, or the original (btlm_jax.load(…, allow_nonfinite=True) "
        "loads it all the same)"
    )


def restore_targets(
    config: BTLMConfig,
    dtypes: Mapping[weights.Path, DTypeLike],
    shardings: Mapping[weights.Path, Any],
    padding: Mapping[str, int],
) -> Params:
    """Returns abstract arrays for Orbax to restore: the stored ones, padded and sharded.

    Args:
      config: the model.
      dtypes: dtypes in memory of the stored arrays, by path on disk.
      shardings: shardings of the stacked weights, by path in memory; other weights are left out.
      padding: padded sizes by logical axis.
    """
    targets = {}
    for leaf in weights.disk_leaves(config):
        if leaf.weight.path not in shardings:
            continue
        out = shardings[leaf.weight.path]
        out = out if leaf.layer is None else sharding.layer_sharding(out)
        shape = leaf.weight.padded(padding)
        targets[leaf.path] = jax.ShapeDtypeStruct(shape, dtypes[leaf.path], sharding=out)
    return unflatten_tree(targets)


def restore_items(path: epath.Path, targets: Mapping[str, Params]) -> dict[str, Params]:
    """Restores trees of arrays; Orbax pads shapes that are larger than stored with zeros.

    Args:
      path: the checkpoint.
      targets: abstract arrays by Orbax item.

    Raises:
      ValueError: files are damaged or missing.
    """
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    context.array_options.loading.enable_padding_and_truncation = True
    try:
        with context:
            items: Any = ocp.load_checkpointables(os.fspath(path), dict(targets))
    except damage.NOT_DAMAGE:
        raise
    except Exception as e:  # Orbax and TensorStore raise bare ones for damaged files
        raise damage.reading_error(path, e) from e
    for item, tree in targets.items():
        arrays = flatten_tree(items[item])
        # Orbax returns the target itself for an array that is missing on disk.
        missing = [p for p in flatten_tree(tree) if not isinstance(arrays.get(p), jax.Array)]
        if missing:
            names = join_first("/".join(p) for p in missing)
            raise damage.damaged_error(path, f"not restored: {names}")
    return items
