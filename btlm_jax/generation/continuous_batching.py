"""`generate_batch`: many prompts of any lengths, through a fixed number of rows.

Rows run on their own, each at its own length. One that has ended gives its slot to the next prompt,
which is read apart and put into the running state; nothing is compiled for that anew. Prompts are
taken longest first, so that those read at once are of about the same length.
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

from btlm_jax.generation import decode, generate, prompts, sample_loop
from btlm_jax.generation.request import (
    GenerationRequest,
    RowRequest,
    initial_capacity,
    make_request,
    prefill_group,
    start_rows,
    warn_if_stacked,
)
from btlm_jax.generation.sample_loop import SampleState
from btlm_jax.model import kv_cache, sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.params import Params

# Of its rows, a batch waits for one in so many to end before it reads prompts.
_WAIT = 8
# All rows have slots for the longest prompt of their group, which is at most so many times as long
# as the shortest; unless fewer than a batch would be left.
_SPREAD = 4


@dataclasses.dataclass(frozen=True, eq=False)
class GenerationResult:
    """One continuation.

    Attributes:
      tokens: int32 [n], the new tokens, an EOS included.
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

    Each gets the tokens it would get alone, whatever the size of the batch and the order, up to
    the rounding of matrix products of other shapes (so, of equally likely tokens, another may win).
    With one `seed` for all, prompt i draws as with `generate(..., seed=[(seed, i)])`.

    Args:
      model, params: the model and its weights, on a device or a mesh.
      prompts: token ids of each; of any lengths, without padding.
      batch_size: rows that run at once; on a mesh rounded up to what it divides.
      **arguments: those of `generate` (`help(btlm.generate)`), but for `attention_mask`,
        `cache_length`, `prompt_cache` and what concerns its result. Beams are searched for prompts
        of one length at a time, without refilling.

    Returns:
      `num_return_sequences` neighbours for each prompt, in the order of the prompts.

    Raises:
      ValueError: as `generate`; the message names the prompt, from 0.
    """
    if not len(prompts):
        return []
    asked = make_request(model, prompts, **arguments)
    found = dict(iterate_results(asked, params, batch_size))
    return [found[i] for i in range(len(found))]


def iterate_results(
    asked: GenerationRequest, params: Params, batch_size: int, known: Container[int] = ()
) -> Iterator[tuple[int, GenerationResult]]:
    """Continues the rows of a request; gives the result of each, with its index, as it ends.

    Args:
      known: rows whose results are not wanted, though groups and shapes are as if they were.

    Raises:
      ValueError: the size of the batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, expected >= 1")
    warn_if_stacked(params)
    if asked.program.options.num_beams > 1:
        return _searched(asked, params, batch_size, known)
    return _all_groups(asked, params, batch_size, known)


def _all_groups(
    asked: GenerationRequest, params: Params, batch_size: int, known: Container[int]
) -> Iterator[tuple[int, GenerationResult]]:
    parts = decode.num_batch_shards(asked.program.model, params)
    for group in _groups([len(row.ids) for row in asked.rows], batch_size):
        rows = [asked.rows[i] for i in group]
        shapes = _Shapes(
            -(-min(batch_size, len(rows)) // parts) * parts,
            parts,
            prompts.bucket_length(max(len(row.ids) for row in rows)),
            prompts.bucket_length(max(row.new for row in rows)),
        )
        yield from _run(asked, params, shapes, [i for i in group if i not in known])


def _groups(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Prompts that run together, longest first."""
    groups: list[list[int]] = []
    for n, i in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        longest = lengths[groups[-1][0]] if groups else None
        left = len(lengths) - n
        if longest is None or (lengths[i] * _SPREAD < longest and left >= batch_size):
            groups.append([])
        groups[-1].append(i)
    return groups


class _Shapes(NamedTuple):
    rows: int  # R
    parts: int  # of the mesh, into which they are split
    prompt: int  # P, slots of prompts
    room: int  # the most slots of new tokens

    @property
    def read(self) -> int:
        """Rows that are read at once, in each part."""
        return max(1, self.rows // self.parts // _WAIT)


def _run(
    asked: GenerationRequest, params: Params, shapes: _Shapes, group: Sequence[int]
) -> Iterator[tuple[int, GenerationResult]]:
    queue = collections.deque(group)
    running: tuple[KVCache, SampleState] | None = None
    capacity = initial_capacity(shapes.room)
    slots: list[int | None] = [None] * shapes.rows
    used = np.zeros(shapes.rows, np.int64)  # slots of new tokens
    while queue or any(i is not None for i in slots):
        while queue and None in slots:
            targets = _targets(slots, shapes)
            taken = _taken(asked, shapes, queue, int((targets < shapes.rows).sum()))
            rows: list[RowRequest | None] = [None] * len(targets)
            for place, i in zip(np.flatnonzero(targets < shapes.rows), taken, strict=False):
                rows[place], slots[targets[place]] = asked.rows[i], i
                used[targets[place]] = 0
            targets = np.where([row is None for row in rows], shapes.rows, targets)
            begun = start_rows(asked, params, rows, shapes.prompt, shapes.room, capacity)
            if running is None:
                running = _blank(begun, shapes.rows)
            running = _inserted(running, begun, targets.astype(np.int32))
        assert running is not None
        cache, s = running
        busy = np.array([i is not None for i in slots])
        if used[busy].max() == capacity:
            capacity = min(2 * capacity, shapes.room)
            s = s._replace(cache=kv_cache.resized(s.cache, capacity))
        wait = min(shapes.read * shapes.parts, int(busy.sum()))
        steps, patience = capacity - used[busy].max(), (~busy).sum() + wait
        s = sample_loop.advance_loop(
            asked.program, params, cache, s, asked.table, np.int32(steps), np.int32(patience)
        )
        running = cache, s
        done, length, ids, logprobs = jax.device_get((s.done, s.length, s.ids, s.logprobs))
        for slot, i in enumerate(slots):
            if i is None:
                continue
            row, end = asked.rows[i], int(length[slot])
            T = len(row.ids)
            used[slot] = end - T - 1
            if done[slot]:
                tokens = ids[slot, T:end].copy()
                reason = asked.reason(row, tokens)
                slots[slot] = None
                yield i, GenerationResult(tokens, logprobs[slot, T:end].copy(), reason)


def _targets(slots: Sequence[int | None], shapes: _Shapes) -> np.ndarray:
    """Free slots for the rows that are read at once, in each part; R where there is none."""
    size = shapes.rows // shapes.parts
    found = []
    for part in range(shapes.parts):
        own = range(part * size, (part + 1) * size)
        free = [slot for slot in own if slots[slot] is None][: shapes.read]
        found += free + [shapes.rows] * (shapes.read - len(free))
    return np.array(found)


def _taken(
    asked: GenerationRequest, shapes: _Shapes, queue: collections.deque[int], most: int
) -> list[int]:
    """The next rows, of those whose prompts can be read at once."""

    def key(i: int) -> int:
        return prefill_group(asked.program.model, len(asked.rows[i].ids), shapes.prompt)

    taken = [queue.popleft()]
    while queue and len(taken) < most and key(queue[0]) == key(taken[0]):
        taken.append(queue.popleft())
    return taken


# Unused, `like` still tells JAX which devices.
@functools.partial(jax.jit, static_argnames="rows", keep_unused=True)
def _blank(like: Any, rows: int) -> Any:
    """A state of `rows` rows, all done, with the dtypes and shardings of another."""

    def ones(x: jax.Array) -> jax.Array:  # of length 1, done, and never looked at
        out = None if mesh is None else jax.typeof(x).sharding
        return jnp.ones((rows, *x.shape[1:]) if x.ndim else (), x.dtype, out_sharding=out)

    mesh = sharding.mesh_of(like[0].layers)
    with sharding.on_mesh(mesh):
        return jax.tree.map(ones, like)


@functools.partial(jax.jit, donate_argnames="running")
def _inserted(running: Any, rows: Any, targets: jax.Array) -> Any:
    """`running` with `rows` [n, ...] in its slots `targets`, int32 [n]; R is nowhere.

    On a mesh, each part of the rows goes into the same part of the running ones.
    """

    total = len(running[1].done)

    def local(old, new, targets):
        # Numbers within a part; one past its end is nowhere.
        at = jnp.where(targets < total, targets % len(old), len(old))
        return old.at[at].set(new, mode="drop")

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        if not old.ndim:  # what is counted for all rows
            return old
        spec = jax.typeof(old).sharding.spec
        if spec[0] is None:
            return local(old, new, targets)
        own = jax.sharding.PartitionSpec(spec[0])
        specs = dict(in_specs=(spec, spec, own), out_specs=spec)
        return jax.shard_map(local, **specs)(old, new, jax.reshard(targets, own))

    with sharding.on_mesh(sharding.mesh_of(running[0].layers)):
        return jax.tree.map(put, running, rows)


def _searched(
    asked: GenerationRequest, params: Params, batch_size: int, known: Container[int]
) -> Iterator[tuple[int, GenerationResult]]:
    """By beams, prompts of one length at a time."""
    by_length: dict[int, list[int]] = {}
    for i in range(0, len(asked.rows), asked.copies):
        by_length.setdefault(len(asked.rows[i].ids), []).append(i)
    for _, same in sorted(by_length.items(), reverse=True):
        for start in range(0, len(same), batch_size):
            some = same[start : start + batch_size]
            if all(i + n in known for i in some for n in range(asked.copies)):
                continue
            rows = [asked.rows[i] for i in some]
            # Few sizes of batches, as each is another program.
            full = min(1 << (len(rows) - 1).bit_length(), batch_size)
            filled = rows + rows[-1:] * (full - len(rows))
            seeds = [(row.seed, row.stream) for row in filled]
            own: dict[str, Any] = dict(seed=seeds, return_dict_in_generate=True)
            ids = np.stack([row.ids for row in filled])
            out = generate.generate(asked.program.model, params, ids, **{**asked.arguments, **own})
            for i, row in enumerate(rows):
                for n in range(asked.copies):
                    at = i * asked.copies + n
                    logprobs = out.logprobs[at]
                    logprobs = logprobs[: int((~np.isnan(logprobs)).sum())]
                    tokens = out.sequences[at, len(row.ids) :][: len(logprobs)]
                    if some[i] + n not in known:
                        yield (
                            some[i] + n,
                            GenerationResult(tokens, logprobs, asked.reason(row, tokens)),
                        )
