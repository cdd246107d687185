"""The sequence of batches: nothing lost, nothing repeated, the same on any number of hosts."""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from btlm_jax.data.token_shards import TokenShards
from btlm_jax.train.batches import Batches
from btlm_jax.train.mixture import Source
from btlm_jax.train.recipe import Phase
from support.tokens import write_tokens

VOCAB = 1 << 20


def numbered(home, *sizes: int) -> list[Source]:
    """Returns sources in which every token is unique, and so shows where it comes from."""
    tokens = [np.arange(n) + i * 10_000 for i, n in enumerate(sizes)]
    return [
        Source(TokenShards(write_tokens(home / str(i), x, vocab_size=VOCAB, eos_id=1)))
        for i, x in enumerate(tokens)
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three sources of 10, 7 and 3 units of 16, with weights unrelated to their sizes."""
    opened = numbered(tmp_path_factory.mktemp("tokens"), 161, 125, 50)
    return [s._replace(weight=w) for s, w in zip(opened, (5.0, 2.5, 0.3), strict=True)]


def predicted(run: Batches, steps) -> list[int]:
    """Returns the tokens that these steps predict, in order."""
    return [int(x) for s in steps for x in run.batch_at(s).tokens[:, 1:].ravel()]


@st.composite
def phase_lists(draw, unit=16):
    """Draws phases of whole units, the longest length being `unit`."""
    phases = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.sampled_from([n for n in (1, 2, 4, 8, 16) if unit % n == 0]))
        rows = draw(st.integers(1, 6))
        multiple = unit // math.gcd(unit, rows * length)
        phases.append(Phase(multiple * draw(st.integers(1, 3)), rows, length))
    assume(max(p.length for p in phases) == unit)
    return phases


# One source -------------------------------------------------------------------------------------


@given(
    phases=phase_lists(),
    size=st.integers(17, 400),
    seed=st.integers(-3, 1 << 70),
    shuffle=st.booleans(),
)
def test_each_token_is_predicted_once_per_epoch(tmp_path_factory, phases, size, seed, shuffle):
    source = numbered(tmp_path_factory.mktemp("t"), size)
    run = Batches(source, phases, seed=seed, shuffle=shuffle)
    tokens = predicted(run, range(run.steps))
    epoch = (size - 1) // 16 * 16
    assert len(tokens) == sum(p.steps * p.tokens_per_step for p in phases)
    for i in range(0, len(tokens), epoch):
        part = tokens[i : i + epoch]
        assert len(set(part)) == len(part)
        if len(part) == epoch:
            assert sorted(part) == list(range(1, epoch + 1))
    assert list(run.epochs.values()) == [pytest.approx(len(tokens) / epoch)]
    if not shuffle:
        assert tokens[: epoch - 1] == list(range(1, epoch + 1))[: len(tokens)][: epoch - 1]


def test_windows_are_stretches_of_the_stream(sources):
    run = Batches(sources, [Phase(8, 4, 4), Phase(5, 2, 16)], seed=0)
    for step, length in ((0, 4), (7, 4), (8, 16), (12, 16)):
        batch = run.batch_at(step)
        assert batch.tokens.dtype == np.int32 and batch.segment_ids is None
        assert batch.tokens.shape == (4 if length == 4 else 2, length + 1)
        assert (np.diff(batch.tokens) == 1).all()


def test_longer_sequences_begin_where_the_shorter_ended(tmp_path):
    """2k -> 8k in miniature: together the phases see every token once, in one epoch."""
    source = numbered(tmp_path, 16 * 20 + 1)
    run = Batches(source, [Phase(16, 12, 4), Phase(4, 2, 16)], seed=5)
    first, second = predicted(run, range(16)), predicted(run, range(16, 20))
    assert len(first) == 16 * 12 * 4 and len(second) == 4 * 2 * 16
    epoch = set(range(1, 321))
    # The first phase: two epochs and 128 tokens of the third; the second continues that.
    assert set(first[:320]) == set(first[320:640]) == epoch
    assert not set(first[640:]) & set(second) and len({*first[640:], *second}) == 256
    # In the first phase, windows of one unit are read at different times.
    units = [(t - 1) // 16 for t in first[:320:4]]
    assert sum(a == b for a, b in itertools.pairwise(units)) < 20


def test_every_seed_and_epoch_has_its_own_order(tmp_path):
    source, phases = numbered(tmp_path, 16 * 30 + 1), [Phase(30, 3, 16)]
    runs = {seed: Batches(source, phases, seed=seed) for seed in (0, 1, 2, -1)}
    orders = [
        tuple(run.windows_at(s)[1][r] for s in range(e, e + 10) for r in range(3))
        for run in runs.values()
        for e in (0, 10, 20)
    ]
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == list(range(0, 480, 16)) for order in orders)


def test_with_one_length_the_order_does_not_depend_on_the_phases(sources):
    """A run can be extended, or continue with other batch sizes."""
    short = Batches(sources, [Phase(6, 4, 16)], seed=3)
    longer = Batches(sources, [Phase(3, 4, 16), Phase(9, 2, 16), Phase(2, 6, 16)], seed=3)
    expected = predicted(short, range(6))
    assert predicted(longer, range(14))[: len(expected)] == expected


def test_the_order_never_changes(tmp_path):
    """A run may be resumed with later versions of everything: these are the bytes of this one."""
    source = numbered(tmp_path, 161, 125)
    run = Batches(source, [Phase(12, 8, 4), Phase(6, 2, 16)], seed=1234)
    order = np.concatenate([np.stack(run.windows_at(s)) for s in range(run.steps)], axis=1)
    assert order[:, :8].tolist() == FIRST_BATCH
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == ORDER


FIRST_BATCH = [[0, 1, 0, 1, 0, 1, 0, 1], [40, 72, 28, 88, 96, 92, 60, 68]]  # source, first token
ORDER = "12893a5aae6999c7"


# Mixtures ---------------------------------------------------------------------------------------


@given(phases=phase_lists(), seed=st.integers(0, 9), shuffle=st.booleans())
def test_sources_keep_their_shares_and_never_repeat_within_an_epoch(sources, phases, seed, shuffle):
    """At every step, not only at the end."""
    run = Batches(sources, phases, seed=seed, shuffle=shuffle)
    tokens = np.array(predicted(run, range(run.steps)))
    share = np.array([s.weight for s in sources]) / sum(s.weight for s in sources)
    used = [int((tokens // 10_000 == i).sum()) for i in range(3)]
    assert [u % 16 for u in used] == [0, 0, 0]
    assert np.abs(np.array(used) - share * len(tokens)).max() <= 3 * 16
    assert list(run.epochs.values()) == pytest.approx(
        [u / (n * 16) for u, n in zip(used, (10, 7, 3), strict=True)]
    )
    for i, units in enumerate((10, 7, 3)):
        own = tokens[tokens // 10_000 == i] % 10_000
        for at in range(0, len(own), units * 16):
            part = own[at : at + units * 16]
            assert len(set(part.tolist())) == len(part) and part.max() <= units * 16
    at = 0
    for phase in phases:  # not only at the end of a phase
        n = phase.steps * phase.batch_size
        drawn = tokens[at : at + n * phase.length : phase.length] // 10_000
        at += n * phase.length
        for i in range(3):
            off = np.cumsum(drawn == i) - share[i] * np.arange(1, n + 1)
            assert np.abs(off).max() <= 3 * (16 // phase.length) + 3


def test_any_batch_of_the_published_run_is_found_at_once(tmp_path):
    """Of 627.7B tokens."""
    source = [Source(TokenShards(write_tokens(tmp_path / "t", np.arange(8193 * 3) % 50_000)))]
    phases = [Phase(119_727, 1920, 2048), Phase(39_909, 480, 8192)]
    assert sum(p.steps * p.tokens_per_step for p in phases) == 627_714_293_760
    run = Batches(source, phases, seed=0)
    assert run.steps == 159_636 and list(run.epochs.values()) == [627_714_293_760 / (8192 * 3)]
    for step in (0, 119_726, 119_727, 159_635):
        batch = run.batch_at(step)
        assert batch.tokens.shape == ((1920, 2049) if step < 119_727 else (480, 8193))


# Hosts and restarts -----------------------------------------------------------------------------

RUN = [Phase(4, 6, 4), Phase(8, 4, 4), Phase(5, 4, 16)]


def split(batch_size: int, hosts: int, uneven: bool) -> list[np.ndarray]:
    rows = np.random.default_rng(batch_size).permutation(batch_size)
    if not uneven:
        return np.array_split(np.arange(batch_size), hosts)
    return np.split(rows, [1, 1, batch_size - 1][: hosts - 1])  # one, none, many, one; shuffled


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_hold_the_global_batch_between_them(sources, hosts, uneven):
    options = dict(seed=7, mask_documents=True)
    run = Batches(sources, RUN, **options)
    for host in range(hosts):
        local = run.iterate(rows=lambda b, h=host: split(b, hosts, uneven)[h])
        for batch, part in zip(run.iterate(), local, strict=True):
            rows = split(len(batch.tokens), hosts, uneven)[host]
            np.testing.assert_array_equal(part.tokens, batch.tokens[rows])
            np.testing.assert_array_equal(part.segment_ids, batch.segment_ids[rows])


@settings(max_examples=20)
@given(start=st.integers(0, 17), hosts=st.integers(1, 4), threads=st.integers(0, 3))
def test_reading_can_be_resumed_at_any_step(sources, start, hosts, threads):
    run = Batches(sources, RUN, seed=7)
    parts = [
        run.iterate(start, lambda b, h=h: split(b, hosts, False)[h], threads) for h in range(hosts)
    ]
    steps = 0
    for step, batches in enumerate(zip(*parts, strict=True), start):
        steps += 1
        expected = run.batch_at(step).tokens
        np.testing.assert_array_equal(np.concatenate([b.tokens for b in batches]), expected)
    assert steps == 17 - start


def grain_threads(expected: bool) -> bool:
    """Returns whether grain's threads come to exist, or to end, as expected."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if any(t.name.startswith("grain-prefetch") for t in threading.enumerate()) == expected:
            return True
        time.sleep(0.01)
    return False


def test_closing_the_iterator_ends_its_threads(sources):
    assert grain_threads(False)  # those of earlier tests
    read = Batches(sources, RUN, seed=0).iterate(read_threads=3)
    next(read)
    assert grain_threads(True)
    read.close()
    assert grain_threads(False)


def test_errors_in_reading_threads_are_raised(sources):
    read = Batches(sources, RUN, seed=0).iterate(rows=lambda b: [b])
    with pytest.raises(ValueError, match=r"rows: found \[6\], expected numbers below 6"):
        next(read)


# Documents --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=9, max_size=60), st.integers(0, 3))
def test_an_eos_begins_the_segment_of_the_next_document(tmp_path_factory, tokens, eos):
    path = write_tokens(tmp_path_factory.mktemp("t") / "t", tokens, eos_id=eos)
    run = Batches([Source(TokenShards(path))], [Phase(3, 2, 8)], seed=1, mask_documents=True)
    for step in range(3):
        batch = run.batch_at(step)
        assert batch.segment_ids.dtype == np.int32
        assert batch.segment_ids.shape == batch.tokens.shape
        for ids, segments in zip(batch.tokens, batch.segment_ids, strict=True):
            expected = 1
            for token, segment in zip(ids, segments, strict=True):
                expected += token == eos
                assert segment == expected


# Bad arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "phases, message",
    [
        ([Phase(4, 4, 6), Phase(1, 1, 16)], r"phases\.0\.length: found 6, expected a divisor.*16"),
        ([Phase(3, 6, 4), Phase(1, 1, 16)], r"steps: found 3 \(of 6 x 4 tokens\), expected 2 or 4"),
        ([Phase(1, 1, 4), Phase(1, 1, 16)], r"phases\.0\.steps: found 1.*expected 4: a whole"),
    ],
)
def test_phases_that_are_not_whole_units_are_refused(sources, phases, message):
    with pytest.raises(ValueError, match=message):
        Batches(sources, phases, seed=0)


def test_steps_out_of_range_and_a_missing_grain_are_refused(sources, monkeypatch):
    run = Batches(sources, [Phase(5, 1, 16)], seed=0)
    assert list(run.iterate(5)) == []
    for step in (-1, 5):
        with pytest.raises(ValueError, match=f"step: found {step}, expected 0 to 4"):
            run.batch_at(step)
    for options, said in (
        ((6,), "start_step: found 6, expected 0 to 5"),
        ((0, None, -1), "read_th"),
    ):
        with pytest.raises(ValueError, match=said):
            run.iterate(*options)
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ValueError, match=r"needs grain: pip install 'btlm-jax\[data\]'"):
        run.iterate()
