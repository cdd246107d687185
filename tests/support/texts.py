"""Text files, and the documents in token shards."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np

DOCUMENTS = [f"Document {i}: " + "words and more " * (i % 7) for i in range(30)]


def jsonl(documents, field: str = "text") -> bytes:
    """Returns documents as JSON lines with a second field."""
    return b"".join(json.dumps({field: d, "meta": 1}).encode() + b"\n" for d in documents)


def read_documents(directory) -> list[str]:
    """Returns the documents that a directory of tokens holds."""
    from btlm_jax.data.token_shards import TokenShards
    from btlm_jax.data.tokenizer import load_tokenizer

    shards = TokenShards(directory)
    tokens, eos = shards.read(0, len(shards)), shards.metadata.eos_id
    assert tokens[-1] == eos
    documents = np.split(tokens, np.flatnonzero(tokens == eos) + 1)[:-1]
    tokenizer = load_tokenizer(directory)
    return [tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) for ids in documents]


def file_contents(directory) -> dict[str, bytes]:
    """Returns the bytes of all files below a directory, by relative path."""
    files = [p for p in Path(directory).rglob("*") if p.is_file()]
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def write_all_kinds(folder: Path) -> list[str]:
    """Writes `DOCUMENTS` as files of every kind. Returns a name or glob for each kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from backports import zstd

    data = jsonl(DOCUMENTS)
    (folder / "a.jsonl").write_bytes(data.replace(b"\n", b"\r\n\r\n"))  # blank lines are ignored
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(data[:500]) + gzip.compress(data[500:]))
    frames = [zstd.compress(chunk) for chunk in (data[:700], b"", data[700:])]
    (folder / "a.jsonl.zst").write_bytes(b"".join(frames))
    table = pa.table({"meta": list(range(30)), "text": DOCUMENTS})
    pq.write_table(table, folder / "a.parquet", row_group_size=7)
    large = table.set_column(1, "text", table["text"].cast(pa.large_string()))
    pq.write_table(large, folder / "large.parquet")
    coded = table.set_column(1, "text", table["text"].dictionary_encode())
    pq.write_table(coded, folder / "coded.parquet", row_group_size=11)
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i:02}.txt").write_text(text)
    kinds = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "large.parquet", "coded.parquet"]
    return [*kinds, "*.txt"]
