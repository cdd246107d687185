"""Text files to token shards on disk: in parallel, resumable, always the same bytes.

A shard holds whole documents and ends with the first one that brings it to `shard_tokens`. So the
ends of shards follow from the texts alone, and the record of a finished shard only needs the
position in the inputs where it ended for a later run to continue from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from btlm_jax.data.encoder import Encoder, encode_documents
from btlm_jax.data.split import SplitPart
from btlm_jax.data.text_files import OnError, TextFile, expand_inputs
from btlm_jax.data.text_reader import DocumentCounts, ReadPosition, TextPiece, TextReader
from btlm_jax.data.token_shards import TOKENIZER_FOLDER, is_token_directory
from btlm_jax.data.token_shards_metadata import (
    FORMAT,
    METADATA_FILE,
    TokenShard,
    TokenShardsMetadata,
)
from btlm_jax.utils import atomic
from btlm_jax.utils.local_paths import local_path
from btlm_jax.utils.progress import Progress

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TokenizeReport:
    """Result of `tokenize`, including the work of interrupted runs.

    Attributes:
      tokens: tokens written, EOS included.
      documents: documents written.
      text_bytes: bytes of their text, in UTF-8.
      empty: documents left out because they have no text.
      skipped: records left out because they could not be used.
      shards: number of files.
      resumed: number of shards that an interrupted run had finished.
      fresh_tokens: tokens written by this run.
      seconds: wall clock time of this run.
    """

    tokens: int
    documents: int
    text_bytes: int
    empty: int
    skipped: int
    shards: int
    resumed: int
    fresh_tokens: int
    seconds: float

    def __str__(self) -> str:
        resumed = f" ({self.resumed} by an interrupted run)" if self.resumed else ""
        left_out = f", {self.empty:,} empty documents left out" if self.empty else ""
        left_out += f", {self.skipped:,} UNUSABLE RECORDS SKIPPED" if self.skipped else ""
        return (
            f"{self.tokens:,} tokens of {self.documents:,} documents in {self.shards} shards"
            f"{resumed}, {self.text_bytes / self.tokens:.2f} bytes per token, "
            f"{self.seconds:.1f} s ({self.fresh_tokens / max(self.seconds, 1e-9):,.0f} tokens/s)"
            f"{left_out}"
        )


def tokenize(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    *,
    field: str = "text",
    shard_tokens: int = 100_000_000,
    vocab_size: int | None = None,
    eos: str | None = None,
    on_error: OnError = "raise",
    stdin_format: Literal["jsonl", "txt"] = "jsonl",
    threads: int | None = None,
    overwrite: bool = False,
    part: SplitPart | None = None,
) -> TokenizeReport:
    """Tokenizes documents, EOS after each, into a directory that `TokenShards` reads.

    Documents without text are left out. Long ones are read and encoded in pieces, cut where the
    tokenizer begins a word, so that memory does not depend on their length and the ids are those of
    the whole text. Special tokens in a text ("<|endoftext|>") are encoded as
    plain text: no document can fake its end. After a kill, the same call continues, with the same
    result, byte for byte, from the end of the last finished shard; only standard input cannot be
    read twice.

    Args:
      inputs: files or globs of `.jsonl` (an object per line) and `.txt` (a document per file), both
        also compressed (`.gz`, `.zst`, `.xz`, `.bz2`), and `.parquet`; "-" is standard input. Read
        in this order, the files of a glob sorted by name.
      target: a local directory that does not exist yet.
      tokenizer: a directory with its files, or a checkpoint (local or URL).
      field: field of JSON objects, or column, that holds the text.
      shard_tokens: number of tokens after which a shard ends, with the current document.
      vocab_size: vocabulary of the model that will read the tokens; default the tokenizer's.
      eos: the token that ends a document; default the `eos_token` that the tokenizer's files name,
        or else "<|endoftext|>".
      on_error: for a record that cannot be used (malformed, without the field, not UTF-8): "raise"
        stops there, "skip" skips and counts it.
      stdin_format: format of standard input: JSON lines, or one document.
      threads: number of batches of documents that are tokenized at a time; default one per core.
        The result does not depend on it.
      overwrite: replace an existing directory of tokens.
      part: the part of a split to tokenize; None is everything. (`prepare_tokens` makes both.)

    Raises:
      FileNotFoundError: a missing input, a glob without matches, or no tokenizer.
      FileExistsError: the target exists.
      ValueError: an unknown kind of file, an empty or damaged one, an unusable record, a missing
        package, a tokenizer without EOS or with a larger vocabulary than the model.
    """
    began = time.monotonic()
    threads = (os.cpu_count() or 1) if threads is None else threads
    _check_options(shard_tokens, on_error, stdin_format, threads)
    check_token_target(target, overwrite=overwrite, ours=is_token_directory)
    files = expand_inputs(inputs, stdin_format=stdin_format, on_error=on_error, target=target)
    encoder = Encoder(tokenizer, eos, vocab_size)
    key: dict[str, Any] | None = resume_key(files, encoder, [field, shard_tokens, part])
    if any(f.path is None for f in files):
        logger.warning("standard input cannot be read twice: if interrupted, this starts over")
        key = None
    ours = is_token_directory
    with atomic.new_directory(target, overwrite=overwrite, ours=ours, key=key) as stage:
        done = _finished_shards(stage, encoder.dtype)
        resumed = len(done)
        _log_resumption(stage, done, encoder.dtype)
        begin = ReadPosition(*done[-1]["position"]) if done else ReadPosition()
        counts: list[DocumentCounts] = []
        for record in done:
            counts[record["file"] :] = [DocumentCounts(*x) for x in record["counts"]]
        reader = TextReader(
            files, field, encoder.cutter, on_error=on_error, begin=begin, counts=counts, part=part
        )
        encoded = encode_documents(reader.pieces(), encoder, threads)
        encoded = _with_progress(encoded, sum(f.size for f in files), begin.bytes_read)
        while written := _write_shard(stage, len(done), encoded, shard_tokens):
            shard, last = written
            done.append(_shard_record(shard, last, reader.counts, begin))
            stage.record(shard.name, done[-1])
            begin = last.next
        if not done:
            elsewhere = reader.total.elsewhere
            problem = (
                part.empty_message(elsewhere) if part and elsewhere else "no documents with text"
            )
            raise ValueError(f"{', '.join(f.name for f in files)}: {problem}")
        (stage.content / TOKENIZER_FOLDER).mkdir(exist_ok=True)
        for name, data in encoder.files.items():
            atomic.write_bytes(stage.content / TOKENIZER_FOLDER / name, data)
        metadata = TokenShardsMetadata(
            vocab_size=encoder.vocab_size,
            eos_id=encoder.eos_id,
            tokenizer_sha256=encoder.sha256,
            shards=tuple(TokenShard(**record["shard"]) for record in done),
            sources=reader.sources(),
        )
        atomic.write_text(stage.content / METADATA_FILE, metadata.to_json())
    if skipped := reader.total.skipped:
        logger.warning("%d UNUSABLE RECORDS SKIPPED; manifest.json says in which files", skipped)
    return TokenizeReport(
        tokens=metadata.tokens,
        documents=metadata.documents,
        text_bytes=metadata.text_bytes,
        empty=reader.total.empty,
        skipped=skipped,
        shards=len(done),
        resumed=resumed,
        fresh_tokens=sum(shard.tokens for shard in metadata.shards[resumed:]),
        seconds=time.monotonic() - began,
    )


def check_token_target(
    target: str | os.PathLike[str], *, overwrite: bool, ours: Callable[[epath.Path], bool]
) -> None:
    """Raises ValueError if tokens cannot be written there, else as `atomic.refuse_existing`."""
    atomic.refuse_existing(local_path(target, "target"), overwrite=overwrite, ours=ours)


def resume_key(
    files: Sequence[TextFile], encoder: Encoder, options: Sequence[Any]
) -> dict[str, Any]:
    """Returns the facts that tell this work from any other (`atomic.new_directory`)."""
    return {
        "by": f"tokenize, {TokenShardsMetadata.created_by}, format {FORMAT}",
        "files": [f.identity for f in files],
        "options": list(options),
        "tokenizer": [encoder.sha256, encoder.vocab_size, encoder.eos_id],
    }


def _check_options(shard_tokens: int, on_error: str, stdin_format: str, threads: int) -> None:
    for name, value in (("shard_tokens", shard_tokens), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name}: found {value}, expected at least 1")
    for name, choice, known in (
        ("on_error", on_error, ("raise", "skip")),
        ("stdin_format", stdin_format, ("jsonl", "txt")),
    ):
        if choice not in known:
            raise ValueError(f"{name}: found {choice!r}, expected {' or '.join(map(repr, known))}")


def _with_progress(
    encoded: Iterable[tuple[TextPiece, np.ndarray]], total: int, done: int
) -> Iterator[tuple[TextPiece, np.ndarray]]:
    """Yields the same pieces, and shows progress in bytes read, from `done` to `total`."""
    with Progress(total, "B", "tokenize", done=done) as progress:
        for piece, ids in encoded:
            yield piece, ids
            fresh = piece.next.bytes_read - done
            if fresh > total // 1000:  # 0 on a pipe, where shards are logged instead
                progress.update(fresh)
                done += fresh
        if done < total:
            progress.update(total - done)


def _finished_shards(stage: atomic.StagedDirectory, dtype: np.dtype) -> list[dict[str, Any]]:
    """Returns the records of an interrupted run's shards, up to a missing or truncated one."""
    done: list[dict[str, Any]] = []
    while record := stage.finished.get(_shard_name(len(done))):
        file = stage.content / record["shard"]["name"]
        size = record["shard"]["tokens"] * dtype.itemsize
        if not file.exists() or file.stat().length != size:
            break
        done.append(record)
    return done


def _log_resumption(
    stage: atomic.StagedDirectory, done: list[dict[str, Any]], dtype: np.dtype
) -> None:
    """Says what an interrupted run has left to do again, as a shard holds whole documents."""
    file = stage.content / _shard_name(len(done))
    if again := file.stat().length // dtype.itemsize if file.exists() else 0:
        logger.info(
            "%s: %d shards were finished; %s tokens of the next one are made again, from the "
            "beginning of its first document", stage.content, len(done), f"{again:,}",
        )  # fmt: skip


def _shard_name(index: int) -> str:
    return f"tokens-{index:05}.bin"


def _write_shard(
    stage: atomic.StagedDirectory,
    index: int,
    encoded: Iterator[tuple[TextPiece, np.ndarray]],
    shard_tokens: int,
) -> tuple[TokenShard, TextPiece] | None:
    """Writes documents to disk until the shard is full.

    Returns:
      The shard and the end of its last document; None, without a file, if there are no more.
    """
    name, last = _shard_name(index), None
    with open(stage.content / name, "wb") as file:
        content = _ShardContent(hashlib.sha256())
        before = content.copy()  # without the current document, which may still be taken back
        for piece, ids in encoded:
            data = ids.tobytes()
            file.write(data)
            content.add(data, ids)
            if not piece.ends:
                continue
            if piece.kept:
                content.documents, last = content.documents + 1, piece
            else:
                content = before
                file.seek(content.nbytes)
                file.truncate()
            if content.tokens >= shard_tokens:
                break
            before = content.copy()
        file.flush()
        os.fsync(file.fileno())
    if last is None:
        (stage.content / name).unlink()
        return None
    logger.info("%s: %s tokens", name, f"{content.tokens:,}")
    digest = content.digest.hexdigest()
    return TokenShard(name, content.tokens, content.documents, content.max_id, digest), last


@dataclasses.dataclass
class _ShardContent:
    """What has been written to a shard."""

    digest: Any
    nbytes: int = 0
    tokens: int = 0
    documents: int = 0
    max_id: int = 0

    def add(self, data: bytes, ids: np.ndarray) -> None:
        self.digest.update(data)
        self.nbytes, self.tokens = self.nbytes + len(data), self.tokens + len(ids)
        self.max_id = max(self.max_id, int(ids.max(initial=0)))

    def copy(self) -> _ShardContent:
        return dataclasses.replace(self, digest=self.digest.copy())


def _shard_record(
    shard: TokenShard, last: TextPiece, counts: Sequence[DocumentCounts], begin: ReadPosition
) -> dict[str, Any]:
    """Returns the record from which a later run can continue after a shard.

    Args:
      shard, last: as returned by `_write_shard`.
      counts: the reader's counts.
      begin: where the shard began.
    """
    # Only the files since the last shard: there may be thousands of both. And because the reader is
    # ahead, the counts of this document's file come from the document.
    since = [*counts[begin.file : last.next.file], last.counts]
    return {
        "shard": dataclasses.asdict(shard), "position": last.next, "file": begin.file,
        "counts": since,
    }  # fmt: skip
