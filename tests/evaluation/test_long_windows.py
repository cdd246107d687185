"""Full windows of documents or of one stream."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from btlm_jax.evaluation.documents import TokenizedDocument
from btlm_jax.evaluation.long_windows import LongWindows
from support.documents import random_documents


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(2, 20),
    st.integers(1, 9),
    st.none() | st.integers(1, 3),
    st.booleans(),
)
def test_windows_are_full_segments_of_the_documents(
    sizes, length, max_windows, max_per_document, concatenate
):
    ids = np.arange(sum(sizes))
    texts = [TokenizedDocument(x, 1) for x in np.split(ids, np.cumsum(sizes)[:-1])]
    streams = [[999, *x.ids] for x in texts]
    if concatenate:
        streams = [[t for stream in streams for t in stream]]
    counts = [(len(s) - 1) // length for s in streams]
    if not concatenate and max_per_document:
        counts = [min(n, max_per_document) for n in counts]
    options = dict(
        max_windows=max_windows, max_per_document=max_per_document, concatenate=concatenate
    )
    if not sum(counts):
        with pytest.raises(ValueError, match=f"length: found {length} tokens and documents of"):
            LongWindows(iter(texts), 999, length, **options)
        return
    windows = LongWindows(iter(texts), 999, length, **options)
    expected = [
        (s[i * length : (i + 1) * length], s[i * length + 1 : (i + 1) * length + 1])
        for s, n in zip(streams, counts, strict=True)
        for i in range(n)
    ]
    cut = list(windows)
    assert [(w.inputs.tolist(), w.targets.tolist()) for w in cut] == expected[:max_windows]
    if concatenate:
        assert {w.group for w in cut} == {0}
    else:  # the tokens identify the document
        ends = np.cumsum(sizes)
        assert [w.group for w in cut] == [(w.targets[0] >= ends).sum() for w in cut]
        if sum(counts) < max_windows:
            assert windows.short_documents == sum(n < length for n in sizes)


def test_documents_are_read_lazily():
    def endless():
        while True:
            yield random_documents(50)[0]

    assert len(list(LongWindows(endless(), 0, 20, max_windows=5))) == 5


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(length=1), "length: found 1, expected at least 2"),
        (dict(length=5, max_windows=0), "windows: found 0, expected at least 1"),
        (dict(length=5, max_per_document=0), "windows per document: found 0"),
        (dict(length=50), r"found 50 tokens and documents of at most 30, 60 in all.*or join them"),
        (dict(length=90), r"found 90 tokens and documents of at most 30, 60 in all: .*length$"),
    ],
)
def test_bad_lengths_and_limits_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LongWindows(random_documents(30, 30), 0, **options)
