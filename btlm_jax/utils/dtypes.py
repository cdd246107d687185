"""Arguments that are dtypes: names, NumPy's and JAX's dtypes and scalar types, in one form."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import ml_dtypes  # registers bfloat16 with NumPy
import numpy as np

FLOATS = ("float32", "bfloat16", "float16")
_SHORT_NAMES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16", "half": "float16"}


def checked_dtype(value: Any, name: str, allowed: Sequence[str] = FLOATS) -> np.dtype:
    """Returns the dtype that an argument stands for.

    Args:
      value: a name, a dtype or scalar type of NumPy or JAX, or anything that has a `dtype`.
      name: the argument, for the message.
      allowed: names of the dtypes that it may be.

    Raises:
      ValueError: another dtype, or none.
    """
    try:
        found = "" if value is None else np.dtype(value).name  # NumPy takes None for float64
    except Exception:  # NumPy raises several kinds, and objects may raise any from `dtype`
        found = ""
    if found in allowed:
        return np.dtype(found)
    shown = repr(value) if isinstance(value, str) or not found else found
    meant = str(value).removeprefix("torch.").lower()
    near = difflib.get_close_matches(_SHORT_NAMES.get(meant, meant), allowed, n=1, cutoff=0.75)
    *others, last = allowed
    hint = f"; did you mean {near[0]!r}?" if near and not found else ""
    raise ValueError(f"{name}: found {shown[:80]}, expected {', '.join(others)} or {last}{hint}")


def optional_dtype(value: Any, name: str, allowed: Sequence[str] = FLOATS) -> np.dtype | None:
    """Returns `checked_dtype`, or None for an argument that was left out."""
    return None if value is None else checked_dtype(value, name, allowed)


def largest_value(dtype: Any) -> float:
    """Returns the largest finite value of a dtype of floats."""
    return float(ml_dtypes.finfo(dtype).max)
