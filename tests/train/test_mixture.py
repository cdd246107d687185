"""Mixtures: exact shares, and the published weights."""

from __future__ import annotations

import math

import numpy as np
import pytest

from btlm_jax.data.token_shards import TokenShards
from btlm_jax.train.batches import Batches
from btlm_jax.train.mixture import MIXTURES, Source, open_mixture, units_per_source
from btlm_jax.train.recipe import Phase
from support.tokens import write_tokens


def test_units_per_source_are_exact():
    for shares in ((1,), (3, 1), (522, 267, 52, 42, 46, 38, 33), (1, 1 << 24, 7)):
        total = sum(shares)
        counts = units_per_source(np.arange(5000), shares)
        assert (counts.sum(0) == np.arange(5000)).all()
        assert set(np.unique(np.diff(counts, axis=1))) <= {0, 1}
        exact = np.arange(5000) * np.array(shares)[:, None] / total
        assert np.abs(counts - exact).max() < len(shares)
    far = units_per_source(np.array([10**11]), (1 << 23, 1 << 23))  # 10^15 tokens do not overflow
    assert far.tolist() == [[5 * 10**10], [5 * 10**10]]


@pytest.fixture
def subsets(tmp_path):
    """A directory with one small directory of tokens per subset of SlimPajama."""
    for name in MIXTURES["slimpajama"]:
        write_tokens(tmp_path / name, np.arange(33), eos_id=1)
    return tmp_path


def test_slimpajama_is_sampled_by_its_published_weights(subsets):
    weights = MIXTURES["slimpajama"]
    assert sum(weights.values()) == pytest.approx(100) and len(weights) == 7
    sources = open_mixture(subsets, "slimpajama")
    assert [(s.tokens.directory.name, s.weight) for s in sources] == list(weights.items())
    run = Batches(sources, [Phase(100, 10, 16)], seed=0)
    drawn = np.bincount(np.concatenate([run.windows_at(s)[0] for s in range(100)]))
    assert np.abs(drawn - np.array(list(weights.values())) * 10).max() <= 3


def test_a_mixture_may_name_its_own_weights(subsets):
    sources = open_mixture(subsets, {"c4": 2.0, "books": 1.0})
    assert [(s.tokens.directory.name, s.weight) for s in sources] == [("c4", 2.0), ("books", 1.0)]


def test_unknown_mixtures_and_missing_directories_are_refused(subsets):
    with pytest.raises(FileNotFoundError, match=r"needs directories commoncrawl, c4.*found none"):
        open_mixture(subsets / "nowhere", "slimpajama")
    with pytest.raises(ValueError, match="mixture: found 'pile', expected one of slimpajama"):
        open_mixture(subsets, "pile")
    with pytest.raises(FileNotFoundError, match=r"needs directories pes2o, found arxiv, books"):
        open_mixture(subsets, {"pes2o": 1.0})


def test_sources_that_cannot_be_mixed_are_refused(tmp_path):
    def source(name: str, n: int, eos_id: int, weight: float = 1.0) -> Source:
        path = write_tokens(tmp_path / name, np.arange(n), eos_id=eos_id)
        return Source(TokenShards(path), weight)

    phases, first = [Phase(1, 1, 16)], source("first", 161, 1)
    with pytest.raises(ValueError, match="sources: found none"):
        Batches([], phases, seed=0)
    for weight in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"first: weight: found {weight}, expected more than"):
            Batches([first._replace(weight=weight)], phases, seed=0)
    with pytest.raises(ValueError, match="small holds 16 tokens, expected at least 17"):
        Batches([source("small", 16, 1)], phases, seed=0)
    with pytest.raises(ValueError, match=r"other: eos_id: found 2, .*first has 1; tokenize both"):
        Batches([first, source("other", 17, 2)], phases, seed=0)
