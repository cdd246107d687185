"""Directories of token shards, without a tokenizer's work."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from btlm_jax.data.token_shards_metadata import (
    TextSource,
    TokenShard,
    TokenShardsMetadata,
    token_dtype,
)

EOS = 0


def write_tokens(
    path: Path, tokens, *, vocab_size: int = 50257, shard_tokens: int = 1 << 40, eos_id: int = EOS
) -> Path:
    """Writes a directory of tokens like `tokenize`, with an empty tokenizer file. Returns `path`.

    Args:
      path: the directory to create.
      tokens: integers [n].
      vocab_size: vocabulary recorded in the metadata; it determines the type on disk.
      shard_tokens: tokens per shard; documents may be cut.
      eos_id: the token that ends a document.
    """
    tokens = np.asarray(tokens).astype(token_dtype(vocab_size))
    (path / "tokenizer").mkdir(parents=True)
    (path / "tokenizer/tokenizer.json").write_text("{}")
    shards = []
    for i, start in enumerate(range(0, len(tokens), shard_tokens)):
        part, name = tokens[start : start + shard_tokens], f"tokens-{i:05}.bin"
        (path / name).write_bytes(part.tobytes())
        sha256 = hashlib.sha256(part.tobytes()).hexdigest()
        documents = int((part == eos_id).sum())
        shards.append(TokenShard(name, len(part), documents, int(part.max()), sha256))
    metadata = TokenShardsMetadata(
        vocab_size=vocab_size,
        eos_id=eos_id,
        tokenizer_sha256=hashlib.sha256(b"{}").hexdigest(),
        shards=tuple(shards),
        sources=(TextSource("a.txt", 7, 1, 7),),
    )
    (path / "manifest.json").write_text(metadata.to_json())
    return path
