"""Sizes of the pages of Parquet columns, which pyarrow decodes at once and does not tell."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

_HEADER_BYTES = 64 << 10  # at most; headers hold the smallest and largest value of a page
# Types of Thrift's compact protocol, in which the headers are written.
_BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = 3, (4, 5, 6), 7, 8, (9, 10), 12


def largest_page(file: BinaryIO, column: Any) -> int:
    """Returns the decompressed bytes of the largest page of a column chunk.

    Only the headers of the pages are read. A page holds at least one value.

    Args:
      file: the Parquet file.
      column: pyarrow's `ColumnChunkMetaData`.

    Raises:
      ValueError: the headers are damaged or encrypted.
    """
    position = column.data_page_offset
    if column.has_dictionary_page:
        position = min(position, column.dictionary_page_offset or position)
    end, largest = position + column.total_compressed_size, 0
    while position < end:
        file.seek(position)
        header = io.BytesIO(file.read(min(_HEADER_BYTES, end - position)))
        fields = _read_struct(header)
        if not (fields.get(2, -1) >= 0 and fields.get(3, -1) >= 0):
            raise ValueError(f"no page header at byte {position}")
        largest = max(largest, fields[2])
        position += header.tell() + fields[3]
    return largest


def _read_struct(stream: io.BytesIO) -> dict[int, int]:
    """Reads a struct and returns its integers by the number of their field."""
    integers, number = {}, 0
    while (byte := _read_byte(stream)) != 0:
        delta, kind = byte >> 4, byte & 15
        number = number + delta if delta else _read_integer(stream)
        if kind in _INTEGERS:
            integers[number] = _read_integer(stream)
        elif kind > 2:  # the type of a boolean is its value
            _skip(stream, kind)
    return integers


def _skip(stream: io.BytesIO, kind: int) -> None:
    """Skips a value of a type."""
    if kind in (1, 2, _BYTE):
        _read_byte(stream)
    elif kind in _INTEGERS:
        _read_varint(stream)
    elif kind == _DOUBLE:
        stream.seek(8, io.SEEK_CUR)
    elif kind == _BINARY:
        stream.seek(_read_varint(stream), io.SEEK_CUR)
    elif kind in _LISTS:
        byte = _read_byte(stream)
        size = byte >> 4
        for _ in range(_read_varint(stream) if size == 15 else size):
            _skip(stream, byte & 15)
    elif kind == _STRUCT:
        _read_struct(stream)
    else:
        raise ValueError(f"unknown type {kind} in a page header")


def _read_byte(stream: io.BytesIO) -> int:
    data = stream.read(1)
    if not data:
        raise ValueError("a page header that does not end")
    return data[0]


def _read_varint(stream: io.BytesIO) -> int:
    value = shift = 0
    while True:
        byte = _read_byte(stream)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
        shift += 7


def _read_integer(stream: io.BytesIO) -> int:
    """Reads a signed integer."""
    value = _read_varint(stream)
    return (value >> 1) ^ -(value & 1)
