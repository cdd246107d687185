"""Bit-for-bit comparison of trees of arrays and of directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np


def same_bits(a: Any, b: Any) -> bool:
    """Returns whether two trees of arrays have the same dtypes, shapes and bytes."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    arrays = ((np.asarray(x), np.asarray(y)) for x, y in pairs)
    return all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in arrays
    )


def read_directory(folder: Path) -> dict[str, bytes]:
    """Returns the contents of all files below a directory, by relative path."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
