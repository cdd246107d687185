"""zstd files as streams: any number of frames, and none that is cut."""

from __future__ import annotations

import io

import numpy as np
import pytest
import zstandard

from btlm_jax.data.zstd_file import ZstdFile

DATA = np.random.default_rng(0).bytes(100_000)  # more, compressed, than is read at a time


def text(raw: bytes) -> bytes:
    return io.BufferedReader(ZstdFile(io.BytesIO(raw), zstandard)).read()


def test_frames_follow_each_other():
    frames = [zstandard.compress(part) for part in (DATA[:300], b"", DATA[300:])]
    assert text(b"".join(frames)) == DATA
    assert text(b"") == b""


@pytest.mark.parametrize("left", [1, 50_000, -1])
def test_a_cut_file_is_no_whole_one(left):
    with pytest.raises(EOFError, match="it ends within a frame"):
        text(zstandard.compress(DATA)[:left])


def test_what_is_not_zstd():
    with pytest.raises(EOFError):
        text(zstandard.compress(DATA) + b"and something else")
