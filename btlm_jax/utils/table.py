"""Tables to print."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells: the first column to the left, the others, numbers mostly, to the right."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(first),
                   *(x.rjust(n) for x, n in zip(row[1:], others, strict=True))]).rstrip()
        for row in rows
    ]  # fmt: skip
