"""Records of one text file: the lines of JSON lines, the rows of Parquet, or a plain text.

Records of more than `LARGE_BYTES` come in several pieces, so that memory does not depend on them.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from btlm_jax.data.json_stream import JsonFieldError, stream_string_field
from btlm_jax.data.parquet_pages import largest_page
from btlm_jax.data.text_files import (
    READ_BYTES,
    TextFile,
    damaged_file,
    import_reader,
    open_decompressed,
)
from btlm_jax.utils.format import format_bytes

LARGE_BYTES = 16 << 20  # smaller records are read at once
_PARQUET_ROWS = 256  # per batch, at most
_PARQUET_BATCH_BYTES = 64 << 20
_PARQUET_PAGE_BYTES = 256 << 20  # pyarrow reads a page, at least a row, at once: into five copies


class TextRecord(NamedTuple):
    """A text or a piece of one, or the reason why there is none, and where the next record begins.

    Attributes:
      text: the text; "" with a problem.
      problem: why the record cannot be used, also if pieces of it have been read; "" if it can.
      record: number of records of the file up to and including this one.
      offset: uncompressed bytes of the file before the next record; 0 for Parquet. Only the last
        piece knows it.
      bytes_read: bytes of the file, as stored on disk, that have been read.
      ends: whether the record ends here; False before its last piece.
    """

    text: str
    problem: str
    record: int
    offset: int
    bytes_read: int
    ends: bool = True


def read_records(file: TextFile, field: str, record: int, offset: int) -> Iterator[TextRecord]:
    """Returns an iterator over the records of a file.

    Args:
      file: the file.
      field: field of JSON objects, or column, that holds the text.
      record, offset: as in the last `TextRecord` to skip; zeros start at the beginning.

    Raises:
      ValueError: (while iterating) a damaged file, a missing column or a missing package.
    """
    if file.path is not None and not file.size:
        return iter(())
    read = {".jsonl": _jsonl_records, ".txt": _txt_records, ".parquet": _parquet_records}[file.kind]
    return read(file, field, record, offset)


def _jsonl_records(file: TextFile, field: str, record: int, offset: int) -> Iterator[TextRecord]:
    with open_decompressed(file) as (stream, bytes_read):
        _skip_bytes(stream, offset)
        while line := stream.readline(LARGE_BYTES):
            record += 1
            if len(line) < LARGE_BYTES or line.endswith(b"\n"):
                offset += len(line)
                if line.strip():
                    yield TextRecord(*_json_field(line, field), record, offset, bytes_read())
                continue
            problem, blocks = "", _LineBlocks(line, stream)
            try:
                for text in stream_string_field(blocks, field):
                    yield TextRecord(text, "", record, 0, bytes_read(), ends=False)
            except JsonFieldError as e:
                problem = str(e)
            for _ in blocks:  # the rest of a line with a problem
                pass
            offset += blocks.size
            yield TextRecord("", problem, record, offset, bytes_read())


class _LineBlocks:
    """An iterator over the blocks of a line; `size` is the number of their bytes."""

    def __init__(self, begin: bytes, stream: BinaryIO) -> None:
        self._block, self._stream, self.size = begin, stream, 0
        self._ended = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._ended or not (block := self._block or self._stream.readline(READ_BYTES)):
            self._ended = True
            raise StopIteration
        self._block, self._ended = b"", block.endswith(b"\n")
        self.size += len(block)
        return block


def _json_field(line: bytes, field: str) -> tuple[str, str]:
    """Returns the text in a line of JSON and "", or "" and the reason why there is none."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        return "", f"not UTF-8 ({e.reason} at byte {e.start} of the line){_utf16_hint(line)}"
    except (ValueError, RecursionError) as e:
        return "", f"not JSON ({e})"
    if not isinstance(value, dict):
        return "", f"found {type(value).__name__}, expected an object with the field {field!r}"
    if field not in value:
        return "", f"no field {field!r}, found {', '.join(map(repr, value)) or 'none'}"
    if not isinstance(value[field], str):
        return "", f"field {field!r}: found {type(value[field]).__name__}, expected a string"
    return value[field], ""


def _txt_records(file: TextFile, field: str, record: int, offset: int) -> Iterator[TextRecord]:
    if record:
        return
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    problem, text, size = "", "", 0
    with open_decompressed(file) as (stream, bytes_read):
        data = begin = stream.read(LARGE_BYTES)
        is_large = len(data) == LARGE_BYTES
        while data or not size:
            pending = len(decoder.getstate()[0])
            following = stream.read(READ_BYTES) if is_large else b""
            try:
                text = "" if problem else decoder.decode(data, final=not following)
            except UnicodeDecodeError as e:
                at = size - pending + e.start
                text, problem = "", f"not UTF-8 ({e.reason} at byte {at}){_utf16_hint(begin)}"
            size += len(data)
            if not following:
                break
            if text:
                yield TextRecord(text, "", 1, 0, bytes_read(), ends=False)
            data = following
    if not problem and _looks_like_utf16(begin):
        problem = f"every second byte is NUL{_utf16_hint(begin)}"
    yield TextRecord("" if problem else text, problem, 1, size, file.size)


def _looks_like_utf16(data: bytes) -> bool:
    """Returns whether the bytes are UTF-16, as Windows writes it; most of it is UTF-8, too."""
    sample = data[:4096]
    nul = [sample[i::2].count(0) for i in (0, 1)]
    return data[:2] in (b"\xff\xfe", b"\xfe\xff") or 2 * max(nul) > len(sample) // 2 > 4 * min(nul)


def _utf16_hint(data: bytes) -> str:
    if not _looks_like_utf16(data):
        return ""
    return "; it looks like UTF-16: iconv -f UTF-16 -t UTF-8 converts it"


def _parquet_records(file: TextFile, field: str, record: int, offset: int) -> Iterator[TextRecord]:
    arrow = import_reader("pyarrow", file)
    parquet = import_reader("pyarrow.parquet", file)
    skipped, record = record, 0
    try:
        with parquet.ParquetFile(file.path, buffer_size=READ_BYTES) as table:
            _check_column(file, field, table.schema_arrow, arrow)
            rows = table.metadata.num_rows
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                if record + size <= skipped:
                    record += size
                    continue
                count = _rows_per_batch(file, field, table, group, record)
                batches = table.iter_batches(count, row_groups=[group], columns=[field])
                for value in (x for batch in batches for x in batch.column(0)):
                    record += 1
                    if record > skipped:
                        bytes_read = file.size * record // rows
                        yield from _arrow_records(value, record, bytes_read)
    except (arrow.ArrowException, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise
        raise damaged_file(file, e) from e


def _rows_per_batch(file: TextFile, field: str, table: Any, group: int, first: int) -> int:
    """Returns how many rows of a group to hold at a time, so that large ones are few.

    Args:
      file, field, table, group: what is read.
      first: number of rows before the group.

    Raises:
      ValueError: the rows are too large.
    """
    chunks = table.metadata.row_group(group)
    column = next(
        c for c in map(chunks.column, range(chunks.num_columns)) if c.path_in_schema == field
    )
    nbytes = column.total_uncompressed_size  # a row has at most these bytes, and those of a page
    if nbytes > _PARQUET_BATCH_BYTES:
        try:
            with open(file.name, "rb") as stream:
                nbytes = largest_page(stream, column)
        except ValueError as e:
            raise damaged_file(file, e) from e
    if nbytes > _PARQUET_PAGE_BYTES:
        raise ValueError(
            f"{file.name}: of rows {first + 1:,} to {first + chunks.num_rows:,} (row group "
            f"{group}) {format_bytes(nbytes)} are read at once, expected at most "
            f"{format_bytes(_PARQUET_PAGE_BYTES)}: divide the longest text of these rows, or write "
            "them as .jsonl, where a text may have any length"
        )
    return max(1, min(_PARQUET_ROWS, _PARQUET_BATCH_BYTES // max(1, nbytes)))


def _check_column(file: TextFile, field: str, schema: Any, arrow: Any) -> None:
    if field not in schema.names:
        raise ValueError(f"{file.name}: no column {field!r}, found {schema.names}")
    kind = schema.field(field).type
    kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
    if str(kind) not in ("string", "large_string", "string_view"):
        raise ValueError(f"{file.name}: column {field!r} is {kind}, expected strings")


def _arrow_records(value: Any, record: int, bytes_read: int) -> Iterator[TextRecord]:
    """Yields the records of an Arrow scalar: one, or the pieces of a large text."""
    if not value.is_valid:
        yield TextRecord("", "the text is null", record, 0, bytes_read)
        return
    data = memoryview(getattr(value, "value", value).as_buffer())
    decoder = codecs.getincrementaldecoder("utf-8")()
    step = len(data) if len(data) < LARGE_BYTES else READ_BYTES
    text = ""
    for start in range(0, len(data), step or 1):
        pending, ends = len(decoder.getstate()[0]), start + step >= len(data)
        try:
            text = decoder.decode(data[start : start + step], final=ends)
        except UnicodeDecodeError as e:
            at = start - pending + e.start
            yield TextRecord("", f"not UTF-8 ({e.reason} at byte {at})", record, 0, bytes_read)
            return
        if not ends:
            yield TextRecord(text, "", record, 0, bytes_read, ends=False)
    yield TextRecord(text, "", record, 0, bytes_read)


def _skip_bytes(stream: BinaryIO, nbytes: int) -> None:
    """Skips bytes; in a compressed file they must be decompressed again."""
    while nbytes:
        if not (data := stream.read(min(nbytes, READ_BYTES))):
            raise EOFError("it has become shorter")
        nbytes -= len(data)
