"""Token ids on disk: flat files, and metadata that describes them.

```
manifest.json         `TokenShardsMetadata`, with sizes and SHA-256
tokens-00000.bin ...  little-endian uint16 (vocabularies up to 65536) or uint32; whole documents,
                      each ended by EOS
tokenizer/            the files of the tokenizer that made them
```
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from pathlib import Path

import numpy as np

from btlm_jax.data.token_shards_metadata import (
    METADATA_FILE,
    TokenShardsMetadata,
    is_token_metadata,
)
from btlm_jax.utils import atomic
from btlm_jax.utils.local_paths import local_path

TOKENIZER_FOLDER = "tokenizer"
_BLOCK_BYTES = 1 << 16


class TokenShards:
    """A memory-mapped directory of tokens: only the pages that are used are read.

    Threads may share one.

    Args:
      directory: a directory written by `tokenize`.
      vocab_size: vocabulary of the model that will read the ids; larger ids are an error.

    Attributes:
      directory: the directory.
      metadata: its metadata.
      fingerprint: SHA-256 of the metadata, and so of everything it describes.

    Raises:
      FileNotFoundError: no such directory, no metadata, or a missing shard.
      ValueError: damaged metadata, a shard whose size is not that in the metadata, or ids outside
        the model's vocabulary.
    """

    def __init__(self, directory: str | os.PathLike[str], *, vocab_size: int | None = None) -> None:
        self.directory = local_path(directory, "directory")
        self.metadata, data = _read_shards_metadata(self.directory)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        if vocab_size is not None and self.metadata.max_id >= vocab_size:
            bad = next(s for s in self.metadata.shards if s.max_id >= vocab_size)
            raise ValueError(
                f"{self.directory / bad.name} holds token {bad.max_id}, the model's vocab_size is "
                f"{vocab_size}: tokenize with the model's tokenizer"
            )
        self._check_sizes()
        dtype = self.metadata.dtype
        # As plain arrays: slicing a np.memmap costs microseconds more.
        self._arrays = [
            np.asarray(np.memmap(self.directory / s.name, dtype, mode="r"))
            for s in self.metadata.shards
        ]
        ends = itertools.accumulate(s.tokens for s in self.metadata.shards)
        self._starts = [0, *ends]

    def __len__(self) -> int:
        """Returns the number of tokens in all shards."""
        return self._starts[-1]

    def read(self, start: int, n: int) -> np.ndarray:
        """Returns tokens `start` to `start + n`, across shards. int32 [n].

        Raises:
          ValueError: the range is not within the tokens.
        """
        out = np.empty(n, np.int32)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Reads tokens into `out`: [n] of any integer type that holds the ids.

        Raises:
          ValueError: the range is not within the tokens.
        """
        n = len(out)
        if start < 0 or start + n > len(self):
            raise ValueError(
                f"{self.directory}: found a request for tokens {start} to {start + n}, it holds "
                f"{len(self)}"
            )
        done, i = 0, bisect.bisect_right(self._starts, start) - 1
        while done < n:
            begin = start + done - self._starts[i]
            chunk = self._arrays[i][begin : begin + n - done]
            out[done : done + len(chunk)] = chunk
            done, i = done + len(chunk), i + 1

    def _check_sizes(self) -> None:
        for shard in self.metadata.shards:
            file = self.directory / shard.name
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; copy it again, or tokenize again")
            size, expected = file.stat().st_size, shard.tokens * self.metadata.dtype.itemsize
            if size != expected or not size:
                raise ValueError(
                    f"{file}: found {size} bytes, expected {expected}: the file is "
                    f"{'truncated' if size < expected else 'not the one described'}; copy it "
                    "again, or tokenize again"
                )
            if shard.max_id and _has_zeroed_end(file, size):
                raise ValueError(
                    f"{file}: it begins or ends with zero bytes, which a crash or a full disk "
                    "leaves; copy it again, or tokenize again"
                )


def _has_zeroed_end(file: Path, size: int) -> bool:
    """Returns whether the first or last block of a file holds zero bytes only.

    Tokens of a text do not: it would be tens of thousands of times the token with the id 0.
    """
    with file.open("rb") as opened:
        first = opened.read(_BLOCK_BYTES)
        opened.seek(max(0, size - _BLOCK_BYTES))
        return not any(first) or not any(opened.read(_BLOCK_BYTES))


def is_token_directory(directory: os.PathLike[str]) -> bool:
    """Returns whether a directory was written by `tokenize`."""
    try:
        return is_token_metadata((Path(directory) / METADATA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _read_shards_metadata(directory: Path) -> tuple[TokenShardsMetadata, bytes]:
    """Returns the metadata of a directory of tokens, and its file's bytes."""
    file = directory / METADATA_FILE
    if not file.is_file():
        left = ", ".join(map(str, atomic.leftovers(directory)))
        hint = f"; an interrupted run left {left}: the same command continues it" if left else ""
        problem = "no manifest.json in it" if directory.is_dir() else "no such directory"
        if inside := sorted(str(p.parent) for p in directory.glob(f"*/{METADATA_FILE}")):
            hint = f"; there are tokens in {', '.join(inside)}"
        raise FileNotFoundError(
            f"{directory}: {problem}, expected tokens made by `btlm tokenize`{hint}"
        )
    data = file.read_bytes()
    try:
        return TokenShardsMetadata.from_json(data.decode(), str(file)), data
    except UnicodeDecodeError as e:
        raise ValueError(f"{file}: not UTF-8 ({e}); copy the directory again") from e
