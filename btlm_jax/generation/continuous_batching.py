"""`generate_batch`: continuous batching of many prompts of any lengths.

A fixed number of rows run, each at its own length. When a row ends, the next prompt is prefilled
and inserted into its place in the running state, without compiling anything. Prompts are taken
longest first, so that those prefilled together have similar lengths.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.generation import decode, prompts, sample_loop
from btlm_jax.generation.request import (
    GenerationRequest,
    RowRequest,
    make_request,
    warn_if_stacked,
)
from btlm_jax.generation.row_batch import initial_capacity, prefill_group, run_rows, start_rows
from btlm_jax.generation.sample_loop import SampleState
from btlm_jax.model import kv_cache, sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.params import Params

# Prompts are prefilled once this fraction of the rows is free: one in 8.
_ROWS_PER_PREFILL = 8
# All rows have slots for the longest prompt of their group, which is at most this many times as
# long as the shortest, unless fewer prompts than a batch would be left.
_MAX_LENGTH_RATIO = 4


@dataclasses.dataclass(frozen=True, eq=False)
class GenerationResult:
    """One continuation.

    Attributes:
      tokens: int32 [n], the new tokens, including an EOS.
      logprobs: fp32 [n], as in `generate`'s `GenerateOutput`.
      finish_reason: "eos", "stop" (a stop string was completed) or "length".
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: str


def generate_batch(
    model: BTLM,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    **arguments: Any,
) -> list[GenerationResult]:
    """Continues many prompts.

    Each prompt gets the tokens that it would get alone, whatever the batch size and the order, up
    to the rounding of matrix products of different shapes, which can decide between equally likely
    tokens. With one `seed` for all, prompt i draws as `generate(..., seed=[(seed, i)])` does.

    Args:
      model: the model.
      params: its weights, on a device or a mesh.
      prompts: token ids of each prompt; of any lengths, without padding.
      batch_size: rows that run together; on a mesh, rounded up to a multiple of its batch shards.
      **arguments: those of `generate` (`help(btlm.generate)`) except `attention_mask`,
        `cache_length`, `prompt_cache` and those about the form of the result. With beams, prompts
        of equal length form a batch, and rows are not refilled.

    Returns:
      `num_return_sequences` neighbors for each prompt, in the order of the prompts.

    Raises:
      ValueError: as `generate`; the message names the prompt, counted from 0.
    """
    if not len(prompts):
        return []
    request = make_request(model, prompts, **arguments)
    results = dict(iterate_results(request, params, batch_size))
    return [results[i] for i in range(len(results))]


def iterate_results(
    request: GenerationRequest, params: Params, batch_size: int, skip: Container[int] = ()
) -> Iterator[tuple[int, GenerationResult]]:
    """Yields (index, result) of a request's continuations, in the order in which they end.

    Indices are in the order of the prompts, with `num_return_sequences` neighbors for each.

    Args:
      request: the request.
      params: the weights.
      batch_size: rows that run together.
      skip: indices that are not run. Groups and shapes are the same as with them.

    Raises:
      ValueError: a bad batch size.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, expected >= 1")
    warn_if_stacked(params)
    if request.options.num_beams > 1:
        return _run_beam_batches(request, params, batch_size, skip)
    return _run_groups(request.separate_copies(), params, batch_size, skip)


class _BatchShapes(NamedTuple):
    num_rows: int  # R
    num_shards: int  # batch shards of the mesh
    prompt_slots: int  # P
    max_new_slots: int

    @property
    def prefill_rows(self) -> int:
        """Number of rows that are prefilled together, in each shard."""
        return max(1, self.num_rows // self.num_shards // _ROWS_PER_PREFILL)


def _run_groups(
    request: GenerationRequest, params: Params, batch_size: int, skip: Container[int]
) -> Iterator[tuple[int, GenerationResult]]:
    num_shards = decode.num_batch_shards(request.spec.model, params)
    for group in _length_groups([len(row.ids) for row in request.rows], batch_size):
        rows = [request.rows[i] for i in group]
        shapes = _BatchShapes(
            -(-min(batch_size, len(rows)) // num_shards) * num_shards,
            num_shards,
            prompts.bucket_length(max(len(row.ids) for row in rows)),
            prompts.bucket_length(max(row.max_new_tokens for row in rows)),
        )
        yield from _run_group(request, params, shapes, [i for i in group if i not in skip])


def _length_groups(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Returns groups of prompts that run together, longest first."""
    groups: list[list[int]] = []
    for n, i in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        longest = lengths[groups[-1][0]] if groups else None
        num_left = len(lengths) - n
        if longest is None or (lengths[i] * _MAX_LENGTH_RATIO < longest and num_left >= batch_size):
            groups.append([])
        groups[-1].append(i)
    return groups


def _run_group(
    request: GenerationRequest, params: Params, shapes: _BatchShapes, group: Sequence[int]
) -> Iterator[tuple[int, GenerationResult]]:
    queue = collections.deque(group)
    running: tuple[KVCache, SampleState] | None = None
    capacity = initial_capacity(shapes.max_new_slots)
    row_of_slot: list[int | None] = [None] * shapes.num_rows  # index of the request's row
    used = np.zeros(shapes.num_rows, np.int64)  # slots of new tokens
    while queue or any(i is not None for i in row_of_slot):
        while queue and None in row_of_slot:
            targets = _free_slots(row_of_slot, shapes)
            num_free = int((targets < shapes.num_rows).sum())
            taken = _take_prompts(request, shapes, queue, num_free)
            rows: list[RowRequest | None] = [None] * len(targets)
            for n, i in zip(np.flatnonzero(targets < shapes.num_rows), taken, strict=False):
                rows[n], row_of_slot[targets[n]] = request.rows[i], i
                used[targets[n]] = 0
            targets = np.where([row is None for row in rows], shapes.num_rows, targets)
            started = start_rows(
                request, params, rows, shapes.prompt_slots, shapes.max_new_slots, capacity
            )
            if running is None:
                running = _blank_state(started, shapes.num_rows)
            running = _insert_rows(running, started, targets.astype(np.int32))
        assert running is not None
        cache, s = running
        busy = np.array([i is not None for i in row_of_slot])
        if used[busy].max() == capacity:
            capacity = min(2 * capacity, shapes.max_new_slots)
            s = s._replace(cache=kv_cache.resized(s.cache, capacity))
        wait_for = min(shapes.prefill_rows * shapes.num_shards, int(busy.sum()))
        steps, patience = capacity - used[busy].max(), (~busy).sum() + wait_for
        s = sample_loop.advance_loop(
            request.spec,
            params,
            cache,
            s,
            request.stop_table,
            np.int32(steps),
            np.int32(patience),
        )
        running = cache, s
        done, length, ids, logprobs = jax.device_get((s.done, s.length, s.ids, s.logprobs))
        for slot, i in enumerate(row_of_slot):
            if i is None:
                continue
            row, end = request.rows[i], int(length[slot])
            T = len(row.ids)
            used[slot] = end - T - 1
            if done[slot]:
                tokens = ids[slot, T:end].copy()
                decode.check_logprobs(request.options, logprobs[slot, T:end])
                reason = request.finish_reason(row, tokens)
                row_of_slot[slot] = None
                yield i, GenerationResult(tokens, logprobs[slot, T:end].copy(), reason)


def _free_slots(row_of_slot: Sequence[int | None], shapes: _BatchShapes) -> np.ndarray:
    """Returns free slots for the rows of a prefill, shard by shard; R where there is none."""
    size = shapes.num_rows // shapes.num_shards
    targets = []
    for shard in range(shapes.num_shards):
        slots = range(shard * size, (shard + 1) * size)
        free = [slot for slot in slots if row_of_slot[slot] is None][: shapes.prefill_rows]
        targets += free + [shapes.num_rows] * (shapes.prefill_rows - len(free))
    return np.array(targets)


def _take_prompts(
    request: GenerationRequest, shapes: _BatchShapes, queue: collections.deque[int], count: int
) -> list[int]:
    """Removes up to `count` rows from the queue whose prompts can be prefilled together."""

    def group(i: int) -> int:
        return prefill_group(request.spec.model, len(request.rows[i].ids), shapes.prompt_slots)

    taken = [queue.popleft()]
    while queue and len(taken) < count and group(queue[0]) == group(taken[0]):
        taken.append(queue.popleft())
    return taken


# `like` is kept although unused, because it tells JAX the devices.
@functools.partial(jax.jit, static_argnames="rows", keep_unused=True)
def _blank_state(like: Any, rows: int) -> Any:
    """Returns a state of `rows` rows, all done, with the dtypes and shardings of another."""

    def ones(x: jax.Array) -> jax.Array:  # a length of 1 and done = True: never looked at
        out = None if mesh is None else jax.typeof(x).sharding
        return jnp.ones((rows, *x.shape[1:]) if x.ndim else (), x.dtype, out_sharding=out)

    mesh = sharding.mesh_of(like[0].layers)
    with sharding.on_mesh(mesh):
        return jax.tree.map(ones, like)


@functools.partial(jax.jit, donate_argnames="running")
def _insert_rows(running: Any, rows: Any, targets: jax.Array) -> Any:
    """Inserts `rows` [n, ...] into the slots `targets` of `running`.

    Args:
      running: the running state of R rows, which is donated.
      rows: the state of n rows. On a mesh, each shard of it goes into the same shard of `running`.
      targets: int32 [n]; rows whose target is R are dropped.
    """
    num_rows = len(running[1].done)

    def insert_local(old, new, targets):
        # Slot numbers within the shard; one past its end is dropped.
        local = jnp.where(targets < num_rows, targets % len(old), len(old))
        return old.at[local].set(new, mode="drop")

    def insert(old: jax.Array, new: jax.Array) -> jax.Array:
        if not old.ndim:  # counters shared by all rows
            return old
        spec = jax.typeof(old).sharding.spec
        if spec[0] is None:
            return insert_local(old, new, targets)
        batch_spec = jax.sharding.PartitionSpec(spec[0])
        specs = dict(in_specs=(spec, spec, batch_spec), out_specs=spec)
        sharded_targets = jax.reshard(targets, batch_spec)
        return jax.shard_map(insert_local, **specs)(old, new, sharded_targets)

    with sharding.on_mesh(sharding.mesh_of(running[0].layers)):
        return jax.tree.map(insert, running, rows)


def _run_beam_batches(
    request: GenerationRequest, params: Params, batch_size: int, skip: Container[int]
) -> Iterator[tuple[int, GenerationResult]]:
    """Runs beam searches over batches of prompts of equal length."""
    n = request.options.num_return_sequences
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(request.rows):
        by_length.setdefault(len(row.ids), []).append(i)
    for _, indices in sorted(by_length.items(), reverse=True):
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            if all(i * n + j in skip for i in batch for j in range(n)):
                continue
            results = _run_beam_batch(request, params, batch, batch_size)
            for k, result in enumerate(results):
                index = batch[k // n] * n + k % n
                if index not in skip:
                    yield index, result


def _run_beam_batch(
    request: GenerationRequest, params: Params, batch: Sequence[int], batch_size: int
) -> Iterator[GenerationResult]:
    """Yields `num_return_sequences` results for each row index in `batch`."""
    rows = [request.rows[i] for i in batch]
    num_shards = decode.num_batch_shards(request.spec.model, params)
    # Padded to few batch sizes, because each is a program.
    padded_size = min(1 << (len(rows) - 1).bit_length(), batch_size)
    padded_size += -padded_size % num_shards
    T, new = len(rows[0].ids), max(row.max_new_tokens for row in rows)
    padded = [*rows, *[None] * (padded_size - len(rows))]
    result, _ = run_rows(
        request, params, padded, prompts.bucket_length(T), prompts.bucket_length(new)
    )
    for k in range(len(rows) * request.options.num_return_sequences):
        row, end = rows[k // request.options.num_return_sequences], result.lengths[k]
        tokens, logprobs = result.ids[k, T:end], result.logprobs[k, T:end]
        decode.check_logprobs(request.options, logprobs)
        yield GenerationResult(tokens, logprobs, request.finish_reason(row, tokens))
