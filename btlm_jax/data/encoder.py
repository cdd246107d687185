"""Documents to token ids, in parallel and in order."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from btlm_jax.data.text_cutter import PIECE_CHARACTERS, TextCutter
from btlm_jax.data.text_reader import TextPiece
from btlm_jax.data.token_shards_metadata import token_dtype, tokenizer_fingerprint
from btlm_jax.data.tokenizer import (
    END_OF_TEXT,
    check_vocabulary,
    load_tokenizer,
    tokenizer_directory,
    tokens_beyond,
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
# Bytes that are being encoded at a time: encoding takes up to 150 bytes of memory for each.
_BYTES_IN_FLIGHT = 6 << 20


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
      cutter: cuts long texts for it.

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
        self._beyond = bool(tokens_beyond(tokenizer, self.vocab_size))
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
        self.cutter = TextCutter(tokenizer)

    def encode(self, pieces: list[TextPiece]) -> list[np.ndarray]:
        """Returns the ids of each piece, and EOS where a document ends.

        Raises:
          ValueError: the ids at the end of a piece depend on text far from there.
        """
        texts = [piece.text + piece.context for piece in pieces]
        texts += [piece.context for piece in pieces if piece.context]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        contexts = iter(encodings[len(pieces) :])
        return [
            self._piece_ids(piece, encoding.ids, next(contexts).ids if piece.context else [])
            for piece, encoding in zip(pieces, encodings, strict=False)
        ]

    def _piece_ids(self, piece: TextPiece, ids: list[int], context: list[int]) -> np.ndarray:
        """Returns the ids of a piece from its ids together with those of the context."""
        if piece.ends:
            ids.append(self.eos_id)
        length = len(ids) - len(context)
        if ids[length:] != context and piece.context:
            raise ValueError(
                f"the tokens at {piece.text[-20:] + piece.context[:20]!r} depend on text far "
                "before it, so that this tokenizer cannot encode the document piece by piece: put "
                "spaces or line ends into it, or divide it into documents"
            )
        array = np.array(ids[:length], np.uint32 if self._beyond else self.dtype)
        if self._beyond and (largest := int(array.max(initial=0))) >= self.vocab_size:
            raise ValueError(
                f"the text contains {self._tokenizer.id_to_token(largest)!r} ({largest}), for "
                f"which a model of {self.vocab_size} tokens has no embedding: remove the token "
                "from the text, or resize the model in transformers (resize_token_embeddings)"
            )
        return array.astype(self.dtype, copy=False)


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
    pieces: Iterable[TextPiece], encoder: Encoder, threads: int
) -> Iterator[tuple[TextPiece, np.ndarray]]:
    """Yields documents in pieces with their ids, in order; reads and encodes a few batches ahead.

    Uses threads because the tokenizer releases the GIL for 97 % of its time.
    """
    pending: deque[tuple[list[TextPiece], int, Future[list[np.ndarray]]]] = deque()
    pool, in_flight = ThreadPoolExecutor(threads), 0
    try:
        for batch, nbytes in _batches(pieces):
            while pending and (
                len(pending) > threads or in_flight + nbytes > max(nbytes, _BYTES_IN_FLIGHT)
            ):
                first, done, ids = pending.popleft()
                yield from zip(first, ids.result(), strict=True)
                in_flight -= done
            pending.append((batch, nbytes, pool.submit(encoder.encode, batch)))
            in_flight += nbytes
        while pending:
            batch, _, ids = pending.popleft()
            yield from zip(batch, ids.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(pieces: Iterable[TextPiece]) -> Iterator[tuple[list[TextPiece], int]]:
    """Yields batches, enough to hide the overhead of a call, and the bytes of their text."""
    batch: list[TextPiece] = []
    size = nbytes = 0
    for piece in pieces:
        text = piece.text
        batch.append(piece)
        size += len(text)
        nbytes += len(text) if text.isascii() else len(text.encode())
        if size >= PIECE_CHARACTERS // 2:
            yield batch, nbytes
            batch, size, nbytes = [], 0, 0
    if batch:
        yield batch, nbytes
