"""A thread pool for work on many tensors within a memory budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from btlm_jax.checkpoint import zarr
from btlm_jax.utils.format import format_bytes

# A thread holds the block it works on and one on its way to or from the disk, each with the copies
# that encoding and writing make of it.
_BLOCKS_PER_THREAD = 5
# More threads than cores, because each waits for the disk as often as it computes.
_MAX_THREADS = 2 + (os.cpu_count() or 1)


def num_threads(max_memory: int, largest_block: int = zarr.BLOCK_BYTES) -> int:
    """Returns how many threads may work on blocks at once.

    Args:
      max_memory: budget for blocks in flight, in bytes.
      largest_block: size of the largest block that any thread handles, in bytes.

    Raises:
      ValueError: the budget does not suffice for one thread.
    """
    purpose = f"{_BLOCKS_PER_THREAD} blocks of {format_bytes(largest_block)}"
    return num_threads_holding(max_memory, _BLOCKS_PER_THREAD * largest_block, purpose)


def num_threads_holding(max_memory: int, thread_bytes: int, purpose: str) -> int:
    """Returns how many threads that hold `thread_bytes` each may work at once.

    Args:
      max_memory: budget for all threads, in bytes.
      thread_bytes: memory of one thread, in bytes.
      purpose: the use of that memory, for the error message.

    Raises:
      ValueError: the budget does not suffice for one thread.
    """
    if max_memory < thread_bytes:
        raise ValueError(
            f"max_memory: found {format_bytes(max_memory)}, expected at least "
            f"{format_bytes(thread_bytes)} ({purpose})"
        )
    return min(max_memory // thread_bytes, _MAX_THREADS)


def for_each_in_threads(items: Iterable[Any], work: Callable[[Any], None], threads: int) -> None:
    """Calls `work` on every item in a pool of threads.

    After the first exception no further items are started, and the exception is raised.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        futures = [pool.submit(work, item) for item in items]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
