"""The rows of an engine on the device: each decodes one request, then another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from btlm_jax.generation import prompts, sample_loop
from btlm_jax.generation.decode import DecodeSpec
from btlm_jax.generation.options import GenerationOptions
from btlm_jax.generation.prefill import PromptState
from btlm_jax.generation.processors import Processor
from btlm_jax.generation.request import RowRequest
from btlm_jax.generation.request_handle import Handle
from btlm_jax.generation.row_batch import initial_capacity, start_rows
from btlm_jax.generation.row_options import RowOptions, row_options, rule_sizes, take_rows
from btlm_jax.generation.row_slots import blank_state, insert_rows, recent_tokens
from btlm_jax.generation.sample_loop import SampleState
from btlm_jax.model import kv_cache
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.params import Params


@dataclasses.dataclass(eq=False)
class RunningBatch:
    """R rows that run together.

    Attributes:
      model, params: the model and its weights.
      num_rows: R.
      max_length: maximum tokens of a row, with its prompt.
      steps: tokens that are decoded between two fetches.
      cache_dtype, processors, stop_table: as for `Engine`.
      slots: the request of every row, or None.
    """

    model: BTLM
    params: Params
    num_rows: int
    max_length: int
    steps: int
    cache_dtype: DTypeLike | None
    processors: tuple[Processor, ...]
    stop_table: np.ndarray | None

    def __post_init__(self) -> None:
        self.slots: list[Handle | None] = [None] * self.num_rows
        # At most as many slots of new tokens as each row has used.
        self._used = np.zeros(self.num_rows, np.int64)
        # Lengths of the prompts of rows that started since the last dispatch; -1 for others.
        self._restarted = np.full(self.num_rows, -1, np.int32)
        self._seen: Any = np.zeros(self.num_rows, np.int32)
        self._running: tuple[KVCache, SampleState] | None = None
        self._max_new_slots = prompts.bucket_length(self.max_length)
        # Options that use all rules that any request has used, so that one program serves all.
        self._rules: list[tuple[GenerationOptions, tuple[int, ...]]] = [(GenerationOptions(), ())]

    @property
    def num_running(self) -> int:
        """Rows that decode a request."""
        return sum(handle is not None for handle in self.slots)

    @property
    def prompt_slots(self) -> int:
        """P, the slots for the prompt of every row."""
        return 0 if self._running is None else self._running[0].capacity

    def free(self, handle: Handle) -> None:
        """Frees the row of a request, if it has one."""
        self.slots = [None if h is handle else h for h in self.slots]

    def start(
        self, handles: Sequence[Handle], targets: np.ndarray, prompt: PromptState | None = None
    ) -> None:
        """Starts the rows of requests in free slots.

        Args:
          handles: the requests.
          targets: the slots of the rows of a prefill; R where there is none.
          prompt: the prompt after prefill, if it was read in chunks.
        """
        if not self.num_running:  # so that long caches, and rules of the past, do not stay
            self._running, self._rules = None, self._rules[:1]
        filled = np.flatnonzero(targets < self.num_rows)[: len(handles)]
        slots_after = list(self.slots)
        for slot, handle in zip(targets[filled], handles, strict=True):
            slots_after[slot] = handle
        options = self._slot_options(slots_after, handles)
        rows: list[RowRequest | None] = [None] * len(targets)
        for i, handle in zip(filled, handles, strict=True):
            rows[i] = handle.row._replace(options=take_rows(options, targets[i]))
        targets = np.where([row is None for row in rows], self.num_rows, targets).astype(np.int32)
        longest = max(prompts.bucket_length(len(handle.row.ids)) for handle in handles)
        slots = max(self.prompt_slots, longest, 0 if prompt is None else prompt.cache.capacity)
        if prompt is not None:
            prompt = prompt._replace(cache=kv_cache.resized(prompt.cache, slots))
        capacity = initial_capacity(self._max_new_slots)
        if self._running is not None:
            capacity = self._running[1].cache.capacity
        shared = dataclasses.replace(
            handles[0].request,
            spec=self._spec,
            stop_table=self.stop_table,
            cache_dtype=self.cache_dtype,
        )
        started = start_rows(
            shared, self.params, rows, slots, self._max_new_slots - slots, capacity, prompt
        )
        if self._running is None:
            self._running = blank_state(started, self.num_rows)
        cache, s = self._running
        if slots > cache.capacity:
            cache = kv_cache.resized(cache, slots)
        s = s._replace(rows=s.rows._replace(options=options))
        self._running = insert_rows((cache, s), started, targets)
        # At last, so that a failure above leaves the rows as they are.
        self.slots = slots_after
        for slot, handle in zip(targets[filled], handles, strict=True):
            self._used[slot], self._restarted[slot] = 0, len(handle.row.ids)

    def _slot_options(
        self, slots_after: Sequence[Handle | None], new: Sequence[Handle]
    ) -> RowOptions:
        """Returns the options of all slots, with the rules that any request has used."""
        for handle in new:
            own = handle.request.options, handle.request.eos
            if _program_of([*self._rules, own]) != _program_of(self._rules):
                self._rules.append(own)
        idle = GenerationOptions(), ()
        slots = [idle if h is None else (h.request.options, h.request.eos) for h in slots_after]
        together = row_options(*zip(*slots, *self._rules, strict=True))
        return take_rows(together, slice(0, self.num_rows))

    @property
    def _spec(self) -> DecodeSpec:
        sizes = rule_sizes([options for options, _ in self._rules])
        return DecodeSpec(self.model, sizes=sizes, processors=self.processors)

    def decode(self, wait_for: int | None) -> None:
        """Lets the device decode a few tokens in all rows, and fetches those of the call before.

        Rows that have ended are freed.

        Args:
          wait_for: number of rows after whose end no more is decoded; None is all.
        """
        assert self._running is not None
        cache, s = self._running
        recent = recent_tokens(s, self._seen, self._restarted, self.steps + 1)
        self._seen, self._restarted = recent["length"], np.full_like(self._restarted, -1)
        handles, busy = list(self.slots), np.array([handle is not None for handle in self.slots])
        used, capacity = int(self._used[busy].max()), s.cache.capacity
        if used >= capacity:
            capacity = min(2 * capacity, self._max_new_slots)
            s = s._replace(cache=kv_cache.resized(s.cache, capacity))
        steps, num_busy = min(self.steps, capacity - used), int(busy.sum())
        enough = num_busy if wait_for is None else min(wait_for, num_busy)
        s = sample_loop.advance_loop(
            self._spec,
            self.params,
            cache,
            s,
            self.stop_table,
            np.int32(steps),
            np.int32(self.num_rows - num_busy + enough),
        )
        self._running = cache, s
        # The device works on the steps above while these tokens are fetched.
        self._take_tokens(handles, jax.device_get(recent), steps)

    def _take_tokens(
        self, handles: Sequence[Handle | None], recent: dict[str, np.ndarray], steps: int
    ) -> None:
        """Hands out tokens.

        Args:
          handles: the requests of the rows.
          recent: from `recent_tokens`.
          steps: at most as many tokens are decoded after these.
        """
        for slot, handle in enumerate(handles):
            if handle is None:
                continue
            count = recent["length"][slot] - recent["seen"][slot]
            handle.add_tokens(recent["tokens"][slot, :count], recent["logprobs"][slot, :count])
            used = recent["length"][slot] - len(handle.row.ids) - 1 + steps
            self._used[slot] = min(used, handle.row.max_new_tokens - 1)
            if handle.finished:
                self.free(handle)


def _program_of(rules: Sequence[tuple[GenerationOptions, tuple[int, ...]]]) -> Any:
    """Returns what of options selects a program."""
    options, eos = zip(*rules, strict=True)
    leaves, structure = jax.tree.flatten(row_options(options, eos))
    return structure, [x.shape[1:] for x in leaves], rule_sizes(options)
