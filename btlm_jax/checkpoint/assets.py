"""Small files that travel with a checkpoint in both directions: tokenizer, generation, code."""

from __future__ import annotations

import os

from etils import epath

from btlm_jax.data.tokenizer import tokenizer_directory
from btlm_jax.utils import paths

ASSET_NAMES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
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
