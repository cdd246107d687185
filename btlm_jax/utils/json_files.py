"""JSON files that this package wrote, read back: whatever is wrong with one, the error names it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_object(file: str | os.PathLike[str], fix: str) -> dict[str, Any]:
    """Reads a JSON object from a local file.

    Args:
      file: the file.
      fix: what to do about a damaged one, for the error: "copy the run directory again".

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is empty, truncated, or holds something else.
    """
    return parse_object(Path(file).read_bytes(), file, fix)


def parse_object(
    data: bytes, file: str | os.PathLike[str], fix: str | None = None
) -> dict[str, Any]:
    """Parses the contents of a JSON file.

    Args:
      data: the contents.
      file: where they are from, for the error.
      fix: as for `read_object`; None leaves it to the caller.

    Raises:
      ValueError: as `read_object`.
    """
    name, advice = os.fspath(file), f": {fix}" if fix else ""
    if not data.strip(b" \t\r\n\0"):
        found = "is empty" if not data else "holds nothing but blanks or zero bytes"
        raise ValueError(f"{name} {found}{advice}")
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{name} is damaged, not JSON ({e}){advice}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds no JSON object{advice}")
    return value


def json_type(value: Any) -> str:
    """Returns JSON's name of the type of a parsed value: "array", "null", …"""
    if value is None:
        return "null"
    names = {dict: "object", list: "array", str: "string", bool: "boolean"}
    return names.get(type(value), "number")
