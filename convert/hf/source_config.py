"""Configuration of an opened Hugging Face checkpoint, after checking its tensors against it."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from btlm_jax.checkpoint import zarr
from btlm_jax.config import BTLMConfig
from btlm_jax.convert.hf.source import HFSource
from btlm_jax.convert.hf.tensor_names import EMBEDDING, LM_HEAD, MASK_BUFFER, SLOPES
from btlm_jax.data.tokenizer import check_vocabulary, load_tokenizer
from btlm_jax.model import weights

logger = logging.getLogger(__name__)


def read_source_config(hf: HFSource) -> BTLMConfig:
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
        stored = hf.read_tensor(SLOPES).astype(np.float64).ravel()
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
        optional[LM_HEAD] = (config.vocab_size, config.n_embd)
    ignored = sorted(n for n in hf.tensors if n not in expected and MASK_BUFFER.fullmatch(n))
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
    if LM_HEAD in optional and LM_HEAD in hf.tensors and not _same_bits(hf, LM_HEAD, EMBEDDING):
        raise ValueError(
            f"{hf.directory}: tie_word_embeddings is true, but {LM_HEAD} differs from {EMBEDDING}; "
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
