"""Text files -> token ids on disk (`token_shards`): in parallel, resumably, always the same bytes.

A shard holds whole documents and ends with the first that brings it to `shard_tokens`. So where
shards end follows from the texts alone, and the record of a finished shard need only say where in
the inputs it ended for a later run to go on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from etils import epath

from btlm_jax.data.split import SplitPart
from btlm_jax.data.text_files import (
    DocumentCounts,
    OnError,
    ReadPosition,
    TextDocument,
    TextFile,
    TextReader,
    expand_inputs,
)
from btlm_jax.data.token_shards import (
    FORMAT,
    METADATA_FILE,
    TOKENIZER_FOLDER,
    TokenShard,
    TokenShardsMetadata,
    is_token_directory,
    token_dtype,
    tokenizer_fingerprint,
)
from btlm_jax.data.tokenizer import (
    END_OF_TEXT,
    check_vocabulary,
    load_tokenizer,
    tokenizer_directory,
)
from btlm_jax.utils import atomic, paths
from btlm_jax.utils.progress import Progress

logger = logging.getLogger(__name__)

# What defines the tokenizer, and what names its special tokens.
ASSETS = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
# Of text per call of the tokenizer: enough to make a call's overhead vanish; what it returns takes
# some 150 bytes per token.
_BATCH_BYTES = 256 << 10


@dataclasses.dataclass(frozen=True)
class TokenizeReport:
    """What `tokenize` did, what an interrupted run had finished included.

    Attributes:
      tokens: written, EOS included.
      documents: written.
      text_bytes: of their text, in UTF-8.
      empty: documents left out because they have no text.
      skipped: records left out because they could not be used.
      shards: files.
      resumed: how many of them an interrupted run had finished.
      fresh_tokens: written by this run.
      seconds: of wall clock, of this run.
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

    Documents without text are left out. Marker tokens in a text ("<|endoftext|>") are text: no
    document can fake its own end. A run that was killed is continued by the same call, with the
    same result, byte for byte; but standard input cannot be read twice.

    Args:
      inputs: files or globs of `.jsonl` (an object per line) and `.txt` (a document per file), both
        also with `.gz` or `.zst`, and `.parquet`; "-" is standard input. Read in this order, the
        files of a glob sorted by name.
      target: a local directory that does not exist yet.
      tokenizer: a directory with its files, or a checkpoint of ours (local or URL).
      field: of JSON objects, or column, that holds the text.
      shard_tokens: how many end a shard, with the document they are in.
      vocab_size: of the model that will read the tokens; default the tokenizer's.
      eos: the token that ends a document; default what the tokenizer's files name as `eos_token`,
        or else "<|endoftext|>".
      on_error: what to do about a record that cannot be used (malformed, without the field, not
        UTF-8): stop there, or skip and count it.
      stdin_format: what comes on standard input: JSON lines, or one document.
      threads: how many batches of documents are tokenized at a time; default one per core. The
        result does not depend on it.
      overwrite: replace an existing directory of tokens.
      part: of a split, to tokenize alone; None is everything. (`prepare` makes both.)

    Raises:
      FileNotFoundError: no such input, nothing that matches a glob, no tokenizer.
      FileExistsError: the target exists.
      ValueError: an unknown kind of file, an empty or damaged one, an unusable record, a missing
        package, a tokenizer without EOS or with a larger vocabulary than the model.
    """
    began = time.monotonic()
    threads = (os.cpu_count() or 1) if threads is None else threads
    _check_options(shard_tokens, on_error, stdin_format, threads)
    check_token_target(target, overwrite=overwrite, ours=is_token_directory)
    files = expand_inputs(inputs, stdin_format=stdin_format, on_error=on_error)
    encoder = Encoder(tokenizer, eos, vocab_size)
    key: dict[str, Any] | None = resume_key(files, encoder, [field, shard_tokens, part])
    if any(f.path is None for f in files):
        logger.warning("standard input cannot be read twice: if interrupted, this starts over")
        key = None
    with atomic.new_directory(
        target, overwrite=overwrite, ours=is_token_directory, key=key
    ) as stage:
        done = _finished(stage, encoder.dtype)
        resumed = len(done)
        begin = ReadPosition(*done[-1]["position"]) if done else ReadPosition()
        counts: list[DocumentCounts] = []
        for record in done:
            counts[record["file"] :] = [DocumentCounts(*x) for x in record["counts"]]
        reader = TextReader(files, field, on_error=on_error, begin=begin, counts=counts, part=part)
        total = sum(f.size for f in files)
        encoded = _shown(encode_documents(reader.documents(), encoder, threads), total, begin.read)
        while written := _write_shard(stage, len(done), encoded, shard_tokens):
            shard, last = written
            done.append(_record_of(shard, last, reader.counts, begin))
            stage.record(shard.name, done[-1])
            begin = last.next
        if not done:
            there = reader.total.elsewhere
            what = part.empty_message(there) if part and there else "no documents with text"
            raise ValueError(f"{', '.join(f.name for f in files)}: {what}")
        (stage.content / TOKENIZER_FOLDER).mkdir(exist_ok=True)
        for name, data in encoder.assets.items():
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
        logger.warning("%d UNUSABLE RECORDS SKIPPED; the metadata says in which files", skipped)
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
    """Raises ValueError if tokens cannot lie there; else as `atomic.refuse_existing`."""
    if paths.is_remote(paths.location(target)):
        raise ValueError(f"{target}: expected a local directory, which can be memory-mapped")
    atomic.refuse_existing(target, overwrite=overwrite, ours=ours)


def resume_key(
    files: Sequence[TextFile], encoder: Encoder, options: Sequence[Any]
) -> dict[str, Any]:
    """What tells one piece of work from any other (`atomic.new_directory`)."""
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
    for name, value, known in (
        ("on_error", on_error, ("raise", "skip")),
        ("stdin_format", stdin_format, ("jsonl", "txt")),
    ):
        if value not in known:
            raise ValueError(f"{name}: found {value!r}, expected {' or '.join(map(repr, known))}")


class Encoder:
    """A tokenizer that appends EOS, and what the metadata says about it."""

    def __init__(
        self, source: str | os.PathLike[str], eos: str | None, vocab_size: int | None
    ) -> None:
        self._tokenizer = tokenizer = load_tokenizer(source)
        tokenizer.encode_special_tokens = True  # as the text they are
        if vocab_size is not None:
            check_vocabulary(tokenizer, vocab_size)
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = vocab_size or max(ids.values()) + 1
        home = tokenizer_directory(source)
        self.assets = {n: (home / n).read_bytes() for n in ASSETS if (home / n).is_file()}
        eos = eos or _named_eos(self.assets) or END_OF_TEXT
        if eos not in ids:
            raise ValueError(
                f"{source}: the tokenizer has no token {eos!r} to end documents with; name one of "
                "its tokens (eos)"
            )
        self.eos_id = ids[eos]
        self.sha256 = tokenizer_fingerprint(self.assets)
        self.dtype = token_dtype(self.vocab_size)

    def encode(self, documents: list[TextDocument]) -> list[np.ndarray]:
        """The ids of each document, EOS last."""
        texts = [document.text for document in documents]
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*x.ids, self.eos_id], self.dtype) for x in found]


def _named_eos(assets: dict[str, bytes]) -> str | None:
    """The `eos_token` of the tokenizer's configuration, if it names one."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            found = json.loads(assets.get(name, b"{}"))["eos_token"]
        except (ValueError, KeyError, TypeError):
            continue
        found = found.get("content") if isinstance(found, dict) else found
        if isinstance(found, str):
            return found
    return None


def encode_documents(
    documents: Iterable[TextDocument], encoder: Encoder, threads: int
) -> Iterator[tuple[TextDocument, np.ndarray]]:
    """Documents with their ids, in order; a few batches are read and tokenized ahead.

    Threads, because the tokenizer works outside the GIL: 3 % of the time is spent inside.
    """
    ahead: deque[tuple[list[TextDocument], Future[list[np.ndarray]]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for batch in _batches(documents):
            ahead.append((batch, pool.submit(encoder.encode, batch)))
            if len(ahead) > threads + 1:
                first, ids = ahead.popleft()
                yield from zip(first, ids.result(), strict=True)
        for batch, ids in ahead:
            yield from zip(batch, ids.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _shown(
    encoded: Iterable[tuple[TextDocument, np.ndarray]], total: int, done: int
) -> Iterator[tuple[TextDocument, np.ndarray]]:
    """The same, with progress: bytes of the files that were read, `done` of `total` before."""
    with Progress(total, "B", "tokenize", done=done) as progress:
        for document, ids in encoded:
            yield document, ids
            ahead = document.next.read - done
            if ahead > total // 1000:  # 0 on a pipe, where shards are what is logged
                progress.update(ahead)
                done += ahead
        if done < total:
            progress.update(total - done)


def _batches(documents: Iterable[TextDocument]) -> Iterator[list[TextDocument]]:
    batch: list[TextDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _finished(stage: atomic.StagedDirectory, dtype: np.dtype) -> list[dict[str, Any]]:
    """The records of an interrupted run's shards, up to the first that is missing or cut short."""
    done: list[dict[str, Any]] = []
    while record := stage.finished.get(_shard_name(len(done))):
        file = stage.content / record["shard"]["name"]
        size = record["shard"]["tokens"] * dtype.itemsize
        if not file.exists() or file.stat().length != size:
            break
        done.append(record)
    return done


def _shard_name(index: int) -> str:
    return f"tokens-{index:05}.bin"


def _write_shard(
    stage: atomic.StagedDirectory,
    index: int,
    encoded: Iterator[tuple[TextDocument, np.ndarray]],
    shard_tokens: int,
) -> tuple[TokenShard, TextDocument] | None:
    """Writes documents until the shard is full. Returns it, on disk, and the last of them.

    None, and no file, if there are no more documents.
    """
    first = next(encoded, None)
    if first is None:
        return None
    last, name = first[0], _shard_name(index)
    hashed, tokens, documents, max_id = hashlib.sha256(), 0, 0, 0
    with open(stage.content / name, "wb") as file:
        for document, ids in itertools.chain([first], encoded):
            data = ids.tobytes()
            file.write(data)
            hashed.update(data)
            tokens, documents = tokens + len(ids), documents + 1
            max_id, last = max(max_id, int(ids.max())), document
            if tokens >= shard_tokens:
                break
        file.flush()
        os.fsync(file.fileno())
    logger.info("%s: %s tokens", name, f"{tokens:,}")
    return TokenShard(name, tokens, documents, max_id, hashed.hexdigest()), last


def _record_of(
    shard: TokenShard, last: TextDocument, counts: Sequence[DocumentCounts], begin: ReadPosition
) -> dict[str, Any]:
    """What a later run needs to go on after a shard.

    Args:
      shard, last: as `_write_shard` returns them.
      counts: of the reader.
      begin: where the shard began.
    """
    # Only of files since the last shard: there may be thousands of either. And the reader is
    # ahead: its counts of this document's file are not those of this moment.
    since = [*counts[begin.file : last.next.file], last.counts]
    return {
        "shard": dataclasses.asdict(shard), "position": last.next, "file": begin.file,
        "counts": since,
    }  # fmt: skip
