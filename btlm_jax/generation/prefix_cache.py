"""Keys and values of prompts that were read before, so that shared beginnings are read once."""

from __future__ import annotations

import collections
from typing import NamedTuple

import numpy as np

from btlm_jax.model.kv_cache import KVCache

# A shorter match saves less than it costs to look it up and to copy it.
_MIN_MATCH = 16


class _Entry(NamedTuple):
    ids: np.ndarray  # int32 [T]
    cache: KVCache


class PrefixCache:
    """The caches of the prompts that were read last, up to a number of bytes.

    A prompt matches the entry with which it shares the longest beginning. The least recently used
    entries are dropped first.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._entries: collections.OrderedDict[bytes, _Entry] = collections.OrderedDict()
        self._nbytes = 0
        self.hits = 0  # tokens that were not read again

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are held."""
        return self._nbytes

    def clear(self) -> None:
        """Drops all entries."""
        self._entries.clear()
        self._nbytes = self.hits = 0

    def find(self, ids: np.ndarray) -> tuple[KVCache | None, int]:
        """Returns a cache and how many tokens of a prompt it holds; (None, 0) if too few.

        The last token of a prompt always has to be read, because its logits are not kept.
        """
        best_key, best = None, _MIN_MATCH - 1
        for key, entry in self._entries.items():
            if (length := _shared_length(entry.ids, ids[:-1])) > best:
                best_key, best = key, length
        if best_key is None:
            return None, 0
        self._entries.move_to_end(best_key)
        self.hits += best
        return self._entries[best_key].cache, best

    def add(self, ids: np.ndarray, cache: KVCache) -> None:
        """Keeps the cache of a prompt, unless it is larger than all that may be held."""
        if cache.nbytes > self.max_bytes or len(ids) < _MIN_MATCH:
            return
        key = ids.tobytes()
        if (old := self._entries.pop(key, None)) is not None:
            self._nbytes -= old.cache.nbytes
        self._entries[key] = _Entry(ids, cache)
        self._nbytes += cache.nbytes
        while self._nbytes > self.max_bytes:
            _, entry = self._entries.popitem(last=False)
            self._nbytes -= entry.cache.nbytes


def _shared_length(a: np.ndarray, b: np.ndarray) -> int:
    """Returns the length of the common beginning."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n
