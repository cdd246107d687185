"""The configuration of an opened Hugging Face checkpoint, checked against its tensors."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from btlm_jax.checkpoint import zarr
from btlm_jax.config import BTLMConfig, Positions
from btlm_jax.convert.hf.source import HFSource
from btlm_jax.convert.hf.tensor_names import EMBEDDING, LM_HEAD, MASK_BUFFER, SLOPES
from btlm_jax.data.tokenizer import check_vocabulary, load_tokenizer
from btlm_jax.model import weights

logger = logging.getLogger(__name__)


def read_source_config(hf: HFSource) -> BTLMConfig:
    """Returns the configuration, with the stored ALiBi slopes, after checking the tensors.

    Raises:
      ValueError: an unsupported configuration; tensors that are missing, unexpected or of the wrong
        shape or dtype (all listed); a tied head that differs from the embedding; or a tokenizer
        whose ids exceed the vocabulary.
    """
    try:
        config = BTLMConfig.from_hf(hf.config)
    except ValueError as e:
        raise ValueError(f"{hf.directory / 'config.json'}: {e}") from None
    _check_tensors(hf, config)
    if config.positions is Positions.ALIBI and SLOPES in hf.tensors:
        stored = hf.read_tensor(SLOPES).astype(np.float64).ravel()
        config = dataclasses.replace(config, alibi_slopes=tuple(float(s) for s in stored))
    if any(a.name in ("tokenizer.json", "vocab.json") for a in hf.assets):
        check_vocabulary(load_tokenizer(hf.directory), config.vocab_size)
    else:
        logger.warning("%s has no tokenizer files: `btlm generate` will need them", hf.directory)
    return config


def _check_tensors(hf: HFSource, config: BTLMConfig) -> None:
    """Raises ValueError with all differences between the tensors and the table of weights."""
    # First, because a wild n_layer would make the list of missing tensors endless.
    if config.n_layer > len(hf.tensors):
        raise ValueError(
            f"{hf.directory}: config.json says n_layer = {config.n_layer}, the files hold only "
            f"{len(hf.tensors)} tensors"
        )
    expected = {leaf.hf_name: leaf.weight.hf_shape for leaf in weights.disk_leaves(config)}
    optional: dict[str, tuple[int, ...]] = {}
    if config.positions is Positions.ALIBI:
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
            "set tie_word_embeddings to false in config.json if the head is untied intentionally"
        )


def _same_bits(hf: HFSource, a: str, b: str) -> bool:
    """Returns whether two tensors of one shape have equal dtypes and bits."""
    first, second = hf.tensors[a], hf.tensors[b]
    if first.dtype != second.dtype:
        return False
    if first.offset is not None and (first.file, first.offset) == (second.file, second.offset):
        return True  # torch saves tied weights once, under both names
    size = zarr.BLOCK_BYTES // first.dtype.itemsize
    pairs = zip(hf.blocks(a, size), hf.blocks(b, size), strict=True)
    return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in pairs)
