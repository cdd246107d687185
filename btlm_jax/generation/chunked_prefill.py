"""Reading one prompt in chunks, so that rows that are running wait for one chunk at most."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from btlm_jax.generation import prompts
from btlm_jax.generation.prefill import PromptState, extend_prefill, prefill
from btlm_jax.generation.request import RowRequest
from btlm_jax.model import kv_cache
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.params import Params


@dataclasses.dataclass
class ChunkedPrefill:
    """A prompt of which a part has been read.

    Attributes:
      row: the row that will continue it.
      chunk: tokens that are read at a time.
      rows: rows of the cache, which are all the same: as many as the mesh divides.
      cache: keys and values of its beginning; None before the first chunk.
      num_read: tokens in the cache.
      state: the prompt after the last chunk.
    """

    row: RowRequest
    chunk: int
    rows: int
    cache: KVCache | None = None
    num_read: int = 0
    state: PromptState | None = None

    def read_chunk(self, model: BTLM, params: Params, dtype: object) -> None:
        """Reads the next chunk.

        Args:
          model, params: the model and its weights.
          dtype: dtype of the cache.
        """
        ids, start = self.row.ids, self.num_read
        count = min(self.chunk, len(ids) - start)
        width = min(self.chunk, prompts.bucket_length(count))
        padded = np.zeros((self.rows, width), np.int32)
        padded[:, :count] = ids[start : start + count]
        capacity = prompts.bucket_length(_last_slot(len(ids), start, self.chunk))
        if self.cache is None:
            lengths = np.full(self.rows, count, np.int32)
            state = prefill(model, params, padded, None, lengths, capacity, dtype)
        else:
            # Another prompt may continue differently after the beginning that both share.
            beginning = dataclasses.replace(
                self.cache,
                length=jnp.full_like(self.cache.length, start),
                cursor=jnp.full_like(self.cache.cursor, start),
            )
            state = extend_prefill(model, params, padded, np.int32(count), beginning, capacity)
        self.cache, self.num_read = state.cache, start + count
        if self.num_read == len(ids):  # without the slots that only padding needed
            slots = prompts.bucket_length(len(ids))
            self.cache = kv_cache.resized(state.cache, slots)
            self.state = state._replace(cache=self.cache)


def _last_slot(length: int, start: int, chunk: int) -> int:
    """Returns the slots that reading from `start` on writes, with the padding of the last chunk."""
    tail = (length - start) % chunk or min(chunk, length - start)
    return length - tail + min(chunk, prompts.bucket_length(tail))
