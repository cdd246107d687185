"""Read ranges of bytes, so that nobody reads or holds more of a file than is asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import numpy as np

from btlm_jax.convert.hf.advice import REDOWNLOAD


def contiguous_runs(shape: tuple[int, ...], index: tuple[slice, ...]) -> Iterator[tuple[int, int]]:
    """The runs of consecutive elements that make up a part of a C-ordered array, in order.

    Args:
        shape: of the array.
        index: a slice of step 1 per axis.

    Yields:
        (first element, number of elements), as long as possible.
    """
    bounds = [i.indices(n)[:2] for n, i in zip(shape, index, strict=True)]
    if any(stop <= start for start, stop in bounds):
        return
    inner = len(shape)
    while inner and bounds[inner - 1] == (0, shape[inner - 1]):
        inner -= 1
    # Axes from `inner` on are taken whole, so a run spans them and the range of the axis before.
    last = max(inner - 1, 0)
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if not shape:
        yield 0, 1
        return
    length = (bounds[last][1] - bounds[last][0]) * steps[last]
    first = bounds[last][0] * steps[last]
    for outer in itertools.product(*(range(*b) for b in bounds[:last])):
        yield first + sum(i * s for i, s in zip(outer, steps, strict=False)), length


def read_into(file: FileIO, offset: int, out: np.ndarray) -> None:
    """Fill a C-contiguous array with the bytes of an unbuffered file from `offset` on.

    Raises:
        ValueError: the file ends before the array is full.
    """
    view = out.reshape(-1).view(np.uint8).data
    file.seek(offset)
    while view:
        count = file.readinto(view)
        if not count:
            raise ValueError(f"{file.name} ends {len(view)} bytes early. {REDOWNLOAD}")
        view = view[count:]


def file_identity(file: Path) -> tuple[int, int]:
    """Size and time of change: if they are as they were, so are the contents."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns
