"""Small files that travel with a checkpoint in both directions: tokenizer, generation, code."""

from __future__ import annotations

import hashlib
import os

from etils import epath
from tokenizers import Tokenizer

from btlm_jax.checkpoint import metadata
from btlm_jax.data.encoder import TOKENIZER_FILES
from btlm_jax.data.tokenizer import check_vocabulary, load_tokenizer, tokenizer_directory
from btlm_jax.utils import paths
from btlm_jax.utils.notices import warn_once

_GENERATION_CONFIG = "generation_config.json"
ASSET_NAMES = (
    *TOKENIZER_FILES,
    _GENERATION_CONFIG,
    # The original model code, to which `auto_map` in config.json refers; it is never run here.
    "configuration_btlm.py",
    "modeling_btlm.py",
    "configuration_jais.py",
    "modeling_jais.py",
)


def asset_files(path: str | os.PathLike[str]) -> list[epath.Path]:
    """Returns the files that a checkpoint carries, sorted by name."""
    folder = tokenizer_directory(path)
    if folder == paths.location(path):
        return []
    return sorted(file for file in folder.iterdir() if file.is_file())


def asset_hashes(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the SHA-256 of the files that a checkpoint carries, by name."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in asset_files(path)}


def changed_assets(meta: metadata.CheckpointMetadata) -> dict[str, str]:
    """Returns the carried files that do not match the record: name -> "missing" or "changed"."""
    present = asset_hashes(meta.path) if meta.asset_sha256 else {}
    return {
        name: "changed" if name in present else "missing"
        for name, recorded in sorted(meta.asset_sha256.items())
        if present.get(name) != recorded
    }


def warn_of_changed_assets(meta: metadata.CheckpointMetadata) -> None:
    """Warns about files that decide what a checkpoint reads or writes and do not match its record.

    Every use of a checkpoint calls it, before any text is encoded.
    """
    for name, change in changed_assets(meta).items():
        file = f"{meta.path}: {tokenizer_directory(meta.path).name}/{name}"
        found = "is missing" if change == "missing" else "has changed"
        if name in TOKENIZER_FILES:
            cost = "texts may become other tokens than those that the model was trained on"
        elif name == _GENERATION_CONFIG:
            cost = "the defaults of generation, such as its EOS, are not the model's"
        else:
            continue
        warn_once(
            f"{file} {found} since the checkpoint was made, so {cost}: copy it again from the "
            "source of the checkpoint"
        )


def load_checkpoint_tokenizer(meta: metadata.CheckpointMetadata) -> Tokenizer:
    """Loads the tokenizer of a checkpoint, with a warning if its files have changed.

    Raises:
      FileNotFoundError: it has none.
      ValueError: a file cannot be parsed, or the tokenizer belongs to another model.
    """
    warn_of_changed_assets(meta)
    tokenizer = load_tokenizer(meta.path)
    check_vocabulary(tokenizer, meta.config.vocab_size)
    return tokenizer
