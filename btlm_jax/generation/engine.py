"""`Engine`: continues requests that come and go, in rows of one running batch.

A row decodes one request at a time. In every step the engine reads at most one chunk of waiting
prompts and then decodes a few tokens in all rows. The device decodes while the tokens of the step
before are fetched. Requests with different options share the batch (`row_options`).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike, DTypeLike

from btlm_jax.generation import decode, prompts, stop_automaton
from btlm_jax.generation.chunked_prefill import ChunkedPrefill
from btlm_jax.generation.prefix_cache import PrefixCache
from btlm_jax.generation.processors import Processor, as_processors
from btlm_jax.generation.request import GenerationRequest, make_request
from btlm_jax.generation.request_handle import Handle
from btlm_jax.generation.row_batch import prefill_group
from btlm_jax.generation.row_slots import free_slots
from btlm_jax.generation.running_batch import RunningBatch
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params
from btlm_jax.model.positions import check_length

# Prompts are prefilled once this fraction of the rows is free: one in 8.
_ROWS_PER_PREFILL = 8


class EngineFull(RuntimeError):
    """The queue of an engine has no room."""


class Engine:
    """Continues requests that come and go. It is not thread-safe: one thread owns it.

    A request gets the tokens that it gets alone, whatever else arrives or is cancelled, up to the
    rounding of matrix products of different shapes, which can decide between equally likely tokens.
    """

    def __init__(
        self,
        model: BTLM,
        params: Params,
        *,
        rows: int = 8,
        max_length: int | None = None,
        chunk: int = 512,
        steps: int = 1,
        queue_size: int = 256,
        cache_dtype: DTypeLike | None = None,
        prefix_cache_bytes: int = 1 << 30,
        logits_processor: Processor | Sequence[Processor] = (),
        stop_table: np.ndarray | None = None,
    ):
        """Creates an idle engine; memory for rows is allocated as requests come.

        Args:
          model: the model.
          params: its weights, on a device or a mesh.
          rows: requests that run together; on a mesh, rounded up to a multiple of its batch shards.
          max_length: maximum tokens of a prompt and its continuation; default the model's context.
          chunk: tokens of prompts that are read between two steps of the running rows. With
            dynamic ALiBi scaling, which depends on the whole prompt, prompts are read at once and
            no beginnings are kept.
          steps: tokens that rows decode between two fetches; more cost the host less.
          queue_size: requests that may wait for a row.
          cache_dtype: dtype of the KV cache, as for `generate`. With int8, later chunks of a prompt
            read the rounded keys and values of earlier ones, which can change tokens.
          prefix_cache_bytes: memory for the keys and values of prompts, so that a beginning that
            prompts share is read once; 0 for none, which reads short prompts together.
          logits_processor: as for `generate`, for all requests.
          stop_table: `build_stop_table` of all requests, if they are the same: rows then end on the
            device. Otherwise stop strings are found when tokens are fetched.

        Raises:
          ValueError: a number out of range.
        """
        length = model.config.n_positions if max_length is None else max_length
        sizes = {
            "rows": (rows, 1),
            "max_length": (length, 2),
            "chunk": (chunk, 1),
            "steps": (steps, 1),
            "queue_size": (queue_size, 1),
            "prefix_cache_bytes": (prefix_cache_bytes, 0),
        }
        for name, (value, lowest) in sizes.items():
            if value < lowest:
                raise ValueError(f"{name}: found {value}, expected >= {lowest}")
        if max_length is not None:
            check_length(model.config, max_length, "max_length", "choose a smaller one")
        self.model, self.params = model, params
        self.max_length = length
        self._num_shards = decode.num_batch_shards(model, params)
        num_rows = -(-rows // self._num_shards) * self._num_shards
        self.queue_size, self._cache_dtype = queue_size, cache_dtype
        # Scales that grow with the text are those of the whole prompt.
        scaling = model.config.alibi_scaling
        is_dynamic = scaling is not None and scaling.train_seq_len is not None
        self.chunk = self.max_length if is_dynamic else chunk
        self.prefixes = PrefixCache(0 if is_dynamic else prefix_cache_bytes)
        self._queue: collections.deque[Handle] = collections.deque()
        self._reading: tuple[Handle, ChunkedPrefill] | None = None
        self._batch = RunningBatch(
            # Its defaults are applied to requests, and must not select a program.
            dataclasses.replace(model, generation_config=None),
            params,
            num_rows,
            self.max_length,
            steps,
            cache_dtype,
            as_processors(logits_processor),
            stop_table,
        )

    # Requests ------------------------------------------------------------------------------------

    def submit(self, prompt: ArrayLike, *, block: bool = True, **options: Any) -> Handle:
        """Adds a request to the queue.

        Args:
          prompt: int [T], token ids.
          block: if the queue is full, take steps until it has room; otherwise raise.
          **options: those of `generate_batch`, except beams, `num_return_sequences`,
            `logits_processor` and `cache_dtype`.

        Raises:
          ValueError: as `generate`; the prompt and its continuation are longer than `max_length`.
          EngineFull: the queue is full.
        """
        for name in ("logits_processor", "cache_dtype"):
            if options.get(name) not in (None, ()):
                raise ValueError(
                    f"{name}: found it in a request, expected none: it is the same for all "
                    "requests of an engine"
                )
        request = make_request(self.model, [prompt], ["prompt"], **options)
        for name in ("num_beams", "num_return_sequences"):
            if (value := getattr(request.options, name)) > 1:
                raise ValueError(
                    f"{name}: found {value}, expected 1: an engine runs single rows; use generate, "
                    "or submit several requests"
                )
        return self.submit_request(request, block=block)

    def submit_request(self, request: GenerationRequest, *, block: bool = True) -> Handle:
        """Adds a request of one row, as `submit`."""
        row = request.rows[0]
        if row.max_length > self.max_length:
            raise ValueError(
                f"prompt: found {len(row.ids)} tokens and {row.max_new_tokens} new ones, expected "
                f"at most {self.max_length} together (max_length): shorten one of them"
            )
        while len(self._queue) >= self.queue_size:
            if not block:
                raise EngineFull(f"{len(self._queue)} requests are waiting: try again later")
            self.step()
        handle = Handle(self, request)
        if request.stop_table is not None:
            ids, mask = row.ids[None], row.mask[None] * request.stops_in_prompt
            handle.stop_state = int(
                stop_automaton.stop_state_after_prompt(request.stop_table, ids, mask)[0]
            )
        self._queue.append(handle)
        return handle

    def cancel(self, handle: Handle) -> None:
        """Ends a request; its row is free for the next one. Does nothing if it has ended."""
        if handle.finished:
            return
        handle.finish_reason = "cancelled"
        if handle in self._queue:
            self._queue.remove(handle)
        elif self._reading is not None and self._reading[0] is handle:
            self._reading = None
        self._batch.free(handle)

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self._queue) + (self._reading is not None)

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        return self._batch.num_running

    # Steps ---------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Reads one chunk of waiting prompts, and decodes `steps` tokens in all rows.

        Returns:
          Whether there is work left.
        """
        self._read_prompts()
        if self.num_running:
            # Rows that have ended wait until there is enough work for a prefill.
            wait_for = self._rows_per_prefill * self._num_shards if self._queue else None
            self._batch.decode(wait_for)
        return bool(self._queue or self._reading or self.num_running)

    def _read_prompts(self) -> None:
        if self._reading is None and self._queue:
            targets = free_slots(self._batch.slots, self._num_shards, self._rows_per_prefill)
            num_free = int((targets < self._batch.num_rows).sum())
            if not num_free:
                return
            if group := self._take_short_prompts(num_free):
                try:
                    self._batch.start(group, targets)
                except BaseException:
                    self._queue.extendleft(reversed(group))
                    raise
                return
            handle = self._queue.popleft()
            cache, length = self.prefixes.find(handle.row.ids)
            prompt = ChunkedPrefill(handle.row, self.chunk, self._num_shards, cache, length)
            self._reading = handle, prompt
        if self._reading is None:
            return
        handle, prompt = self._reading
        if prompt.state is None:  # otherwise its row could not be started
            prompt.read_chunk(self.model, self.params, self._cache_dtype)
        if prompt.state is not None:
            self._reading = None
            self.prefixes.add(handle.row.ids, prompt.state.cache)
            self._batch.start(
                [handle], free_slots(self._batch.slots, self._num_shards, 1), prompt.state
            )

    @property
    def _rows_per_prefill(self) -> int:
        """Number of short prompts that are read together, in each shard."""
        return max(1, self._batch.num_rows // self._num_shards // _ROWS_PER_PREFILL)

    def _take_short_prompts(self, count: int) -> list[Handle]:
        """Removes up to `count` requests from the queue whose prompts can be read together."""
        if self.prefixes.max_bytes:
            return []

        def group(handle: Handle) -> int:
            slots = max(self._batch.prompt_slots, prompts.bucket_length(len(handle.row.ids)))
            return prefill_group(self.model, len(handle.row.ids), slots)

        taken: list[Handle] = []
        while self._queue and len(taken) < count and len(self._queue[0].row.ids) <= self.chunk:
            if taken and group(self._queue[0]) != group(taken[0]):
                break
            taken.append(self._queue.popleft())
        return taken
