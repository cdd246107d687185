"""Reading of parts of an array as ranges of bytes of a file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import numpy as np

from btlm_jax.convert.hf.advice import REDOWNLOAD


def contiguous_runs(shape: tuple[int, ...], index: tuple[slice, ...]) -> Iterator[tuple[int, int]]:
    """Splits a part of a C-ordered array into runs of consecutive elements.

    Args:
      shape: shape of the array.
      index: a slice of step 1 for every axis.

    Yields:
      (first element, number of elements) of every run, in order and as long as possible.
    """
    bounds = [i.indices(n)[:2] for n, i in zip(shape, index, strict=True)]
    if any(stop <= start for start, stop in bounds):
        return
    inner = len(shape)
    while inner and bounds[inner - 1] == (0, shape[inner - 1]):
        inner -= 1
    # A run spans the axes from `inner` on, which the part covers, and its range of the axis before.
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
    """Fills a C-contiguous array with the bytes of an unbuffered file from `offset` on.

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
    """Returns size and modification time; while they are unchanged, so are the contents."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns
