"""Windows of documents: those of lm-evaluation-harness, each token predicted once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from btlm_jax.evaluation.documents import TokenizedDocument
from btlm_jax.evaluation.rolling_windows import RollingWindows, cut_rolling_windows
from btlm_jax.model.chunked_loss import IGNORE
from support import golden
from support.documents import random_documents

ALIBI = golden.load("a2_btlm_mup_h32").config


def test_windows_are_those_of_the_harness():
    """Windows that lm-evaluation-harness documents or asserts."""
    # From its docstring: 9 tokens, max_seq_len 3, context_len 2, so that 2 are predicted at a time.
    windows = list(RollingWindows((TokenizedDocument(np.arange(9), 9),), 99, 3, 2))
    assert [w.inputs.tolist() for w in windows] == [[99, 0, 1], [1, 2, 3], [3, 4, 5], [5, 6, 7]]
    predicted = [w.targets[w.targets != IGNORE].tolist() for w in windows]
    assert predicted == [[0, 1, 2], [3, 4], [5, 6], [7, 8]]
    # From its tests: 34 tokens, max_seq_len 10, context_len 1; the last window reads 10 as well.
    windows = list(RollingWindows((TokenizedDocument(np.arange(34), 34),), 99, 10, 10))
    inputs = [[99, *range(9)], [*range(9, 19)], [*range(19, 29)], [*range(23, 33)]]
    assert [w.inputs.tolist() for w in windows] == inputs
    assert windows[-1].targets.tolist() == [IGNORE] * 6 + [30, 31, 32, 33]


def test_joined_documents_give_each_other_context_and_predict_the_same_tokens():
    texts = [TokenizedDocument(np.array(ids), 2) for ids in ([1, 2], [3], [], [4, 5, 6])]
    cut = cut_rolling_windows(ALIBI, texts, 9, length=5, joined=True)
    assert (cut.tokens, cut.text_bytes) == (6, 8)
    first, second = cut
    assert first.inputs.tolist() == [9, 1, 2, 9, 3]
    assert first.targets.tolist() == [1, 2, IGNORE, 3, IGNORE]
    assert second.inputs.tolist() == [3, 9, 9, 4, 5]
    assert second.targets.tolist() == [IGNORE, IGNORE, 4, 5, 6]
    assert cut_rolling_windows(ALIBI, texts, 9, length=5).tokens == 6


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.integers(2, 20),
    st.integers(1, 20),
    st.integers(1, 4),
)
def test_every_token_is_predicted_once(sizes, length, stride, rows):
    stride = min(stride, length)
    # All tokens differ, also between documents.
    starts = np.cumsum([0, *sizes])
    texts = [TokenizedDocument(np.arange(a, b), 1) for a, b in itertools.pairwise(starts)]
    of_document = {int(t): d for d in texts for t in d.ids}
    windows = RollingWindows(tuple(texts), 999, length, stride)
    seen = []
    for w in windows:
        assert w.inputs.shape == w.targets.shape and 1 <= len(w.inputs) <= length
        known = w.targets != IGNORE
        assert known.any() and known[known.argmax() :].all()
        ids = of_document[int(w.targets[-1])].ids
        for i in np.nonzero(known)[0]:
            token = int(w.targets[i])
            before = [999, *ids[: token - ids[0]].tolist()]
            # The inputs up to there are the tokens before, with as much context as promised.
            assert w.inputs[: i + 1].tolist() == before[len(before) - i - 1 :]
            assert i + 1 >= min(len(before), length - stride + 1)
            seen.append(token)
        assert len(w.inputs) == min(length, len(ids))
    assert sorted(seen) == list(range(starts[-1])) and len(seen) == windows.tokens
    assert len(list(windows)) == len(windows)
    batches = list(windows.batches(rows, length + 3, ALIBI))
    assert all(b.inputs.shape == b.targets.shape == (rows, length + 3) for b in batches)
    filled = [t for b in batches for t in b.targets[b.targets != IGNORE].tolist()]
    assert filled == seen and len(batches) == -(-len(windows) // rows)


def test_length_and_stride_have_defaults():
    assert (
        cut_rolling_windows(ALIBI, random_documents(40), 0).length == 40
    )  # no longer than the longest document
    long = cut_rolling_windows(ALIBI, random_documents(1, 10_000), 0)
    assert long.length == long.stride == ALIBI.n_positions
    assert cut_rolling_windows(ALIBI, random_documents(500), 0, length=60).stride == 60
    assert cut_rolling_windows(ALIBI, random_documents(500), 0, length=60, stride=30).stride == 30
    short = cut_rolling_windows(ALIBI, random_documents(9), 0, length=60, stride=30)
    assert (short.length, short.stride) == (9, 9)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(length=1), "length: found 1, expected at least 2"),
        (dict(length=8, stride=9), "stride: found 9, expected from 1 to the length"),
        (dict(stride=0), "stride: found 0"),
        (dict(length=999), "length: 999 tokens exceed the .* learned positions"),
    ],
)
def test_bad_lengths_and_strides_are_refused(options, message):
    learned = golden.load("f_learned_gelu_mup").config
    with pytest.raises(ValueError, match=message):
        cut_rolling_windows(learned, random_documents(20), 0, **options)


def test_fewer_than_two_tokens_are_refused():
    for lengths in ((), (0,), (1, 0)):
        with pytest.raises(ValueError, match=r"found [01] tokens, expected at least 2"):
            cut_rolling_windows(ALIBI, random_documents(*lengths), 0)


def test_windows_beyond_the_trained_context_warn(caplog):
    caplog.set_level("WARNING", "btlm_jax")
    cut_rolling_windows(ALIBI, random_documents(20), 0, length=ALIBI.n_positions + 1)
    assert "exceed the trained context" in caplog.text
