"""Token ids on disk: flat files beside a metadata that says what they hold.

```
manifest.json         what follows, with sizes and SHA-256
tokens-00000.bin ...  little-endian uint16 (vocabularies up to 65536) or uint32; whole documents,
                      each ended by EOS
tokenizer/            the files of the tokenizer that made them
```
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from btlm_jax import __version__
from btlm_jax.utils import atomic
from btlm_jax.utils.progress import Progress

FORMAT = 1
METADATA_FILE, TOKENIZER_FOLDER = "manifest.json", "tokenizer"
_KIND = "btlm-jax tokens"
_SHARD_NAME = re.compile(r"tokens-\d{5,}\.bin")  # nothing that leaves the directory
_GPT2_FILES = ("vocab.json", "merges.txt", "added_tokens.json")
_HASH_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class TokenShard:
    """One file.

    Attributes:
      name: of the file.
      tokens: how many, EOS included.
      documents: how many, each whole.
      max_id: the largest token id.
      sha256: of the file.
    """

    name: str
    tokens: int
    documents: int
    max_id: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class TextSource:
    """One input that was tokenized.

    Attributes:
      name: as it was given.
      bytes: size of the file, as compressed; 0 for standard input.
      documents: how many of its documents were kept.
      text_bytes: of their text in UTF-8: what bits per byte are counted against.
      skipped: records that could not be used.
    """

    name: str
    bytes: int
    documents: int
    text_bytes: int
    skipped: int = 0


@dataclasses.dataclass(frozen=True)
class TokenShardsMetadata:
    """What a directory of tokens says about itself.

    Attributes:
      vocab_size: every id is below it.
      eos_id: the token that ends a document.
      tokenizer_sha256: `tokenizer_fingerprint` the tokenizer's files.
      shards, sources: in order.
      created_by: name and version of the program.
    """

    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    shards: tuple[TokenShard, ...]
    sources: tuple[TextSource, ...]
    created_by: str = f"btlm-jax {__version__}"

    @property
    def dtype(self) -> np.dtype:
        """On disk, little-endian."""
        return token_dtype(self.vocab_size)

    @property
    def tokens(self) -> int:
        """In all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """In all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """Of all text in UTF-8."""
        return sum(source.text_bytes for source in self.sources)

    @property
    def max_id(self) -> int:
        """The largest token id that occurs."""
        return max((shard.max_id for shard in self.shards), default=-1)

    def to_json(self) -> str:
        """The text of `manifest.json`: the same for the same tokens."""
        fields = dataclasses.asdict(self)
        whole = {
            "kind": _KIND,
            "format": FORMAT,
            "dtype": self.dtype.name,
            "tokens": self.tokens,
            "documents": self.documents,
        }
        return json.dumps(whole | fields, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> TokenShardsMetadata:
        """Parses and checks.

        Args:
          text: of `manifest.json`.
          where: its name, for messages.

        Raises:
          ValueError: not a metadata, of another format, or with a field missing or wrong.
        """
        try:
            found = json.loads(text)
        except ValueError as e:
            raise ValueError(f"{where}: not JSON ({e}); copy the directory again") from e
        if not isinstance(found, dict) or found.get("kind") != _KIND:
            raise ValueError(f"{where}: expected metadata written by `btlm tokenize`")
        if found.get("format") != FORMAT:
            raise ValueError(
                f"{where}: format: found {found.get('format')!r}, this version reads {FORMAT}; "
                f"it was written by {found.get('created_by')}: tokenize again or install that"
            )
        parts = found | {
            field: tuple(_parse(part, x, where) for x in listed)
            for field, part in (("shards", TokenShard), ("sources", TextSource))
            if isinstance(listed := found.get(field), list)
        }
        metadata = _parse(cls, parts, where)
        for field in ("tokens", "documents"):
            if found.get(field) != getattr(metadata, field):
                raise ValueError(
                    f"{where}: {field}: found {found.get(field)!r}, its shards add up to "
                    f"{getattr(metadata, field)}; copy the directory again"
                )
        if found.get("dtype") != metadata.dtype.name:
            raise ValueError(
                f"{where}: dtype: found {found.get('dtype')!r}, expected {metadata.dtype.name} for "
                f"vocab_size {metadata.vocab_size}"
            )
        for shard in metadata.shards:
            if not _SHARD_NAME.fullmatch(shard.name):
                raise ValueError(f"{where}: shard {shard.name!r}, expected tokens-00000.bin")
        return metadata


def _parse(cls: type[Any], found: Any, where: str) -> Any:
    """An instance from JSON; fields with another type than the class's are errors."""
    if not isinstance(found, Mapping):
        raise ValueError(f"{where}: {cls.__name__}: found {found!r}, expected an object")
    values = {}
    for field in dataclasses.fields(cls):
        value: Any = found.get(field.name)
        kind = {"int": int, "str": str}.get(str(field.type), tuple)
        if not isinstance(value, kind) or (isinstance(value, int) and value < 0):
            raise ValueError(
                f"{where}: {field.name}: found {value!r}, expected {field.type}; copy the "
                "directory again"
            )
        values[field.name] = value
    return cls(**values)


class TokenShards:
    """A directory of tokens, memory-mapped: reading costs what is read. Threads may share one.

    Args:
      directory: as `tokenize` writes it.
      vocab_size: of the model that is to read the ids; larger ids are an error.

    Attributes:
      directory: where it lies.
      metadata: what it says about itself.
      fingerprint: SHA-256 of the metadata, and so of everything it describes.

    Raises:
      FileNotFoundError: no such directory, no metadata, or a missing shard.
      ValueError: a damaged metadata, a shard of another size than the metadata says, or ids
        outside the model's vocabulary.
    """

    def __init__(self, directory: str | os.PathLike[str], *, vocab_size: int | None = None) -> None:
        self.directory = Path(directory)
        self.metadata, data = _read_metadata(self.directory)
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
        """Tokens in all shards."""
        return self._starts[-1]

    def read(self, start: int, n: int) -> np.ndarray:
        """Tokens `start` to `start + n`, across shards. int32 [n].

        Raises:
          ValueError: not all of them exist.
        """
        out = np.empty(n, np.int32)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: np.ndarray) -> None:
        """As `read`, into `out`: [n] of any integer type that holds the ids."""
        n = len(out)
        if start < 0 or start + n > len(self):
            raise ValueError(
                f"{self.directory}: tokens {start} to {start + n} asked for, it holds {len(self)}"
            )
        done, i = 0, bisect.bisect_right(self._starts, start) - 1
        while done < n:
            begin = start + done - self._starts[i]
            piece = self._arrays[i][begin : begin + n - done]
            out[done : done + len(piece)] = piece
            done, i = done + len(piece), i + 1

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        """Of the tokenizer that made the tokens: a checkpoint can carry them along."""
        return tuple(sorted((self.directory / TOKENIZER_FOLDER).glob("*")))

    def verify(self) -> None:
        """Reads every byte and compares SHA-256 with the metadata.

        Raises:
          ValueError: shards or tokenizer files that differ, all listed.
        """
        total = len(self) * self.metadata.dtype.itemsize
        bad = []
        with Progress(total, "B", "verify") as progress:
            for shard in self.metadata.shards:
                hashed = hashlib.sha256()
                with open(self.directory / shard.name, "rb") as file:
                    while block := file.read(_HASH_BYTES):
                        hashed.update(block)
                        progress.update(len(block))
                if hashed.hexdigest() != shard.sha256:
                    bad.append(shard.name)
        tokenizer = {file.name: file.read_bytes() for file in self.tokenizer_files}
        if tokenizer_fingerprint(tokenizer) != self.metadata.tokenizer_sha256:
            bad.append(TOKENIZER_FOLDER)
        if bad:
            raise ValueError(
                f"{self.directory}: {', '.join(bad)} changed since they were written; copy them "
                "again, or tokenize again"
            )

    def _check_sizes(self) -> None:
        for shard in self.metadata.shards:
            file = self.directory / shard.name
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; copy it again, or tokenize again")
            found, expected = file.stat().st_size, shard.tokens * self.metadata.dtype.itemsize
            if found != expected or not found:
                raise ValueError(
                    f"{file}: found {found} bytes, expected {expected}: the file is "
                    f"{'truncated' if found < expected else 'not the one described'}; copy it "
                    "again, or tokenize again"
                )


def is_token_directory(directory: os.PathLike[str]) -> bool:
    """Whether a directory was written by `tokenize`."""
    try:
        found = json.loads((Path(directory) / METADATA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("kind") == _KIND


def token_dtype(vocab_size: int) -> np.dtype:
    """What ids below `vocab_size` are stored as, little-endian."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def tokenizer_fingerprint(tokenizer: Mapping[str, bytes]) -> str:
    """SHA-256 of what defines a tokenizer.

    Args:
      tokenizer: its files, by name.

    Returns:
      That of `tokenizer.json`, or else of `vocab.json`, `merges.txt` and any `added_tokens.json`,
      one after the other.
    """
    names = ("tokenizer.json",) if "tokenizer.json" in tokenizer else _GPT2_FILES
    return hashlib.sha256(b"".join(tokenizer.get(name, b"") for name in names)).hexdigest()


def _read_metadata(directory: Path) -> tuple[TokenShardsMetadata, bytes]:
    """The metadata, and its file's bytes."""
    file = directory / METADATA_FILE
    if not file.is_file():
        left = ", ".join(map(str, atomic.leftovers(directory)))
        hint = f"; an interrupted run left {left}: the same command continues it" if left else ""
        what = "no manifest.json in it" if directory.is_dir() else "no such directory"
        if inside := sorted(str(p.parent) for p in directory.glob(f"*/{METADATA_FILE}")):
            hint = f"; there are tokens in {', '.join(inside)}"
        raise FileNotFoundError(
            f"{directory}: {what}, expected tokens made by `btlm tokenize`{hint}"
        )
    data = file.read_bytes()
    try:
        return TokenShardsMetadata.from_json(data.decode(), str(file)), data
    except UnicodeDecodeError as e:
        raise ValueError(f"{file}: not UTF-8 ({e}); copy the directory again") from e
