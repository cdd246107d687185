"""Text formats: amounts of bytes, lists, aligned columns, and values that JSON can hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

# The default of every `max_memory` argument: bytes of weights in flight during a conversion. It is
# defined here because the command line shows it in `--help` and must not import JAX for that, which
# the converters do.
DEFAULT_MEMORY = 512 << 20

_FACTORS = {"": 1, "b": 1}
_FACTORS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
_FACTORS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}


def parse_bytes(text: str) -> int:
    """Returns the number of bytes in "512MiB", "5GB" (decimal), "1.5 GiB" or "1048576".

    Raises:
      ValueError: `text` is not an amount above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    factor = _FACTORS.get(match[2].lower(), 0) if match else 0
    nbytes = round(float(match[1]) * factor) if match else 0
    if not nbytes:
        raise ValueError(
            f"found {text!r}, expected an amount of bytes such as 512MiB, 5GB, 1048576"
        )
    return nbytes


def format_bytes(nbytes: float) -> str:
    """Returns an amount of bytes with a binary prefix: "1.5 GiB"."""
    for prefix in ("", "Ki", "Mi", "Gi"):
        if nbytes < 1024:
            return f"{nbytes:.1f} {prefix}B" if prefix else f"{nbytes:.0f} B"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def join_first(items: Iterable[object], most: int = 5) -> str:
    """Joins the first items, and adds the number of the others: "a, b, c and 901 more"."""
    texts = [str(item) for item in items]
    omitted = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {omitted:,} more" if omitted > 0 else "")


def list_first(problems: Iterable[object], most: int = 5) -> str:
    """Returns the first problems and the number of the others, each on an indented new line."""
    texts = [str(problem) for problem in problems]
    omitted = len(texts) - most
    lines = texts[:most] + ([f"and {omitted:,} more"] if omitted > 0 else [])
    return "".join(f"\n  {line}" for line in lines)


def align_columns(rows: Sequence[Sequence[str]], align: str = "<>") -> list[str]:
    """Returns one line per row, with columns padded to equal width and two spaces apart.

    Args:
      rows: the cells; every row has as many as the first one.
      align: "<" (left) or ">" (right) for each column; the last one applies to all further columns.

    Raises:
      ValueError: the rows differ in length.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = align.ljust(len(widths), align[-1])
    return [
        "  ".join(
            f"{cell:{a}{width}}" for cell, a, width in zip(row, aligns, widths, strict=False)
        ).rstrip()
        for row in rows
    ]


def finite_json(value: Any) -> Any:
    """Replaces NaN and Inf, which JSON cannot hold, by None in nested dicts, lists and tuples."""
    if isinstance(value, dict):
        return {name: finite_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
