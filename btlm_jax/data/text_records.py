"""Records of one text file: the lines of JSON lines, the rows of Parquet, or a plain text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from btlm_jax.data.text_files import (
    READ_BYTES,
    TextFile,
    damaged_file,
    import_reader,
    open_decompressed,
)

_PARQUET_ROWS = 256  # per batch


class TextRecord(NamedTuple):
    """A text, or the reason why there is none, and where the next record begins.

    Attributes:
      text: the text; "" with a problem.
      problem: why the record cannot be used; "" if it can.
      record: number of records of the file up to and including this one.
      offset: uncompressed bytes of the file before the next record; 0 for Parquet.
      bytes_read: bytes of the file, as stored on disk, that have been read.
    """

    text: str
    problem: str
    record: int
    offset: int
    bytes_read: int


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
        for line in stream:
            record, offset = record + 1, offset + len(line)
            if line.strip():
                yield TextRecord(*_json_field(line, field), record, offset, bytes_read())


def _json_field(line: bytes, field: str) -> tuple[str, str]:
    """Returns the text in a line of JSON and "", or "" and the reason why there is none."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        return "", f"not UTF-8 ({e.reason} at byte {e.start} of the line)"
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
    with open_decompressed(file) as (stream, _):
        data = stream.read()
    try:
        text, problem = data.decode("utf-8-sig"), ""
    except UnicodeDecodeError as e:
        text, problem = "", f"not UTF-8 ({e.reason} at byte {e.start})"
    yield TextRecord(text, problem, 1, len(data), file.size)


def _parquet_records(file: TextFile, field: str, record: int, offset: int) -> Iterator[TextRecord]:
    arrow = import_reader("pyarrow", file)
    parquet = import_reader("pyarrow.parquet", file)
    skipped, record = record, 0
    try:
        with parquet.ParquetFile(file.path) as table:
            _check_column(file, field, table.schema_arrow, arrow)
            rows = table.metadata.num_rows
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                if record + size <= skipped:
                    record += size
                    continue
                batches = table.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[field])
                for value in (x for batch in batches for x in batch.column(0)):
                    record += 1
                    if record > skipped:
                        bytes_read = file.size * record // rows
                        yield TextRecord(*_arrow_text(value), record, 0, bytes_read)
    except (arrow.ArrowException, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise
        raise damaged_file(file, e) from e


def _check_column(file: TextFile, field: str, schema: Any, arrow: Any) -> None:
    if field not in schema.names:
        raise ValueError(f"{file.name}: no column {field!r}, found {schema.names}")
    kind = schema.field(field).type
    kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
    if str(kind) not in ("string", "large_string", "string_view"):
        raise ValueError(f"{file.name}: column {field!r} is {kind}, expected strings")


def _arrow_text(value: Any) -> tuple[str, str]:
    """Returns the same as `_json_field`, for an Arrow scalar."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as e:
        return "", f"not UTF-8 ({e.reason} at byte {e.start})"
    return ("", "the text is null") if text is None else (text, "")


def _skip_bytes(stream: BinaryIO, nbytes: int) -> None:
    """Skips bytes; in a compressed file they must be decompressed again."""
    while nbytes:
        nbytes -= len(stream.read(min(nbytes, READ_BYTES)))
