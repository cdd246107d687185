"""Corpora for small models."""

from __future__ import annotations

import numpy as np
import pytest

from btlm_jax.mup_study import corpus
from btlm_jax.mup_study.corpus import Corpus


def test_a_corpus_holds_out_its_end_and_cuts_windows():
    default = corpus.read_corpus(None, 64)
    assert default.vocab_size == 256 and default.train.max() < 256
    small = Corpus(np.arange(100, dtype=np.int32), np.arange(20, dtype=np.int32), 100, "numbers")
    batches = small.batches(3, 2, 8, seed=0)
    assert batches.shape == (3, 2, 9) and (np.diff(batches) == 1).all()
    assert (small.batches(3, 2, 8, seed=0) == batches).all()
    assert (small.batches(3, 2, 8, seed=1) != batches).any()
    windows = small.windows(2, 2, 8)
    assert windows.min() == 0 and windows.max() == 19 and (np.diff(windows) == 1).all()
    with pytest.raises(ValueError, match="held out, expected at least 1,000,001"):
        corpus.read_corpus(None, 1_000_000)
