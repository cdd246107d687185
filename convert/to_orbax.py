"""Conversion of Hugging Face checkpoints to Orbax, bit for bit and in bounded memory."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from btlm_jax import __version__
from btlm_jax.checkpoint import checkpoint, metadata, zarr
from btlm_jax.convert.conversion_report import ConversionReport, weights_digest
from btlm_jax.convert.hf.source import HFSource
from btlm_jax.convert.hf.source_config import open_model
from btlm_jax.convert.hf.tensor_names import SLOPES
from btlm_jax.convert.threads import for_each_in_threads, num_threads
from btlm_jax.model import finite, weights
from btlm_jax.utils import atomic, paths
from btlm_jax.utils.format import DEFAULT_MEMORY
from btlm_jax.utils.process_memory import peak_rss
from btlm_jax.utils.progress import Progress

logger = logging.getLogger(__name__)


def convert(
    source: str | os.PathLike[str],
    target: metadata.PathLike,
    *,
    revision: str | None = None,
    max_memory: int = DEFAULT_MEMORY,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
) -> ConversionReport:
    """Converts a Hugging Face checkpoint to an Orbax checkpoint, without loss.

    Every tensor keeps its dtype and its bits, the stored ALiBi slopes are kept exactly, and the
    tokenizer files and the original `config.json` are copied. Tensors are read and written in
    blocks. The same call resumes a conversion that was killed or failed; the result is then byte
    for byte that of an uninterrupted conversion.

    Args:
      source: a directory with `config.json` and safetensors or `.bin` weights, single or sharded,
        or a Hub id such as "cerebras/btlm-3b-8k-base".
      target: a directory that does not exist yet, or a gs:// URL.
      revision: branch, tag or commit on the Hub.
      max_memory: budget for weights in flight, in bytes.
      allow_nonfinite: convert weights with NaN or Inf too, with a warning.
      overwrite: replace an existing checkpoint.

    Raises:
      FileNotFoundError, ConnectionError: the source does not exist or cannot be fetched.
      FileExistsError: the target exists.
      ValueError: a damaged file, an unsupported configuration, NaN or Inf, a budget too small for
        one block, or tensors that are missing, unexpected or of the wrong shape or dtype (the
        message lists all of them).
      OSError: the disk is full or fails.
    """
    began = time.monotonic()
    paths.location(target, "target")
    atomic.refuse_existing(target, overwrite=overwrite, ours=metadata.is_btlm_checkpoint)
    threads = num_threads(max_memory)
    hf, config = open_model(source, revision=revision)
    leaves = list(weights.disk_leaves(config))
    with checkpoint.open_writer(
        target,
        config,
        assets=hf.assets,
        origin=source_origin(hf, source, [leaf.hf_name for leaf in leaves]),
        overwrite=overwrite,
        key=source_resume_key(hf),
    ) as writer:
        unfinished = [leaf for leaf in leaves if not writer.finished(leaf)]
        total = sum(hf.tensors[leaf.hf_name].nbytes for leaf in leaves)
        remaining = sum(hf.tensors[leaf.hf_name].nbytes for leaf in unfinished)
        atomic.require_space(target, remaining)
        with Progress(total, "B", "convert", done=total - remaining) as progress:

            def convert_tensor(leaf: weights.DiskLeaf) -> None:
                info = hf.tensors[leaf.hf_name]
                size = zarr.block_size(leaf.weight.shape, info.dtype.itemsize)

                def blocks():
                    for block in hf.blocks(leaf.hf_name, size):
                        yield block
                        progress.update(block.nbytes)

                writer.write(leaf, info.dtype, blocks())

            for_each_in_threads(unfinished, convert_tensor, threads)
        records = {leaf.hf_name: writer.finished(leaf) or {} for leaf in leaves}
        check_finite(str(hf.directory), recorded_nonfinite(records), "convert", allow_nonfinite)
    return ConversionReport(
        tensors=len(leaves),
        resumed=len(leaves) - len(unfinished),
        nbytes=total,
        dtypes=Counter(str(hf.tensors[leaf.hf_name].dtype) for leaf in leaves),
        seconds=time.monotonic() - began,
        peak_rss=peak_rss(),
        digest=weights_digest({name: record["sha256"] for name, record in records.items()}),
        files=tuple(a.name for a in hf.assets),
    )


def source_origin(hf: HFSource, source: str | os.PathLike[str], names: list[str]) -> dict[str, Any]:
    """Returns the record of a checkpoint's origin (`metadata.CheckpointMetadata.origin`).

    Args:
      hf: the opened source.
      source: the source as the user named it.
      names: tensors that are converted.
    """
    return {
        "source": os.fspath(source),
        "revision": hf.revision,
        "files": hf.description,
        "hf_config": hf.config,
        "dtypes": sorted({str(hf.tensors[name].dtype) for name in names}),
        "slopes_dtype": str(hf.tensors[SLOPES].dtype) if SLOPES in hf.tensors else None,
    }


def source_resume_key(hf: HFSource) -> dict[str, Any]:
    """Returns the facts about a source that must be unchanged to resume a conversion of it."""
    return {
        "by": f"convert {__version__}, format {metadata.FORMAT}",
        "config": hf.config,
        "files": {file.name: list(facts) for file, facts in hf.identities.items()},
    }


def check_finite(source: str, counts: Mapping[str, int], verb: str, allowed: bool | None) -> None:
    """Checks that arrays hold no NaN or Inf.

    Args:
      source: the source as the user named it.
      counts: number of NaN and Inf by array, of those that hold any.
      verb: what is being done.
      allowed: log a warning instead of raising; None where that is impossible.

    Raises:
      ValueError: some do.
    """
    if not counts:
        return
    message = f"{source} holds {finite.describe_nonfinite(counts)}"
    if allowed:
        logger.warning("%s", message)
        return
    advice = f"pass allow_nonfinite=True to {verb} them unchanged"
    if allowed is None:
        advice = f"they cannot be used to {verb}: take an earlier checkpoint, or the original"
    raise ValueError(f"{message}; {advice}")


def recorded_nonfinite(records: Mapping[str, Any]) -> dict[str, int]:
    """Returns the number of NaN and Inf by array, of those that hold any.

    Args:
      records: the record of every array, by name, from `checkpoint.CheckpointWriter`.
    """
    return {
        name: record["nonfinite"] for name, record in records.items() if record.get("nonfinite")
    }
