"""`generate_batch`: continuous batching of many prompts of any lengths.

An `Engine` runs them. Prompts are taken longest first, so that those that are read together have
similar lengths. Beam searches run in batches of prompts of equal length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Sequence
from typing import Any

from btlm_jax.generation import decode, prompts
from btlm_jax.generation.engine import Engine
from btlm_jax.generation.request import GenerationRequest, make_request, warn_if_stacked
from btlm_jax.generation.request_handle import GenerationResult
from btlm_jax.generation.row_batch import run_rows
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params

# Tokens of a prompt that are read at a time, and that are decoded between two fetches.
_CHUNK, _STEPS = 2048, 32
# All rows have slots for the longest prompt of their group, which is at most this many times as
# long as the shortest, unless fewer prompts than a batch would be left.
_MAX_LENGTH_RATIO = 4


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


def _run_groups(
    request: GenerationRequest, params: Params, batch_size: int, skip: Container[int]
) -> Iterator[tuple[int, GenerationResult]]:
    for group in _length_groups([len(row.ids) for row in request.rows], batch_size):
        longest = max(request.rows[i].max_length for i in group)
        engine = Engine(
            request.spec.model,
            params,
            rows=min(batch_size, len(group)),
            max_length=longest,
            # Chunks would read an int8 cache of earlier ones.
            chunk=_CHUNK if request.cache_dtype is None else longest,
            steps=_STEPS,
            queue_size=len(group),
            cache_dtype=request.cache_dtype,
            prefix_cache_bytes=0,
            logits_processor=request.spec.processors,
            stop_table=request.stop_table,
        )
        unfinished = {
            i: engine.submit_request(dataclasses.replace(request, rows=[request.rows[i]]))
            for i in group
            if i not in skip
        }
        while unfinished:
            engine.step()
            for i in [i for i, handle in unfinished.items() if handle.finished]:
                yield i, unfinished.pop(i).result()


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
