"""Quantization of a checkpoint of either format to an Orbax checkpoint in int8 or int4."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from btlm_jax import __version__
from btlm_jax.checkpoint import checkpoint, damage, metadata, zarr
from btlm_jax.checkpoint import quantization as q
from btlm_jax.checkpoint.assets import asset_files
from btlm_jax.checkpoint.quantize_arrays import QuantizationErrors
from btlm_jax.config import BTLMConfig
from btlm_jax.convert import auto
from btlm_jax.convert.conversion_report import ConversionReport, weights_digest
from btlm_jax.convert.hf.source_config import open_model
from btlm_jax.convert.threads import for_each_in_threads, num_threads_holding
from btlm_jax.convert.to_hf import check_assets
from btlm_jax.convert.to_orbax import (
    check_finite,
    recorded_nonfinite,
    source_origin,
    source_resume_key,
)
from btlm_jax.model import weights
from btlm_jax.utils import atomic, paths
from btlm_jax.utils.format import DEFAULT_MEMORY
from btlm_jax.utils.process_memory import peak_rss
from btlm_jax.utils.progress import Progress


@dataclasses.dataclass(frozen=True)
class FloatCheckpoint:
    """An opened checkpoint of floats, of either format.

    Attributes:
      config: the model, with its stored slopes.
      dtypes: dtype of every stored array, by path.
      blocks: yields an array in 1-D blocks of the size that `zarr.block_size` gives for elements of
        the width in bytes that is its second argument.
      assets: files to copy.
      origin: record of the origin for the quantized checkpoint.
      resume_key: facts that must be unchanged to resume interrupted work.
    """

    config: BTLMConfig
    dtypes: Mapping[weights.Path, np.dtype]
    blocks: Callable[[weights.DiskLeaf, int], Iterator[np.ndarray]]
    assets: list[epath.Path] | tuple[Path, ...]
    origin: Mapping[str, Any]
    resume_key: Mapping[str, Any]

    def nbytes(self, leaf: weights.DiskLeaf) -> int:
        """Returns the bytes of a stored array of floats."""
        return int(np.prod(leaf.weight.shape)) * self.dtypes[leaf.path].itemsize


def quantize(
    source: str | os.PathLike[str],
    target: metadata.PathLike,
    to: q.Quantization | str,
    *,
    revision: str | None = None,
    max_memory: int = DEFAULT_MEMORY,
    overwrite: bool = False,
) -> ConversionReport:
    """Converts a checkpoint of floats to an Orbax checkpoint in int8 or int4.

    `checkpoint.quantization` defines which weights are quantized and to which arrays; all others
    keep their dtype and their bits. Configuration, slopes and tokenizer files are copied as by
    `convert`. The checkpoint records the quantization errors. The same call resumes a quantization
    that was killed or failed; the result is then byte for byte that of an uninterrupted one.

    Args:
      source: a Hugging Face directory or Hub id, as for `convert`, or an Orbax checkpoint.
      target: a directory that does not exist yet, or a gs:// URL.
      to: a `Quantization`, or text for `Quantization.parse`: "int8", "int4", "int4:128".
      revision: branch, tag or commit on the Hub.
      max_memory: budget for weights in flight, in bytes; it must suffice for one weight and its
        result.
      overwrite: replace an existing checkpoint.

    Raises:
      FileNotFoundError, ConnectionError: the source does not exist or cannot be fetched.
      FileExistsError: the target exists.
      ValueError: as `convert`; or the source is quantized already, or its weights hold NaN or Inf.
      OSError: the disk is full or fails.
    """
    began = time.monotonic()
    to = q.Quantization.parse(to) if isinstance(to, str) else to
    paths.location(target, "target")
    atomic.refuse_existing(target, overwrite=overwrite, ours=metadata.is_btlm_checkpoint)
    floats = _open_floats(source, revision)
    config = floats.config
    leaves = list(weights.disk_leaves(config))
    thread_bytes = max(_bytes_in_flight(leaf, floats, to) for leaf in leaves)
    threads = num_threads_holding(max_memory, thread_bytes, "the largest weight and its result")
    stored = list(q.stored_leaves(config, to))
    nbytes = {x.path: _stored_nbytes(x, floats) for x in stored}
    with checkpoint.open_writer(
        target,
        config,
        assets=floats.assets,
        origin=floats.origin,
        overwrite=overwrite,
        key={**floats.resume_key, "to": dataclasses.asdict(to)},
        quantized=to,
    ) as writer:
        finished = {x.path for x in stored if writer.finished(x)}
        unfinished = [
            x for x in leaves if any(p.path not in finished for p in q.stored_parts(x, to))
        ]
        atomic.require_space(target, sum(n for path, n in nbytes.items() if path not in finished))
        total, remaining = (sum(map(floats.nbytes, xs)) for xs in (leaves, unfinished))
        with Progress(total, "B", "quantize", done=total - remaining) as progress:
            for_each_in_threads(
                unfinished,
                lambda leaf: _quantize_weight(writer, floats, leaf, to, progress),
                threads,
            )
        records = {x.hf_name: writer.finished(x) or {} for x in stored}
        check_finite(os.fspath(source), recorded_nonfinite(records), "quantize", None)
    errors = metadata.read_metadata(target).errors
    return ConversionReport(
        tensors=len(stored),
        resumed=len(finished),
        nbytes=sum(nbytes.values()),
        dtypes=Counter(x.dtype or str(floats.dtypes[x.path]) for x in stored),
        seconds=time.monotonic() - began,
        peak_rss=peak_rss(),
        digest=weights_digest({name: record["sha256"] for name, record in records.items()}),
        files=tuple(a.name for a in floats.assets),
        errors=errors,
    )


def _open_floats(source: str | os.PathLike[str], revision: str | None) -> FloatCheckpoint:
    """Opens the source of a quantization, whichever format it has."""
    if auto.is_huggingface(source):
        hf, config = open_model(source, revision=revision)
        names = {leaf.path: leaf.hf_name for leaf in weights.disk_leaves(config)}

        def from_hf(leaf: weights.DiskLeaf, width: int) -> Iterator[np.ndarray]:
            return hf.blocks(leaf.hf_name, zarr.block_size(leaf.weight.shape, width))

        return FloatCheckpoint(
            config,
            {path: hf.tensors[name].dtype for path, name in names.items()},
            from_hf,
            hf.assets,
            source_origin(hf, source, list(names.values())),
            source_resume_key(hf),
        )
    if revision is not None:
        raise ValueError(
            f"revision={revision!r} was given with {source}, an Orbax checkpoint, which has none: "
            "omit it"
        )
    meta = metadata.read_metadata(source)
    if meta.quantization is not None:
        raise ValueError(
            f"{source} is quantized already ({meta.quantization}): quantize the checkpoint it was "
            "made from"
        )
    check_assets(meta)
    # Before anything is written.
    check_finite(os.fspath(source), meta.nonfinite or {}, "quantize", None)

    def from_orbax(leaf: weights.DiskLeaf, width: int) -> Iterator[np.ndarray]:
        digest = zarr.Digest()
        yield from digest.watch(meta.blocks(leaf, width))
        if digest.sha256 != meta.sha256.get(leaf.path, digest.sha256):
            reason = f"{'/'.join(leaf.path)}: its bytes do not match the recorded SHA-256"
            raise damage.damaged_error(meta.path, reason)

    mark = (meta.path / metadata.MARKER_FILE).read_bytes()
    return FloatCheckpoint(
        meta.config,
        {path: np.dtype(leaf.dtype) for path, leaf in meta.leaves.items()},
        from_orbax,
        asset_files(meta.path),
        {**meta.origin, "source": os.fspath(source)},
        {
            "by": f"quantize {__version__}, format {metadata.FORMAT}",
            "checkpoint": hashlib.sha256(mark).hexdigest(),
        },
    )


def _stored_nbytes(leaf: weights.DiskLeaf, floats: FloatCheckpoint) -> int:
    dtype = floats.dtypes[leaf.path] if leaf.dtype is None else np.dtype(leaf.dtype)
    return int(np.prod(leaf.shape)) * dtype.itemsize


def _bytes_in_flight(leaf: weights.DiskLeaf, floats: FloatCheckpoint, to: q.Quantization) -> int:
    """Returns the most memory that a thread needs to quantize a weight, in bytes."""
    block = zarr.BLOCK_BYTES
    values, *scales = q.stored_parts(leaf, to)
    source, result = floats.nbytes(leaf), _stored_nbytes(values, floats)
    if leaf.weight.stacked and scales:
        # The whole weight, and either blocks being read or the result in two layouts.
        return source + max(3 * block, 2 * result + block)
    # Block by block: one being quantized, one being read and one being written.
    return 3 * min(source, block * floats.dtypes[leaf.path].itemsize) + 2 * block


def _quantize_weight(
    writer: checkpoint.CheckpointWriter,
    floats: FloatCheckpoint,
    leaf: weights.DiskLeaf,
    to: q.Quantization,
    progress: Progress,
) -> None:
    """Reads one weight and writes its arrays: values and scales, or itself in another dtype."""
    stored = q.stored_parts(leaf, to)
    dtype = np.dtype(stored[0].dtype or floats.dtypes[leaf.path])

    def blocks() -> Iterator[np.ndarray]:
        for block in floats.blocks(leaf, dtype.itemsize):
            progress.update(block.nbytes)
            yield block

    if len(stored) == 1:
        writer.write(leaf, dtype, (block.astype(dtype, copy=False) for block in blocks()))
        return
    values, scales = stored
    if leaf.weight.stacked:
        result = q.quantize_array(
            zarr.join_blocks(blocks(), leaf.weight.shape, floats.dtypes[leaf.path]), values, to
        )
        writer.write(values, dtype, zarr.split_blocks(result.values))
        scale_blocks = zarr.split_blocks(result.scales)
        writer.write(scales, result.scales.dtype, scale_blocks, result.errors.relative())
        return
    # Embedding and head have a scale per row, so that their blocks can be quantized one by one.
    scales_of_blocks, errors_of_blocks = [], []

    def quantized() -> Iterator[np.ndarray]:
        for block in blocks():
            result = q.quantize_array(block.reshape(-1, leaf.weight.shape[1]), values, to)
            scales_of_blocks.append(result.scales)
            errors_of_blocks.append(result.errors)
            yield result.values.reshape(-1)

    writer.write(values, dtype, quantized())
    errors = QuantizationErrors(*np.sum(errors_of_blocks, 0).tolist())
    all_scales = np.concatenate(scales_of_blocks)
    writer.write(scales, all_scales.dtype, zarr.split_blocks(all_scales), errors.relative())
