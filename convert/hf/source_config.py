"""The configuration of an opened Hugging Face checkpoint, checked against its tensors."""

from __future__ import annotations

import dataclasses
import logging
import os
from types import MappingProxyType

import numpy as np

from btlm_jax.checkpoint import zarr
from btlm_jax.config import BTLMConfig, Positions
from btlm_jax.convert.hf.advice import UNQUANTIZED
from btlm_jax.convert.hf.source import HFSource, open_hf
from btlm_jax.convert.hf.tensor_names import (
    EMBEDDING,
    LM_HEAD,
    MASK_BUFFER,
    SLOPES,
    model_names,
)
from btlm_jax.data.tokenizer import check_vocabulary, load_tokenizer
from btlm_jax.hf_config_values import ALIASES, language_model_config
from btlm_jax.model import weights
from btlm_jax.utils.format import join_first, list_first

logger = logging.getLogger(__name__)


def open_model(
    source: str | os.PathLike[str], *, revision: str | None = None
) -> tuple[HFSource, BTLMConfig]:
    """Opens a checkpoint and reads its configuration, with the stored ALiBi slopes.

    Names that a wrapper of the model has changed are restored, with a warning.

    Args:
      source, revision: as for `open_hf`.

    Returns:
      The checkpoint, whose tensors have the names of the model; and its configuration.

    Raises:
      FileNotFoundError, ConnectionError, PermissionError: as `open_hf`.
      ValueError: as `open_hf`; or an unsupported configuration; tensors that are missing,
        unexpected or of the wrong shape or dtype; a tied head that differs from the embedding; or a
        tokenizer of another vocabulary.
    """
    hf = open_hf(source, revision=revision)
    hf = dataclasses.replace(hf, config=dict(language_model_config(hf.config)))
    try:
        config = BTLMConfig.from_hf(hf.config)
    except ValueError as e:
        raise ValueError(f"{hf.directory / 'config.json'}: {e}") from None
    hf = _with_model_names(hf, config)
    _check_tensors(hf, config)
    if config.positions is Positions.ALIBI and SLOPES in hf.tensors:
        stored = hf.read_tensor(SLOPES).astype(np.float64).ravel()
        config = dataclasses.replace(config, alibi_slopes=tuple(float(s) for s in stored))
    if any(a.name in ("tokenizer.json", "vocab.json") for a in hf.assets):
        check_vocabulary(load_tokenizer(hf.directory), config.vocab_size)
    else:
        logger.warning("%s has no tokenizer files: `btlm generate` will need them", hf.directory)
    return hf, config


def _with_model_names(hf: HFSource, config: BTLMConfig) -> HFSource:
    """Returns the checkpoint with the names that the model itself gives to its tensors."""
    try:
        names, notice = model_names(hf.tensors)
    except ValueError as e:
        raise ValueError(f"{hf.directory} {e}") from None
    if notice:
        logger.warning("%s: the names of tensors are %s", hf.directory, notice)
    tensors = {names[stored]: info for stored, info in hf.tensors.items()}
    # safetensors' `save_model` keeps one of two tied tensors, mostly the first in the alphabet.
    kept = {names[stored] for stored in hf.aliases.values()}
    for lacking, other in ((EMBEDDING, LM_HEAD), (LM_HEAD, EMBEDDING)):
        tied = other in kept or (config.tie_word_embeddings and lacking == EMBEDDING)
        if tied and lacking not in tensors and other in tensors:
            tensors[lacking] = tensors[other]
            logger.info("%s: %s is stored as %s, to which it is tied", hf.directory, lacking, other)
    return dataclasses.replace(hf, tensors=MappingProxyType(tensors))


def _check_tensors(hf: HFSource, config: BTLMConfig) -> None:
    """Raises ValueError with the differences between the tensors and the table of weights."""
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
        logger.info("ignored mask buffers: %s", join_first(ignored))
    known = expected | optional
    missing = [n for n in expected if n not in hf.tensors]
    unexpected = [n for n in hf.tensors if n not in known and n not in ignored]
    shapes, dtypes = [], []
    for name, shape in known.items():
        info = hf.tensors.get(name)
        if info is None:
            continue
        if info.shape != shape:
            shapes.append(f"{name}: found shape {info.shape}, expected {shape}")
        if str(info.dtype) not in weights.STORED_DTYPES:
            expected_dtypes = " or ".join(weights.STORED_DTYPES)
            dtypes.append(f"{name}: found dtype {info.dtype}, expected {expected_dtypes}")
    groups = ([f"missing: {n}" for n in missing], [f"unexpected: {n}" for n in unexpected])
    problems = "".join(list_first(group, 4) for group in (*groups, shapes, dtypes))
    if any("uint16" in dtype for dtype in dtypes):
        problems += (
            "\n  Fix: if these are the bits of bfloat16, write them as such "
            "(tensor.view(torch.bfloat16)); a cast would destroy them"
        )
    elif dtypes:
        problems += f"\n  {UNQUANTIZED}"
    sizes = language_model_config(hf.config)
    absent = [n for n, alias in ALIASES.items() if sizes.get(n, sizes.get(alias)) is None]
    if problems and absent:
        problems += (
            f"\n  Fix: config.json has no {join_first(absent)}, so that of BTLM-3B was assumed: "
            "add it"
        )
    if missing == [LM_HEAD]:
        problems += (
            "\n  Fix: set tie_word_embeddings to true in config.json if the head is the embedding"
        )
    rows = {hf.tensors[n].shape[0] for n in (EMBEDDING, LM_HEAD) if n in known and n in hf.tensors
            and hf.tensors[n].shape[1:] == (config.n_embd,)}  # fmt: skip
    if len(rows) == 1 and rows != {config.vocab_size}:
        problems += (
            f"\n  Fix: set vocab_size to {rows.pop()} in config.json if the model was trained with "
            "this embedding; otherwise resize it in transformers (resize_token_embeddings)"
        )
    if problems:
        raise ValueError(f"{hf.directory}: the weights do not match config.json:{problems}")
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
