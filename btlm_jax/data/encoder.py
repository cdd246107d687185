"""Documents to token ids, in parallel and in order."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from btlm_jax.data.text_reader import TextDocument
from btlm_jax.data.token_shards_metadata import token_dtype, tokenizer_fingerprint
from btlm_jax.data.tokenizer import (
    END_OF_TEXT,
    check_vocabulary,
    load_tokenizer,
    tokenizer_directory,
)

# The files that define the tokenizer, and those that name its special tokens.
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
# Characters per call of the tokenizer: enough to hide the overhead of a call; the result takes some
# 150 bytes per token.
_BATCH_CHARACTERS = 256 << 10


class Encoder:
    """A tokenizer that appends EOS to every document.

    Args:
      source: a directory with a tokenizer's files, or a checkpoint (local or URL).
      eos: the token that ends a document; None takes the `eos_token` that the tokenizer's files
        name, or else "<|endoftext|>".
      vocab_size: vocabulary of the model that will read the ids; None takes the tokenizer's.

    Attributes:
      vocab_size: exclusive upper bound of the ids.
      eos_id: id of the token that ends a document.
      files: contents of the tokenizer's files, by name.
      sha256: `tokenizer_fingerprint` of the files.
      dtype: dtype of the ids.

    Raises:
      FileNotFoundError: no tokenizer there.
      ValueError: it has no such EOS, or ids outside the model's vocabulary.
    """

    def __init__(
        self, source: str | os.PathLike[str], eos: str | None, vocab_size: int | None
    ) -> None:
        self._tokenizer = tokenizer = load_tokenizer(source)
        tokenizer.encode_special_tokens = True  # a text cannot contain special tokens
        if vocab_size is not None:
            check_vocabulary(tokenizer, vocab_size)
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = vocab_size or max(ids.values()) + 1
        home = tokenizer_directory(source)
        self.files = {
            name: (home / name).read_bytes() for name in TOKENIZER_FILES if (home / name).is_file()
        }
        eos = eos or _configured_eos(self.files) or END_OF_TEXT
        if eos not in ids:
            raise ValueError(
                f"{source}: the tokenizer has no token {eos!r} to end documents with; name one of "
                "its tokens (eos)"
            )
        self.eos_id = ids[eos]
        self.sha256 = tokenizer_fingerprint(self.files)
        self.dtype = token_dtype(self.vocab_size)

    def encode(self, documents: list[TextDocument]) -> list[np.ndarray]:
        """Returns the ids of each document, EOS last."""
        texts = [document.text for document in documents]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*x.ids, self.eos_id], self.dtype) for x in encodings]


def _configured_eos(files: dict[str, bytes]) -> str | None:
    """Returns the `eos_token` that the tokenizer's files name, None if they name none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            token = json.loads(files.get(name, b"{}"))["eos_token"]
        except (ValueError, KeyError, TypeError):
            continue
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def encode_documents(
    documents: Iterable[TextDocument], encoder: Encoder, threads: int
) -> Iterator[tuple[TextDocument, np.ndarray]]:
    """Yields documents with their ids, in order; reads and tokenizes a few batches ahead.

    Uses threads because the tokenizer releases the GIL for 97 % of its time.
    """
    pending: deque[tuple[list[TextDocument], Future[list[np.ndarray]]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for batch in _batches(documents):
            pending.append((batch, pool.submit(encoder.encode, batch)))
            if len(pending) > threads + 1:
                first, ids = pending.popleft()
                yield from zip(first, ids.result(), strict=True)
        for batch, ids in pending:
            yield from zip(batch, ids.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[TextDocument]) -> Iterator[list[TextDocument]]:
    batch: list[TextDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
