"""The decoding loop of `generate`, compiled for a fixed number of steps, to be timed."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.generation import prompts, sample_loop
from btlm_jax.generation.decode import DecodeSpec, RowInputs
from btlm_jax.generation.options import GenerationOptions
from btlm_jax.generation.prefill import PromptState
from btlm_jax.generation.row_options import row_options
from btlm_jax.model.btlm import BTLM


class DecodeLoop:
    """Greedy decoding after a context of zeros, which costs as much as any other context.

    Attributes:
      cache_bytes: bytes of the KV cache, for the context and the new tokens.
      temporary_bytes: bytes of temporary arrays in the compiled program.
    """

    def __init__(
        self,
        model: BTLM,
        params: Any,
        *,
        batch_size: int,
        context: int,
        steps: int,
        rounds: int,
        cache_dtype: str | None = None,
    ) -> None:
        """Compiles the loop and runs it once.

        Args:
          model: the model.
          params: its weights, unstacked.
          batch_size: sequences.
          context: tokens in the cache before the first step.
          steps: steps in each call of `measure_seconds`.
          rounds: calls of `measure_seconds` that the cache has room for.
          cache_dtype: dtype of the cache, as in `generate`.
        """
        max_new_tokens = steps * (rounds + 1) + 1
        prompt = _zero_context(model, params, batch_size, context, cache_dtype)
        lengths = jnp.full(batch_size, context, jnp.int32)
        zeros = np.zeros(batch_size, np.int32)
        rows = RowInputs(
            lengths, lengths, zeros, zeros, lengths + max_new_tokens + 1, zeros.astype(np.uint32),
            zeros, zeros, np.ones(batch_size, bool),
            row_options([GenerationOptions()] * batch_size, [()] * batch_size),
        )  # fmt: skip
        spec = DecodeSpec(model)
        slots = context + prompts.bucket_length(max_new_tokens + 1)
        ids = np.zeros((batch_size, slots), np.int32)
        self._state: Any = sample_loop.start_loop(
            spec, params, prompt, rows, ids, None, None, prompts.bucket_length(max_new_tokens)
        )
        self._params, self._prompt_cache = params, prompt.cache
        self._counts = np.int32(steps), np.int32(batch_size)
        self._program: Any = sample_loop.advance_loop.lower(
            spec, params, prompt.cache, self._state, None, *self._counts
        ).compile()
        layers = jax.tree.leaves(self._state.cache.layers)
        self.cache_bytes = sum(x.nbytes for x in layers) + prompt.cache.nbytes
        memory: Any = self._program.memory_analysis()
        self.temporary_bytes = memory.temp_size_in_bytes
        self.measure_seconds()

    def measure_seconds(self) -> float:
        """Runs the steps, and returns their time."""
        start = time.perf_counter()
        self._state = self._program(
            self._params, self._prompt_cache, self._state, None, *self._counts
        )
        jax.block_until_ready(self._state)
        seconds = time.perf_counter() - start
        if bool(np.asarray(self._state.done).any()):
            raise AssertionError("a row ended")
        return seconds


def _zero_context(
    model: BTLM, params: Any, batch_size: int, context: int, cache_dtype: str | None
) -> PromptState:
    """Returns the state after prompts whose keys and values are zeros."""
    empty = model.init_cache(params, batch_size, context, dtype=cache_dtype)
    cache = dataclasses.replace(
        empty,
        segment_ids=jnp.ones_like(empty.segment_ids),
        segment=jnp.ones(batch_size, jnp.int32),
        length=jnp.full(batch_size, context, jnp.int32),
        cursor=jnp.int32(context),
        fresh=False,
    )
    return PromptState(cache, jnp.zeros((batch_size, model.config.vocab_size)))
