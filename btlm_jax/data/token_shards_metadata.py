"""The metadata of token shards: what `manifest.json` says about a directory of tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from btlm_jax import __version__
from btlm_jax.utils import json_files

FORMAT = 1
METADATA_FILE = "manifest.json"
_FIX = "copy the directory again, or tokenize again"
_KIND = "btlm-jax tokens"
_SHARD_NAME = re.compile(r"tokens-\d{5,}\.bin")  # cannot leave the directory
_GPT2_FILES = ("vocab.json", "merges.txt", "added_tokens.json")


@dataclasses.dataclass(frozen=True)
class TokenShard:
    """One file of tokens.

    Attributes:
      name: name of the file.
      tokens: number of tokens, EOS included.
      documents: number of documents, each whole.
      max_id: the largest token id.
      sha256: checksum of the file.
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
      name: name of the file, as given.
      bytes: size of the file, as compressed; 0 for standard input.
      documents: number of documents that were tokenized.
      text_bytes: bytes of their text in UTF-8, the denominator of bits per byte.
      skipped: number of records that could not be used.
    """

    name: str
    bytes: int
    documents: int
    text_bytes: int
    skipped: int = 0


@dataclasses.dataclass(frozen=True)
class TokenShardsMetadata:
    """Metadata of a directory of tokens.

    Attributes:
      vocab_size: exclusive upper bound of the token ids.
      eos_id: the token that ends a document.
      tokenizer_sha256: `tokenizer_fingerprint` of the tokenizer's files.
      shards, sources: the shards and the inputs, in order.
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
        """The dtype of the token ids on disk, little-endian."""
        return token_dtype(self.vocab_size)

    @property
    def tokens(self) -> int:
        """Number of tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Number of documents in all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """Bytes of all text in UTF-8."""
        return sum(source.text_bytes for source in self.sources)

    @property
    def max_id(self) -> int:
        """The largest token id in all shards."""
        return max((shard.max_id for shard in self.shards), default=-1)

    def to_json(self) -> str:
        """Returns the text of `manifest.json`; equal tokens give equal text."""
        header = {
            "kind": _KIND,
            "format": FORMAT,
            "dtype": self.dtype.name,
            "tokens": self.tokens,
            "documents": self.documents,
        }
        return json.dumps(header | dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, filename: str) -> TokenShardsMetadata:
        """Parses and validates metadata.

        Args:
          text: text of `manifest.json`.
          filename: name of the file, for error messages.

        Raises:
          ValueError: not metadata of tokens, another format, or a missing or wrong field.
        """
        values = json_files.parse_object(text.encode(), filename, _FIX)
        if values.get("kind") != _KIND:
            raise ValueError(
                f"{filename}: kind: found {values.get('kind')!r}, expected {_KIND!r}, written by "
                f"`btlm tokenize`: {_FIX}"
            )
        if values.get("format") != FORMAT:
            raise ValueError(
                f"{filename}: format: found {values.get('format')!r}, this version reads {FORMAT}; "
                f"it was written by {values.get('created_by')}: tokenize again or install that"
            )
        nested = {
            field: tuple(_parse_fields(item_class, item, filename) for item in items)
            for field, item_class in (("shards", TokenShard), ("sources", TextSource))
            if isinstance(items := values.get(field), list)
        }
        metadata = _parse_fields(cls, values | nested, filename)
        for field in ("tokens", "documents"):
            if values.get(field) != getattr(metadata, field):
                raise ValueError(
                    f"{filename}: {field}: found {values.get(field)!r}, its shards add up to "
                    f"{getattr(metadata, field)}; {_FIX}"
                )
        if values.get("dtype") != metadata.dtype.name:
            raise ValueError(
                f"{filename}: dtype: found {values.get('dtype')!r}, expected "
                f"{metadata.dtype.name} for vocab_size {metadata.vocab_size}; {_FIX}"
            )
        for shard in metadata.shards:
            if not _SHARD_NAME.fullmatch(shard.name):
                raise ValueError(
                    f"{filename}: shard {shard.name!r}, expected tokens-00000.bin; {_FIX}"
                )
        return metadata


def _parse_fields(cls: type[Any], values: Any, filename: str) -> Any:
    """Returns an instance from JSON; a value whose type is not the field's is an error."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{filename}: found {str(values)[:60]!r}, expected an object; {_FIX}")
    fields = {}
    for field in dataclasses.fields(cls):
        value: Any = values.get(field.name)
        kind = {"int": int, "str": str}.get(str(field.type), tuple)
        if not isinstance(value, kind) or (isinstance(value, int) and value < 0):
            expected = "a list" if kind is tuple else str(field.type)
            raise ValueError(
                f"{filename}: {field.name}: found {str(value)[:60]!r}, expected {expected}; {_FIX}"
            )
        fields[field.name] = value
    return cls(**fields)


def is_token_metadata(text: str) -> bool:
    """Returns whether a text is the `manifest.json` of tokens; it may be of another format."""
    try:
        values = json.loads(text)
    except ValueError:
        return False
    return isinstance(values, dict) and values.get("kind") == _KIND


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the dtype that stores ids below `vocab_size`, little-endian."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def tokenizer_fingerprint(tokenizer: Mapping[str, bytes]) -> str:
    """Returns the SHA-256 of the files that define a tokenizer.

    Args:
      tokenizer: contents of its files, by name.

    Returns:
      The checksum of `tokenizer.json`; without one, that of `vocab.json`, `merges.txt` and any
      `added_tokens.json`, concatenated.
    """
    names = ("tokenizer.json",) if "tokenizer.json" in tokenizer else _GPT2_FILES
    return hashlib.sha256(b"".join(tokenizer.get(name, b"") for name in names)).hexdigest()
