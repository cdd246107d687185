"""Hugging Face -> Orbax: every tensor through the table of weights, block by block, bit for bit."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from btlm_jax import __version__
from btlm_jax.checkpoint import checkpoint, metadata, zarr
from btlm_jax.config import BTLMConfig
from btlm_jax.convert.hf.source import HFSource, open_hf
from btlm_jax.convert.conversion_report import Report, digest, peak_rss
from btlm_jax.convert.threads import for_each, workers
from btlm_jax.data.tokenizer import check_vocabulary, load_tokenizer
from btlm_jax.model import weights
from btlm_jax.utils import atomic
from btlm_jax.utils.byte_size import DEFAULT_MEMORY
from btlm_jax.utils.progress import Progress

logger = logging.getLogger(__name__)

SLOPES = "transformer.relative_pe.slopes"
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
# Buffers of old checkpoints of the family: the causal mask, rebuilt from the shape.
IGNORED = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")


def convert(
    source: str | os.PathLike[str],
    target: metadata.PathLike,
    *,
    revision: str | None = None,
    max_memory: int = DEFAULT_MEMORY,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
) -> Report:
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
    atomic.refuse_existing(target, overwrite=overwrite, ours=metadata.is_ours)
    threads = workers(max_memory)
    hf = open_hf(source, revision=revision)
    config = read_config(hf)
    leaves = list(weights.disk_leaves(config))
    with checkpoint.writer(
        target,
        config,
        assets=hf.assets,
        origin=origin_of(hf, source, [leaf.hf_name for leaf in leaves]),
        overwrite=overwrite,
        key=key_of(hf),
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

            for_each(todo, one, threads)
        records = {leaf.hf_name: writer.finished(leaf) or {} for leaf in leaves}
        check_finite(str(hf.directory), records, allow_nonfinite)
    return Report(
        tensors=len(leaves),
        resumed=len(leaves) - len(todo),
        nbytes=total,
        dtypes=Counter(str(hf.tensors[leaf.hf_name].dtype) for leaf in leaves),
        seconds=time.monotonic() - began,
        peak_rss=peak_rss(),
        digest=digest({name: record["sha256"] for name, record in records.items()}),
        files=tuple(a.name for a in hf.assets),
    )


def origin_of(hf: HFSource, source: str | os.PathLike[str], names: list[str]) -> dict[str, Any]:
    """What a checkpoint says of where it came from (`manifest.Metadata.origin`)."""
    return {
        "source": os.fspath(source),
        "revision": hf.revision,
        "files": hf.description,
        "hf_config": hf.config,
        "dtypes": sorted({str(hf.tensors[name].dtype) for name in names}),
        "slopes_dtype": str(hf.tensors[SLOPES].dtype) if SLOPES in hf.tensors else None,
    }


def key_of(hf: HFSource) -> dict[str, Any]:
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
      records: of every array, by name, from `checkpoint.Writer`.
      allowed: what the user said to it.
    """
    bad = [f"{name}: {r['nonfinite']}" for name, r in records.items() if r["nonfinite"]]
    if not bad:
        return
    found = f"{source} holds NaN or Inf in {len(bad)} tensors:\n  " + "\n  ".join(bad)
    if not allowed:
        raise ValueError(f"{found}\nPass --allow-nonfinite to convert them as they are")
    logger.warning("%s", found)


def read_config(hf: HFSource) -> BTLMConfig:
    """The configuration of an opened checkpoint, with its stored slopes, after checking its keys.

    Raises:
      ValueError: see `convert`.
    """
    try:
        config = BTLMConfig.from_hf(hf.config)
    except ValueError as e:
        raise ValueError(f"{hf.directory / 'config.json'}: {e}") from None
    _check_tensors(hf, config)
    if config.alibi and SLOPES in hf.tensors:
        stored = hf.read(SLOPES).astype(np.float64).ravel()
        config = dataclasses.replace(config, alibi_slopes=tuple(float(s) for s in stored))
    if any(a.name in ("tokenizer.json", "vocab.json") for a in hf.assets):
        check_vocabulary(load_tokenizer(hf.directory), config.vocab_size)
    else:
        logger.warning("%s has no tokenizer files: `btlm generate` will need them", hf.directory)
    return config


def _check_tensors(hf: HFSource, config: BTLMConfig) -> None:
    """Compares the source's keys, shapes and dtypes with the table; raises with all differences."""
    if config.n_layer > len(hf.tensors):  # before listing what a wild number would have
        raise ValueError(
            f"{hf.directory}: config.json says n_layer = {config.n_layer}, the files hold only "
            f"{len(hf.tensors)} tensors"
        )
    expected = {leaf.hf_name: leaf.weight.hf_shape for leaf in weights.disk_leaves(config)}
    optional: dict[str, tuple[int, ...]] = {}
    if config.alibi:
        optional[SLOPES] = (config.n_head, 1)
    if config.tie_word_embeddings:
        optional[HEAD] = (config.vocab_size, config.n_embd)
    ignored = sorted(n for n in hf.tensors if n not in expected and IGNORED.fullmatch(n))
    if ignored:
        logger.info("ignored mask buffers: %s", ", ".join(ignored))
    known = expected | optional
    problems = [f"missing: {n}" for n in expected if n not in hf.tensors]
    problems += [f"unexpected: {n}" for n in hf.tensors if n not in known and n not in ignored]
    for name, shape in known.items():
        info = hf.tensors.get(name)
        if info is None:
            continue
        if info.shape != shape:
            problems.append(f"{name}: found shape {info.shape}, expected {shape}")
        if str(info.dtype) not in weights.STORED_DTYPES:
            expected_dtypes = " or ".join(weights.STORED_DTYPES)
            problems.append(f"{name}: found dtype {info.dtype}, expected {expected_dtypes}")
    if problems:
        raise ValueError(
            f"{hf.directory}: the weights do not match config.json:\n  " + "\n  ".join(problems)
        )
    if HEAD in optional and HEAD in hf.tensors and not _same_bits(hf, HEAD, EMBEDDING):
        raise ValueError(
            f"{hf.directory}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; "
            "set tie_word_embeddings to false in config.json if the head is meant to be untied"
        )


def _same_bits(hf: HFSource, a: str, b: str) -> bool:
    one, two = hf.tensors[a], hf.tensors[b]
    if one.dtype != two.dtype:
        return False
    if one.offset is not None and (one.file, one.offset) == (two.file, two.offset):
        return True  # torch saves tied weights once, under both names
    size = zarr.BLOCK_BYTES // one.dtype.itemsize
    pairs = zip(hf.blocks(a, size), hf.blocks(b, size), strict=True)
    return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in pairs)
