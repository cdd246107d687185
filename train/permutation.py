"""Random permutations of ranges of any size, computed element by element."""

from __future__ import annotations

import numpy as np

_ROUNDS = 32  # after this many, one element in 2^32 has never been swapped


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Returns where a random permutation of `range(size)` sends `index`.

    For each size and key the mapping is one to one. It is the swap-or-not shuffle (Hoang, Morris,
    Rogaway 2012): each round pairs every number with its mirror image about a random point, and a
    random bit of the pair decides whether the two are swapped. It needs no memory and works for
    every size.

    Args:
      index: int64 [N], below `size`.
      size: int64 [N].
      key: uint64 [N].

    Returns:
      int64 [N].
    """
    x, n = index.astype(np.uint64), size.astype(np.uint64)
    for r in range(_ROUNDS):
        round_key = splitmix64(key + np.uint64(r))
        partner = (round_key % n + n - x) % n
        swap = splitmix64(round_key + np.maximum(x, partner)) >> np.uint64(63)
        x = np.where(swap, partner, x)
    return x.astype(np.int64)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Hashes uint64 to uint64 (SplitMix64): every output bit depends on every input bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
