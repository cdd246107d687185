"""Hugging Face -> Orbax: every tensor through the table of weights, bit for bit."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from btlm_jax import checkpoint, staging, weights
from btlm_jax.config import BTLMConfig
from btlm_jax.progress import Progress
from btlm_jax.tokenizer import check_vocabulary, load_tokenizer

from .hf_source import HFSource, open_hf

logger = logging.getLogger(__name__)

SLOPES = "transformer.relative_pe.slopes"
HEAD = "lm_head.weight"
# Buffers of old checkpoints of the family: the causal mask, rebuilt from the shape.
IGNORED = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")


class Report(NamedTuple):
    """What a conversion did."""

    config: BTLMConfig
    tensors: int
    nbytes: int
    dtypes: dict[str, int]  # dtype -> number of tensors
    assets: tuple[str, ...]


def convert(
    source: str | Path, target: str | Path, *, revision: str | None = None, overwrite: bool = False
) -> Report:
    """Converts a Hugging Face checkpoint to an Orbax checkpoint, without loss.

    Every array keeps its dtype and its bits; stored ALiBi slopes are kept exactly, with the
    configuration; tokenizer files and the original `config.json` are carried along.

    Args:
      source: a directory with `config.json` and safetensors or `.bin` weights, single or sharded,
        or a Hub id such as "cerebras/btlm-3b-8k-base".
      target: a directory that does not exist yet.
      revision: branch, tag or commit on the Hub.
      overwrite: replace an existing checkpoint.

    Raises:
      FileNotFoundError, ConnectionError: the source is not there.
      FileExistsError: the target exists.
      ValueError: a damaged file, an unsupported configuration, or keys that are missing,
        unexpected or of the wrong shape or dtype (all listed).
    """
    staging.refuse_existing(target, overwrite=overwrite, ours=checkpoint.is_ours)
    hf = open_hf(source, revision=revision)
    config = read_config(hf)
    leaves = list(weights.disk_leaves(config))
    total = sum(_nbytes(hf.tensors[leaf.hf_name]) for leaf in leaves)
    origin = {
        "source": str(source),
        "revision": revision,
        "files": hf.description,
        "hf_config": hf.config,
        "slopes_dtype": str(hf.tensors[SLOPES].dtype) if SLOPES in hf.tensors else None,
    }
    out = checkpoint.writer(target, config, assets=hf.assets, origin=origin, overwrite=overwrite)
    dtypes: dict[str, int] = {}
    with out as write, Progress(total, "B", "convert") as progress:
        for group in checkpoint.by_layer(config):
            arrays = {}
            for leaf in group:
                array = hf.read(leaf.hf_name).reshape(leaf.weight.shape)
                dtypes[str(array.dtype)] = dtypes.get(str(array.dtype), 0) + 1
                arrays[leaf.path] = array
            write(arrays)
            progress.update(sum(a.nbytes for a in arrays.values()))
    return Report(config, len(leaves), total, dtypes, tuple(a.name for a in hf.assets))


def read_config(hf: HFSource) -> BTLMConfig:
    """The configuration of an opened checkpoint, with its stored slopes, after checking its keys.

    Raises:
      ValueError: see `convert`.
    """
    config = BTLMConfig.from_hf(hf.config)
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
    expected = {leaf.hf_name: leaf.weight.hf_shape for leaf in weights.disk_leaves(config)}
    optional: dict[str, tuple[int, ...]] = {}
    if config.alibi:
        optional[SLOPES] = (config.n_head, 1)
    if config.tie_word_embeddings:
        optional[HEAD] = (config.vocab_size, config.n_embd)
    ignored = [n for n in hf.tensors if n not in expected and IGNORED.fullmatch(n)]
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
    if HEAD in optional and HEAD in hf.tensors and not _same_bits(hf):
        raise ValueError(
            f"{hf.directory}: tie_word_embeddings is true, but {HEAD} differs from "
            "transformer.wte.weight; set tie_word_embeddings to false in config.json if the head "
            "is meant to be untied"
        )


def _same_bits(hf: HFSource) -> bool:
    head, embedding = hf.read(HEAD), hf.read("transformer.wte.weight")
    return head.dtype == embedding.dtype and head.tobytes() == embedding.tobytes()


def _nbytes(info: Any) -> int:
    return int(np.prod(info.shape, dtype=np.int64)) * info.dtype.itemsize
