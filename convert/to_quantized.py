"""A checkpoint of either format -> Orbax in int8 or int4, weight by weight."""

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
from btlm_jax.checkpoint import checkpoint, metadata, zarr
from btlm_jax.checkpoint import quantization as q
from btlm_jax.checkpoint.assets import asset_files
from btlm_jax.config import BTLMConfig
from btlm_jax.convert import auto
from btlm_jax.convert.conversion_report import ConversionReport, weights_digest
from btlm_jax.convert.hf.source import open_hf
from btlm_jax.convert.hf.source_config import read_source_config
from btlm_jax.convert.threads import for_each_in_threads, num_threads_holding
from btlm_jax.convert.to_orbax import check_finite, source_origin, source_resume_key
from btlm_jax.model import weights
from btlm_jax.utils import atomic
from btlm_jax.utils.format import DEFAULT_MEMORY
from btlm_jax.utils.process_memory import peak_rss
from btlm_jax.utils.progress import Progress


@dataclasses.dataclass(frozen=True)
class _Floats:
    """A checkpoint of floats, of either format.

    Attributes:
      config: the model, with its stored slopes.
      dtypes: of every stored array, by path.
      blocks: yields an array in 1-D blocks, of the size that `zarr.block_size` gives for
        elements of so many bytes.
      assets: files to carry along.
      origin: what the quantized checkpoint says of where it came from.
      key: what must be the same for interrupted work to be continued.
    """

    config: BTLMConfig
    dtypes: Mapping[weights.Path, np.dtype]
    blocks: Callable[[weights.DiskLeaf, int], Iterator[np.ndarray]]
    assets: list[epath.Path] | tuple[Path, ...]
    origin: Mapping[str, Any]
    key: Mapping[str, Any]

    def nbytes(self, leaf: weights.DiskLeaf) -> int:
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

    `checkpoint.quantization` defines which weights are quantized; everything else keeps its dtype
    and its bits, and configuration, slopes and tokenizer files are carried along as `convert` does.
    The errors made are recorded in the checkpoint. Work that was killed or failed is continued by
    the same call, with the same result, byte for byte, as work that was not.

    Args:
      source: a Hugging Face directory or Hub id, as for `convert`, or an Orbax checkpoint.
      target: a directory that does not exist yet, or a gs:// URL.
      to: a `Quantization`, or what `Quantization.parse` reads: "int8", "int4", "int4:128".
      revision: branch, tag or commit on the Hub.
      max_memory: bytes of weights in flight; at least what one kernel and its result take.
      overwrite: replace an existing checkpoint.

    Raises:
      FileNotFoundError, ConnectionError: the source is not there.
      FileExistsError: the target exists.
      ValueError: as `convert`; or the source is quantized already, or weights that are to be
        quantized hold NaN or Inf.
      OSError: the disk is full or fails.
    """
    began = time.monotonic()
    to = q.Quantization.parse(to) if isinstance(to, str) else to
    atomic.refuse_existing(target, overwrite=overwrite, ours=metadata.is_btlm_checkpoint)
    floats = _open(source, revision)
    config = floats.config
    leaves = list(weights.disk_leaves(config))
    each = max(_held(leaf, floats, to) for leaf in leaves)
    threads = num_threads_holding(
        max_memory, each, "the largest weight, as it was and as it will be"
    )
    stored = list(q.stored_leaves(config, to))
    nbytes = {x.path: _stored_nbytes(x, floats) for x in stored}
    with checkpoint.open_writer(
        target,
        config,
        assets=floats.assets,
        origin=floats.origin,
        overwrite=overwrite,
        key={**floats.key, "to": dataclasses.asdict(to)},
        quantized=to,
    ) as writer:
        done = {x.path for x in stored if writer.finished(x)}
        todo = [x for x in leaves if any(p.path not in done for p in q.stored_parts(x, to))]
        atomic.require_space(target, sum(n for path, n in nbytes.items() if path not in done))
        total, left = (sum(map(floats.nbytes, some)) for some in (leaves, todo))
        with Progress(total, "B", "quantize", done=total - left) as progress:
            for_each_in_threads(
                todo, lambda leaf: _write(writer, floats, leaf, to, progress), threads
            )
        records = {x.hf_name: writer.finished(x) or {} for x in stored}
        check_finite(os.fspath(source), records, False)
    errors = metadata.read_metadata(target).errors
    return ConversionReport(
        tensors=len(stored),
        resumed=len(done),
        nbytes=sum(nbytes.values()),
        dtypes=Counter(x.dtype or str(floats.dtypes[x.path]) for x in stored),
        seconds=time.monotonic() - began,
        peak_rss=peak_rss(),
        digest=weights_digest({name: record["sha256"] for name, record in records.items()}),
        files=tuple(a.name for a in floats.assets),
        errors=errors,
    )


def _open(source: str | os.PathLike[str], revision: str | None) -> _Floats:
    if auto.is_huggingface(source):
        hf = open_hf(source, revision=revision)
        config = read_source_config(hf)
        names = {leaf.path: leaf.hf_name for leaf in weights.disk_leaves(config)}

        def from_hf(leaf: weights.DiskLeaf, width: int) -> Iterator[np.ndarray]:
            return hf.blocks(leaf.hf_name, zarr.block_size(leaf.weight.shape, width))

        return _Floats(
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
            "drop it"
        )
    meta = metadata.read_metadata(source)
    if meta.quantization is not None:
        raise ValueError(
            f"{source} is quantized already ({meta.quantization}): quantize the checkpoint it was "
            "made from"
        )

    def from_orbax(leaf: weights.DiskLeaf, width: int) -> Iterator[np.ndarray]:
        hashed = hashlib.sha256()
        for block in meta.blocks(leaf, width):
            hashed.update(block.view(np.uint8).data)
            yield block
        if hashed.hexdigest() != meta.sha256.get(leaf.path, hashed.hexdigest()):
            why = f"{'/'.join(leaf.path)}: its bytes do not match the recorded SHA-256"
            raise metadata.damaged_error(meta.path, why)

    mark = (meta.path / metadata.MARKER_FILE).read_bytes()
    return _Floats(
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


def _stored_nbytes(leaf: weights.DiskLeaf, floats: _Floats) -> int:
    dtype = floats.dtypes[leaf.path] if leaf.dtype is None else np.dtype(leaf.dtype)
    return int(np.prod(leaf.shape)) * dtype.itemsize


def _held(leaf: weights.DiskLeaf, floats: _Floats, to: q.Quantization) -> int:
    """The bytes that a thread holds at most, to quantize a weight."""
    block = zarr.BLOCK_BYTES
    first, *scales = q.stored_parts(leaf, to)
    whole, result = floats.nbytes(leaf), _stored_nbytes(first, floats)
    if leaf.weight.stacked and scales:  # blocks that are read; then the result in two layouts
        return whole + max(3 * block, 2 * result + block)
    # In blocks: each in hand, and on its way from and to the disk.
    return 3 * min(whole, block * floats.dtypes[leaf.path].itemsize) + 2 * block


def _write(
    writer: checkpoint.CheckpointWriter,
    floats: _Floats,
    leaf: weights.DiskLeaf,
    to: q.Quantization,
    progress: Progress,
) -> None:
    """Writes the arrays of one weight."""
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
        found = q.quantize_array(_whole(blocks(), leaf, floats), values, to)
        writer.write(values, dtype, _cut(found.values, values))
        writer.write(
            scales, found.scales.dtype, _cut(found.scales, scales), found.errors.relative()
        )
        return
    rows, sums = [], []

    def quantized() -> Iterator[np.ndarray]:
        for block in blocks():
            found = q.quantize_array(block.reshape(-1, leaf.weight.shape[1]), values, to)
            rows.append(found.scales)
            sums.append(found.errors)
            yield found.values.reshape(-1)

    writer.write(values, dtype, quantized())
    errors = q.QuantizationErrors(*np.sum(sums, 0).tolist())
    together = np.concatenate(rows)
    writer.write(scales, together.dtype, _cut(together, scales), errors.relative())


def _whole(blocks: Iterator[np.ndarray], leaf: weights.DiskLeaf, floats: _Floats) -> np.ndarray:
    flat = np.empty(int(np.prod(leaf.weight.shape)), floats.dtypes[leaf.path])
    start = 0
    for block in blocks:
        flat[start : start + len(block)] = block
        start += len(block)
    return flat.reshape(leaf.weight.shape)


def _cut(x: np.ndarray, leaf: weights.DiskLeaf) -> Iterator[np.ndarray]:
    """An array in the blocks that `checkpoint.CheckpointWriter.write` takes."""
    flat, size = x.reshape(-1), zarr.block_size(leaf.shape, x.dtype.itemsize)
    yield from (flat[i : i + size] for i in range(0, len(flat), size))
