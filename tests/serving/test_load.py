"""Many streams at once for a minute: nothing is lost or mixed, and memory does not grow."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from random import Random

import pytest
from serving.conftest import RunningServer

STREAMS, SECONDS = 64, 60
PROMPTS = ["the quick", "a", "b" * 40, "hello there, this is", "x" * 17, "0", "zebra", "and then"]


def current_rss() -> int:
    """Returns the memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_many_streams_for_a_minute(of_bytes):
    with RunningServer(*of_bytes, rows=16, queue_size=STREAMS, limits=2 * STREAMS) as server:
        sizes, counts = asyncio.run(run_streams(server))
    print(f"{sum(counts)} streams; memory {sizes[0] >> 20} to {sizes[-1] >> 20} MiB")
    assert min(counts) > 2
    assert sizes[-1] - sizes[len(sizes) // 2] < 64 << 20


async def run_streams(server) -> tuple[list[int], list[int]]:
    async with server.async_client() as client:

        async def text(i: int, seed: int) -> str:
            stream = await client.completions.create(
                model="tiny", prompt=PROMPTS[i], max_tokens=20, temperature=0.8, seed=seed,
                stream=True,
            )  # fmt: skip
            return "".join([chunk.choices[0].text async for chunk in stream])

        expected = {
            (i, seed): await text(i, seed) for i in range(len(PROMPTS)) for seed in range(3)
        }
        end, sizes = time.monotonic() + SECONDS, []

        async def worker(number: int) -> int:
            r, count = Random(number), 0
            while time.monotonic() < end:
                key = r.choice(list(expected))
                assert await text(*key) == expected[key]
                count += 1
            return count

        async def watch() -> None:
            while time.monotonic() < end:
                sizes.append(current_rss())
                await asyncio.sleep(2)

        *counts, _ = await asyncio.gather(*map(worker, range(STREAMS)), watch())
        return sizes, counts
