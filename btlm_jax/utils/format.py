"""Amounts of memory and disk, as people write them."""

from __future__ import annotations

import re

# Of weights in flight, wherever `max_memory` is an argument. Here, where the command line, which
# starts without JAX, can have it too.
DEFAULT_MEMORY = 512 << 20

_DECIMAL, _BINARY = "kMGT", "KMGT"
_FACTORS = {"": 1, "B": 1}
_FACTORS |= {f"{u}B": 1000 ** (i + 1) for i, u in enumerate(_DECIMAL)}
_FACTORS |= {f"{u}iB": 1024 ** (i + 1) for i, u in enumerate(_BINARY)}
_LOWER = {unit.lower(): factor for unit, factor in _FACTORS.items()}


def parse(text: str) -> int:
    """Bytes of "512MiB", "5GB" (decimal, as in Hugging Face's options), "1.5 GiB" or "1048576".

    Raises:
      ValueError: not an amount above zero.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = found[2].lower() if found else "?"
    if found is None or unit not in _LOWER or not (n := round(float(found[1]) * _LOWER[unit])):
        raise ValueError(
            f"found {text!r}, expected an amount of bytes such as 512MiB, 5GB, 1048576"
        )
    return n


def show(n: float) -> str:
    """An amount of bytes for people: "1.5 GiB"."""
    for prefix in ("", "Ki", "Mi", "Gi"):
        if n < 1024:
            return f"{n:.1f} {prefix}B" if prefix else f"{n:.0f} B"
        n /= 1024
    return f"{n:.1f} TiB"
