"""Thread pools within a memory budget."""

from __future__ import annotations

import os
import threading
import time

import pytest

from btlm_jax.checkpoint import zarr
from btlm_jax.convert import convert, export
from btlm_jax.convert.threads import for_each_in_threads, num_threads
from support.conversion_runs import ONE_THREAD


def test_the_number_of_threads_follows_the_budget():
    block = zarr.BLOCK_BYTES
    assert num_threads(5 * block) == 1
    assert num_threads(11 * block) == 2
    assert num_threads(1 << 40) <= 2 + (os.cpu_count() or 1)
    with pytest.raises(ValueError, match=r"max_memory: found 79\.0 MiB, expected at least 80\.0"):
        num_threads(79 << 20)
    with pytest.raises(ValueError, match=r"5 blocks of 1\.0 GiB"):
        num_threads(1 << 30, 1 << 30)


def test_the_first_error_stops_the_remaining_items():
    started, lock = [], threading.Lock()

    def work(item: int) -> None:
        with lock:
            started.append(item)
        if item == 3:
            raise KeyError(item)
        if item > 3:
            time.sleep(0.001)

    with pytest.raises(KeyError, match="3"):
        for_each_in_threads(range(5_000), work, 1)
    assert started[:4] == [0, 1, 2, 3] and len(started) < 5_000


def test_too_small_budgets_are_refused(conversions, tmp_path):
    with pytest.raises(ValueError, match=r"max_memory: found .*, expected at least 80.0 MiB"):
        convert(conversions.hf, tmp_path / "c", max_memory=ONE_THREAD // 2)
    # An export needs less if all arrays are small.
    with pytest.raises(ValueError, match=r"max_memory: found 1000 B, expected at least"):
        export(conversions.checkpoint, tmp_path / "c", max_memory=1000)
    assert list(tmp_path.iterdir()) == []
