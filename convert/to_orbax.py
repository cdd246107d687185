"""Hugging Face -> Orbax: every tensor through the table of weights, block by block, bit for bit."""

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
from btlm_jax.convert.hf.source import HFSource, open_hf
from btlm_jax.convert.hf.source_config import read_source_config
from btlm_jax.convert.hf.tensor_names import SLOPES
from btlm_jax.convert.threads import for_each_in_threads, num_threads
from btlm_jax.model import weights
from btlm_jax.utils import atomic
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

    Every array keeps its dtype and its bits; stored ALiBi slopes are kept exactly, with the
    configuration; tokenizer files and the original `config.json` are carried along. Arrays are
    read and written in blocks. A conversion that was killed or failed is continued by the same
    call, with the same result, byte for byte, as one that was not.

    Args:
      source: a directory with `config.json` and safetensors or `.bin` weights, single or sharded,
        or a Hub id such as "cerebras/btlm-3b-8k-base".
      target: a directory that does not exist yet, or a gs:// URL.
      revision: branch, tag or commit on the Hub.
      max_memory: bytes of weights in flight.
      allow_nonfinite: convert weights that hold NaN or Inf too, with a warning.
      overwrite: replace an existing checkpoint.

    Raises:
      FileNotFoundError, ConnectionError: the source is not there.
      FileExistsError: the target exists.
      ValueError: a damaged file, an unsupported configuration, NaN or Inf, a budget below one
        block, or keys that are missing, unexpected or of the wrong shape or dtype (all listed).
      OSError: the disk is full or fails.
    """
    began = time.monotonic()
    atomic.refuse_existing(target, overwrite=overwrite, ours=metadata.is_btlm_checkpoint)
    threads = num_threads(max_memory)
    hf = open_hf(source, revision=revision)
    config = read_source_config(hf)
    leaves = list(weights.disk_leaves(config))
    with checkpoint.open_writer(
        target,
        config,
        assets=hf.assets,
        origin=source_origin(hf, source, [leaf.hf_name for leaf in leaves]),
        overwrite=overwrite,
        key=source_resume_key(hf),
    ) as writer:
        todo = [leaf for leaf in leaves if not writer.finished(leaf)]
        total = sum(hf.tensors[leaf.hf_name].nbytes for leaf in leaves)
        left = sum(hf.tensors[leaf.hf_name].nbytes for leaf in todo)
        atomic.require_space(target, left)
        with Progress(total, "B", "convert", done=total - left) as progress:

            def one(leaf: weights.DiskLeaf) -> None:
                info = hf.tensors[leaf.hf_name]
                size = zarr.block_size(leaf.weight.shape, info.dtype.itemsize)

                def blocks():
                    for block in hf.blocks(leaf.hf_name, size):
                        yield block
                        progress.update(block.nbytes)

                writer.write(leaf, info.dtype, blocks())

            for_each_in_threads(todo, one, threads)
        records = {leaf.hf_name: writer.finished(leaf) or {} for leaf in leaves}
        check_finite(str(hf.directory), records, allow_nonfinite)
    return ConversionReport(
        tensors=len(leaves),
        resumed=len(leaves) - len(todo),
        nbytes=total,
        dtypes=Counter(str(hf.tensors[leaf.hf_name].dtype) for leaf in leaves),
        seconds=time.monotonic() - began,
        peak_rss=peak_rss(),
        digest=weights_digest({name: record["sha256"] for name, record in records.items()}),
        files=tuple(a.name for a in hf.assets),
    )


def source_origin(hf: HFSource, source: str | os.PathLike[str], names: list[str]) -> dict[str, Any]:
    """What a checkpoint says of where it came from (`metadata.Metadata.origin`)."""
    return {
        "source": os.fspath(source),
        "revision": hf.revision,
        "files": hf.description,
        "hf_config": hf.config,
        "dtypes": sorted({str(hf.tensors[name].dtype) for name in names}),
        "slopes_dtype": str(hf.tensors[SLOPES].dtype) if SLOPES in hf.tensors else None,
    }


def source_resume_key(hf: HFSource) -> dict[str, Any]:
    """What must be the same for an interrupted conversion to be continued."""
    return {
        "by": f"convert {__version__}, format {metadata.FORMAT}",
        "config": hf.config,
        "files": {file.name: list(facts) for file, facts in hf.identities.items()},
    }


def check_finite(source: str, records: Mapping[str, Any], allowed: bool) -> None:
    """Raises ValueError if arrays that were written hold NaN or Inf; warns where that is allowed.

    Args:
      source: where they came from.
      records: of every array, by name, from `checkpoint.CheckpointWriter`.
      allowed: what the user said to it.
    """
    bad = [f"{name}: {r['nonfinite']}" for name, r in records.items() if r["nonfinite"]]
    if not bad:
        return
    found = f"{source} holds NaN or Inf in {len(bad)} tensors:\n  " + "\n  ".join(bad)
    if not allowed:
        raise ValueError(f"{found}\nPass --allow-nonfinite to convert them as they are")
    logger.warning("%s", found)
