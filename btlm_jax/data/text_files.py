"""Documents out of text files: JSON lines, plain text, Parquet; compressed, or standard input.

A reader can begin anywhere it has been: every document says where the next one begins.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import importlib
import io
import json
import logging
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from btlm_jax.data.split import SplitPart
from btlm_jax.data.token_shards import TextSource
from btlm_jax.data.zstd_file import ZstdFile

logger = logging.getLogger(__name__)

STDIN = "-"
KINDS = (".jsonl", ".txt", ".parquet")
COMPRESSIONS = (".gz", ".zst")
OnError = Literal["raise", "skip"]

_SHOWN = 5  # unusable records that are named before they are only counted
_READ_BYTES = 1 << 20
_PARQUET_ROWS = 256  # at a time


class TextFile(NamedTuple):
    """An input. `path` is None for standard input, whose size is 0."""

    name: str
    path: Path | None
    kind: str  # of KINDS
    compression: str  # of COMPRESSIONS, or ""
    size: int = 0  # bytes
    mtime_ns: int = 0

    @property
    def identity(self) -> tuple[str, str, int, int]:
        """What tells whether it is still the same file."""
        return self.name, self.kind, self.size, self.mtime_ns


class ReadPosition(NamedTuple):
    """Where a document begins: in which file, after how many records, and bytes uncompressed.

    `read` is how many bytes of all files, as they lie on disk, come before it.
    """

    file: int = 0
    record: int = 0
    offset: int = 0
    read: int = 0


_BEGINNING = ReadPosition()


class DocumentCounts(NamedTuple):
    """Of one file, so far: `text_bytes` in UTF-8, `empty` documents and `skipped` records.

    `elsewhere` counts the documents of which nothing is in the part that is read.
    """

    documents: int = 0
    text_bytes: int = 0
    empty: int = 0
    skipped: int = 0
    elsewhere: int = 0


class TextDocument(NamedTuple):
    """A text; where the next one begins; the counts of its file, itself included."""

    text: str
    next: ReadPosition
    counts: DocumentCounts


class _Record(NamedTuple):
    """A text, or the reason why there is none; and where the next record begins."""

    text: str
    problem: str
    record: int
    offset: int
    read: int


def expand_inputs(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    stdin_format: str = "jsonl",
    on_error: OnError = "raise",
    kind: str | None = None,
) -> list[TextFile]:
    """The files that names and globs stand for, in order, those of a glob sorted by name.

    Args:
      inputs: names, globs (`**` descends), "-" for standard input.
      stdin_format: "jsonl" or "txt".
      on_error: "raise" refuses empty files here, before any work.
      kind: ".jsonl" or ".txt": of files whose names do not say another one, and standard input.

    Raises:
      FileNotFoundError: no such file, or a glob that nothing matches.
      ValueError: no inputs, a directory, an unknown kind, an empty file, or one given twice.
    """
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    names: list[str] = []
    for name in [os.fspath(x) for x in given]:
        if name == STDIN or os.path.exists(name):
            names.append(name)
            continue
        is_glob = glob.has_magic(name)
        found = sorted(glob.glob(name, recursive=True)) if is_glob else []
        if not found:
            what = "no file matches" if is_glob else "no such file"
            raise FileNotFoundError(f"{name}: {what}; expected {kind or ', '.join(KINDS)} or '-'")
        names += found
    if not names:
        raise ValueError("inputs: found none, expected files, globs or '-'")
    files = [_describe(name, stdin_format, kind) for name in names]
    seen: set[str] = set()
    for file in files:
        real = STDIN if file.path is None else os.path.realpath(file.path)
        if real in seen:
            raise ValueError(f"{file.name} is given twice: its text would be there twice")
        seen.add(real)
        if file.path is not None and not file.size and on_error == "raise":
            raise ValueError(f"{file.name} is empty: remove it, or pass on_error='skip'")
    return files


def _describe(name: str, stdin_format: str, wanted: str | None) -> TextFile:
    if name == STDIN:
        return TextFile(name, None, wanted or f".{stdin_format}", "")
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"{name} is a directory: name its files, such as '{name}/*.jsonl'")
    stem, last = os.path.splitext(path.name)
    compression = last if last in COMPRESSIONS else ""
    kind = os.path.splitext(stem)[1] if compression else last
    if wanted is not None and kind not in KINDS:
        kind = wanted
    if wanted not in (None, kind):
        raise ValueError(f"{name}: found a file of kind {kind!r}, expected {wanted!r}")
    if kind not in KINDS or (kind == ".parquet" and compression):
        raise ValueError(
            f"{name}: found a file of kind {path.suffix or 'without suffix'!r}, expected "
            f"{', '.join(KINDS)}; .jsonl and .txt also with {' or '.join(COMPRESSIONS)}"
        )
    status = path.stat()
    return TextFile(name, path, kind, compression, status.st_size, status.st_mtime_ns)


class TextReader:
    """Reads the documents of several files, one after the other.

    Args:
      files: as `expand_inputs` returns them.
      field: of JSON objects, or column, that holds the text.
      on_error: "raise", or "skip" unusable records, counting them.
      begin: where to begin.
      counts: of the files up to `begin`, that of its own file included; () at the beginning.
      part: read only what is in it; None is everything.

    Attributes:
      counts: of the files read so far.
    """

    def __init__(
        self,
        files: Sequence[TextFile],
        field: str,
        *,
        on_error: OnError = "raise",
        begin: ReadPosition = _BEGINNING,
        counts: Sequence[DocumentCounts] = (),
        part: SplitPart | None = None,
    ) -> None:
        self.counts, self._part = list(counts), part
        self._refused = 0
        self._files, self._field, self._on_error, self._begin = files, field, on_error, begin

    def documents(self) -> Iterator[TextDocument]:
        """Yields the documents that have text.

        Raises:
          ValueError: an unusable record (unless skipped), a damaged file, or one without documents.
        """
        before = 0  # bytes of the files that have been read
        for i, file in enumerate(self._files):
            before, read = before + file.size, before
            if i < self._begin.file:
                continue
            begin = self._begin if i == self._begin.file else ReadPosition(i)
            if i == len(self.counts):
                self.counts.append(DocumentCounts())
            for record in _records(file, self._field, begin):
                counts = self.counts[i]
                if problem := record.problem or _not_unicode(record.text):
                    self._refuse(file, record.record, problem)
                    self.counts[i] = counts._replace(skipped=counts.skipped + 1)
                    continue
                text = record.text if self._part is None else self._part.of(record.text)
                if text:
                    counts = counts._replace(
                        documents=counts.documents + 1,
                        text_bytes=counts.text_bytes + len(text.encode()),
                    )
                elif record.text:
                    counts = counts._replace(elsewhere=counts.elsewhere + 1)
                else:
                    counts = counts._replace(empty=counts.empty + 1)
                self.counts[i] = counts
                if text:
                    after = ReadPosition(i, record.record, record.offset, read + record.read)
                    yield TextDocument(text, after, counts)
            if not self.counts[i].documents + self.counts[i].elsewhere:
                problem = f"{file.name}: no documents with text"
                if self._on_error == "raise":
                    raise ValueError(f"{problem}; remove it, or pass on_error='skip'")
                logger.warning("%s", problem)

    @property
    def total(self) -> DocumentCounts:
        """Of all files together."""
        return DocumentCounts(*(sum(column) for column in zip(*self.counts, strict=True)))

    def sources(self) -> tuple[TextSource, ...]:
        """The files and their counts, for the manifest."""
        pairs = zip(self._files, self.counts, strict=True)
        return tuple(
            TextSource(f.name, f.size, c.documents, c.text_bytes, c.skipped) for f, c in pairs
        )

    def _refuse(self, file: TextFile, record: int, problem: str) -> None:
        unit = "row " if file.kind == ".parquet" else ""
        where = file.name if file.kind == ".txt" else f"{file.name}:{unit}{record}"
        if self._on_error == "raise":
            raise ValueError(
                f"{where}: {problem}; correct it, or pass on_error='skip' to leave such records out"
            )
        self._refused += 1
        if self._refused <= _SHOWN:
            logger.warning("skipped %s: %s", where, problem)
        elif self._refused == _SHOWN + 1:
            logger.warning("further unusable records are skipped without a message")


def _not_unicode(text: str) -> str:
    """What keeps the text from being UTF-8, or ""."""
    try:
        text.encode()
    except UnicodeEncodeError as e:  # JSON can spell half a surrogate pair
        return f"the text is not valid Unicode ({e.reason} at character {e.start})"
    return ""


def _records(file: TextFile, field: str, begin: ReadPosition) -> Iterator[_Record]:
    if file.path is not None and not file.size:
        return iter(())
    reader = {".jsonl": _jsonl, ".txt": _txt, ".parquet": _parquet}[file.kind]
    return reader(file, field, begin)


def _jsonl(file: TextFile, field: str, begin: ReadPosition) -> Iterator[_Record]:
    with _opened(file) as (stream, read):
        record, offset = begin.record, begin.offset
        _skip(stream, offset)
        for line in stream:
            record, offset = record + 1, offset + len(line)
            if line.strip():
                yield _Record(*_field_of(line, field), record, offset, read())


def _field_of(line: bytes, field: str) -> tuple[str, str]:
    """The text in a line of JSON and "", or "" and why there is none."""
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        return "", f"not UTF-8 ({e.reason} at byte {e.start} of the line)"
    except (ValueError, RecursionError) as e:
        return "", f"not JSON ({e})"
    if not isinstance(found, dict):
        return "", f"found {type(found).__name__}, expected an object with the field {field!r}"
    if field not in found:
        return "", f"no field {field!r}, found {', '.join(map(repr, found)) or 'none'}"
    if not isinstance(found[field], str):
        return "", f"field {field!r}: found {type(found[field]).__name__}, expected a string"
    return found[field], ""


def _txt(file: TextFile, field: str, begin: ReadPosition) -> Iterator[_Record]:
    if begin.record:
        return
    with _opened(file) as (stream, _):
        data = stream.read()
    try:
        text, problem = data.decode("utf-8-sig"), ""
    except UnicodeDecodeError as e:
        text, problem = "", f"not UTF-8 ({e.reason} at byte {e.start})"
    yield _Record(text, problem, 1, len(data), file.size)


def _parquet(file: TextFile, field: str, begin: ReadPosition) -> Iterator[_Record]:
    arrow = _package("pyarrow", file)
    parquet = _package("pyarrow.parquet", file)
    try:
        with parquet.ParquetFile(file.path) as table:
            columns = table.schema_arrow
            if field not in columns.names:
                raise ValueError(f"{file.name}: no column {field!r}, found {columns.names}")
            kind = columns.field(field).type
            kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
            if str(kind) not in ("string", "large_string", "string_view"):
                raise ValueError(f"{file.name}: column {field!r} is {kind}, expected strings")
            rows, record = table.metadata.num_rows, 0
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                if record + size <= begin.record:
                    record += size
                    continue
                parts = table.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[field])
                for value in (x for part in parts for x in part.column(0)):
                    record += 1
                    if record > begin.record:
                        read = file.size * record // rows
                        yield _Record(*_string(value), record, 0, read)
    except (arrow.ArrowException, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise
        raise _damaged(file, e) from e


def _string(value: Any) -> tuple[str, str]:
    """As `_field_of`, of a value of Arrow."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as e:
        return "", f"not UTF-8 ({e.reason} at byte {e.start})"
    return ("", "the text is null") if text is None else (text, "")


@contextlib.contextmanager
def _opened(file: TextFile) -> Iterator[tuple[BinaryIO, Any]]:
    """The decompressed stream, and a function that tells how much of the file has been read."""
    if file.path is None:
        yield sys.stdin.buffer, lambda: 0
        return
    with open(file.path, "rb", buffering=_READ_BYTES) as raw:
        stream: Any = raw
        if file.compression == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif file.compression == ".zst":
            stream = io.BufferedReader(ZstdFile(raw, _package("zstandard", file)), _READ_BYTES)
        try:
            yield stream, raw.tell
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise _damaged(file, e) from e


def _skip(stream: BinaryIO, nbytes: int) -> None:
    """Moves on; in compressed files what comes before must be decompressed again."""
    while nbytes:
        nbytes -= len(stream.read(min(nbytes, _READ_BYTES)))


def _damaged(file: TextFile, error: Exception) -> ValueError:
    return ValueError(f"{file.name}: damaged or truncated ({error}); fetch it again")


def _package(name: str, file: TextFile) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ValueError(
            f"{file.name}: {file.compression or file.kind} files need the package "
            f"{name.partition('.')[0]}: pip install 'btlm-jax[data]'"
        ) from e
