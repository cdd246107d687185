"""Number and size of the differences between two blocks of a tensor."""

from __future__ import annotations

import numpy as np

_UINTS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
# Elements compared at once: float64 copies of a whole block would exceed the memory budget.
_PART = 1 << 18


def block_difference(x: np.ndarray, y: np.ndarray) -> tuple[int, float]:
    """Compares two 1-D blocks of one size, bit for bit or, between dtypes, by value.

    Returns:
      The number of differing elements and the largest absolute difference, which is infinite if one
      element of a pair is NaN, or if an infinity meets anything but itself.
    """
    same_dtype = x.dtype == y.dtype
    uint = _UINTS[x.dtype.itemsize]
    if same_dtype and np.array_equal(x.view(uint), y.view(uint)):
        return 0, 0.0
    count, largest = 0, 0.0
    for start in range(0, len(x), _PART):
        a, b = x[start : start + _PART], y[start : start + _PART]
        p, q = a.astype(np.float64), b.astype(np.float64)
        equal = (p == q) | (np.isnan(p) & np.isnan(q))
        differs = a.view(uint) != b.view(uint) if same_dtype else ~equal
        count += int(differs.sum())
        with np.errstate(invalid="ignore"):
            difference = np.where(equal, 0.0, np.abs(p - q))
        largest = max(largest, float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max()))
    return count, largest
