"""Text files and the documents in token shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from btlm_jax.data.token_shards import TokenShards
from btlm_jax.data.tokenizer import load_tokenizer


def jsonl(documents, field="text") -> bytes:
    return b"".join(json.dumps({field: d, "meta": 1}).encode() + b"\n" for d in documents)


def texts(directory) -> list[str]:
    """The documents that a directory of tokens holds."""
    opened = TokenShards(directory)
    tokens, eos = opened.read(0, len(opened)), opened.metadata.eos_id
    assert tokens[-1] == eos
    parts = np.split(tokens, np.flatnonzero(tokens == eos) + 1)[:-1]
    tokenizer = load_tokenizer(directory)
    return [tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts]


def contents(directory) -> dict[str, bytes]:
    files = [p for p in Path(directory).rglob("*") if p.is_file()]
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}
