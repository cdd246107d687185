"""Random orders of ranges of any size, computed number by number."""

from __future__ import annotations

import numpy as np

_ROUNDS = 32  # one number in 2^32 stays where it was


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where `index` goes in a random order of `range(size)`: one to one for each size and key.

    The swap-or-not shuffle (Hoang, Morris, Rogaway 2012): each round pairs every number with its
    mirror image about a random point, and a random bit of the pair says whether they change places.
    It needs neither memory nor a special size.

    Args:
      index, size: int64 [N].
      key: uint64 [N].

    Returns:
      int64 [N].
    """
    x, n = index.astype(np.uint64), size.astype(np.uint64)
    for r in range(_ROUNDS):
        round_key = mix(key + np.uint64(r))
        partner = (round_key % n + n - x) % n
        swap = mix(round_key + np.maximum(x, partner)) >> np.uint64(63)
        x = np.where(swap, partner, x)
    return x.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64: uint64 -> uint64, every bit of which depends on every bit of `x`."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
