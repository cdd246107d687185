"""A few threads over many tensors, within a budget of memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from btlm_jax.checkpoint import zarr
from btlm_jax.utils.format import format_bytes

# What a thread holds: a block in hand and one on its way to or from the disk, each with the copies
# that coding and writing make of it.
_BLOCKS_PER_WORKER = 5
# More threads than cores, because each waits for the disk as often as it computes.
_MOST = 2 + (os.cpu_count() or 1)


def num_threads(max_memory: int, largest_block: int = zarr.BLOCK_BYTES) -> int:
    """How many threads may work on blocks at once.

    Args:
        max_memory: bytes in flight.
        largest_block: bytes of the largest block that any of them handles.

    Raises:
        ValueError: not even one.
    """
    why = f"{_BLOCKS_PER_WORKER} blocks of {format_bytes(largest_block)}"
    return num_threads_holding(max_memory, _BLOCKS_PER_WORKER * largest_block, why)


def num_threads_holding(max_memory: int, each: int, why: str) -> int:
    """How many threads that hold `each` bytes may work at once.

    Raises:
        ValueError: not even one; `why` says what the bytes are.
    """
    if max_memory < each:
        raise ValueError(
            f"max_memory: found {format_bytes(max_memory)}, expected at least "
            f"{format_bytes(each)} ({why})"
        )
    return min(max_memory // each, _MOST)


def for_each_in_threads(items: Iterable[Any], work: Callable[[Any], None], threads: int) -> None:
    """Calls `work` on every item. The first error ends it: what has not begun is not begun."""
    pool = ThreadPoolExecutor(threads)
    try:
        futures = [pool.submit(work, item) for item in items]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
