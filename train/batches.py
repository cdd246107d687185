"""The sequence of global batches, a function of the step, read through grain.

The tokens of a source are cut into units of U, the longest length of all phases. Every epoch has
its own order of units. A mixture says which source the next unit comes from. A phase takes the
units after those of the phase before, and cuts each into windows of its length T:

    0 ... ... ... U ... ... ... 2U      units, each once per epoch
    0 . T . 2T .. U                     windows of T + 1: the last token of one begins the next

So every token is predicted once, however a run is cut into phases, steps and hosts. The only state
is the step.

The order is computed here and not by grain, because a run may go on years later with another
version of it; and for whole batches, because a call per sequence costs more than reading it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from btlm_jax.data.token_shards import TokenShards
from btlm_jax.train.permutation import mix, permute

Rows = Callable[[int], Sequence[int] | np.ndarray]

# Subset -> percent of SlimPajama-627B, on one epoch of which BTLM-3B-8K was trained.
MIXTURES: Mapping[str, Mapping[str, float]] = {
    "slimpajama": {
        "commoncrawl": 52.2,
        "c4": 26.7,
        "github": 5.2,
        "books": 4.2,
        "arxiv": 4.6,
        "wikipedia": 3.8,
        "stackexchange": 3.3,
    }
}

_SHARES = 1 << 24  # weights are rounded to this fraction of their sum
_UNITS, _WINDOWS = 1, 2  # what is being put in order


class Source(NamedTuple):
    """A directory of tokens, and how much of the batches it makes up relative to the others."""

    directory: Path
    weight: float = 1.0


class Phase(NamedTuple):
    """A stretch of steps with one global batch size and length (tokens predicted per row)."""

    steps: int
    batch_size: int
    length: int


class Batch(NamedTuple):
    """Rows of a global batch: the first T tokens are read, the last T predicted.

    Attributes:
      tokens: int32 [rows, T + 1].
      segment_ids: int32 [rows, T + 1], from 1, one more after each EOS; None if attention is not
        to stay within documents.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray | None


def mixture_sources(
    parent: str | os.PathLike[str], weights: str | Mapping[str, float]
) -> list[Source]:
    """The sources of a mixture.

    Args:
      parent: of one directory of tokens per subset.
      weights: directory -> weight, or the name of one of `MIXTURES`.

    Raises:
      FileNotFoundError: a subset has no directory.
      ValueError: an unknown mixture.
    """
    if isinstance(weights, str):
        if weights not in MIXTURES:
            raise ValueError(f"mixture: found {weights!r}, expected one of {', '.join(MIXTURES)}")
        weights = MIXTURES[weights]
    home = Path(parent)
    if missing := [name for name in weights if not (home / name).is_dir()]:
        found = sorted(p.name for p in home.iterdir() if p.is_dir()) if home.is_dir() else []
        raise FileNotFoundError(
            f"{home}: the mixture needs directories {', '.join(missing)}, found "
            f"{', '.join(found) or 'none'}; name them so, or give the weights of those there are"
        )
    return [Source(home / name, weight) for name, weight in weights.items()]


def tokens_needed(phases: Sequence[Phase]) -> int:
    """Tokens that all steps predict."""
    return sum(p.steps * p.batch_size * p.length for p in phases)


class Batches:
    """The global batches of a run, in random access. Threads may share one.

    Args:
      sources: what is mixed.
      phases: one after the other.
      seed: of the order; any integer.
      mask_documents: batches carry segment ids.
      shuffle: False takes units and windows in order (the mixture stays).
      vocab_size: of the model, which must know all ids.

    Attributes:
      steps: of all phases.
      unit: U, the longest of the lengths.
      epochs: by source, how often the run goes through it.
      fingerprint: SHA-256 of what the order depends on besides the phases: compare it on resume.

    Raises:
      FileNotFoundError, ValueError: as `TokenShards`; no or invalid sources or phases, sources of
        different tokenizers or with less than one unit, lengths that do not divide the longest, a
        phase that is not a whole number of units.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        phases: Sequence[Phase],
        *,
        seed: int,
        mask_documents: bool = False,
        shuffle: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        self.unit = _check_phases(phases)
        self._shares = _shares(sources)
        self._shards = [TokenShards(s.directory, vocab_size=vocab_size) for s in sources]
        self._phases, self._mask, self._shuffle = tuple(phases), mask_documents, shuffle
        _check_sources(self._shards, self.unit)
        self._eos = self._shards[0].metadata.eos_id
        # The last, incomplete unit is left out; the first token is read and never predicted.
        self._units = np.array([(len(s) - 1) // self.unit for s in self._shards], np.int64)
        self._key = mix(np.array([seed % (1 << 64)], np.uint64))
        self._first_step = np.cumsum([0, *(p.steps for p in phases)])
        units = [p.steps * p.batch_size * p.length // self.unit for p in phases]
        self._first_unit = np.cumsum([0, *units])
        self.steps = int(self._first_step[-1])
        used = _taken(self._first_unit[-1:], self._shares)[:, 0]
        self.epochs = {
            os.fspath(s.directory): float(n)
            for s, n in zip(sources, used / self._units, strict=True)
        }
        facts = [seed, self.unit, shuffle, self._shares, [s.fingerprint for s in self._shards]]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def batch_at(self, step: int, rows: Rows | None = None) -> Batch:
        """The batch of a step, from 0.

        Args:
          step: which.
          rows: batch size -> numbers of the wanted rows, in the wanted order; None is all of them.

        Raises:
          ValueError: no such step or row.
        """
        source, start = self.windows_at(step, rows)
        tokens = np.empty((len(source), self._phases[self._phase_of(step)].length + 1), np.int32)
        for row, s, at in zip(tokens, source.tolist(), start.tolist(), strict=True):
            self._shards[s].read_into(at, row)
        if not self._mask:
            return Batch(tokens, None)
        segments = np.ones_like(tokens)
        segments[:, 1:] += np.cumsum(tokens[:, :-1] == self._eos, axis=1, dtype=np.int32)
        return Batch(tokens, segments)

    def windows_at(self, step: int, rows: Rows | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of a batch lie: (number of the source, first token), int64 [rows] each.

        Args, raises: as `batch_at`.
        """
        p = self._phase_of(step)
        phase, (first, end) = self._phases[p], self._first_unit[p : p + 2]  # units of all sources
        row = np.arange(phase.batch_size) if rows is None else np.asarray(rows(phase.batch_size))
        if np.any((row < 0) | (row >= phase.batch_size)):
            raise ValueError(f"rows: found {row}, expected numbers below {phase.batch_size}")
        window = (step - self._first_step[p]) * phase.batch_size + row.astype(np.int64)
        per_unit = self.unit // phase.length
        # The mixture is gone through once per window of a unit: its proportions hold all along.
        lap, unit = np.divmod(window, end - first)
        before = _taken(first + unit, self._shares)
        source = (_taken(first + unit + 1, self._shares) - before).argmax(0)
        # From here on, counts are of each row's own source, since the run began.
        begin, finish = _taken(self._first_unit[p : p + 2], self._shares)[source].T
        rank = before[source, np.arange(len(row))] - begin + lap * (finish - begin)
        place, units = begin * per_unit + rank, self._units[source]
        if self._shuffle and per_unit > 1:
            # Windows change places within their phase and epoch: none comes back before its epoch
            # has ended. With one window per unit the order of units is enough; it does not depend
            # on the phases, so that such a run can be extended.
            epoch = place // (units * per_unit)
            low = np.maximum(begin, epoch * units) * per_unit
            high = np.minimum(finish, (epoch + 1) * units) * per_unit
            key = self._keys(_WINDOWS, source, epoch, p)
            place = low + permute(place - low, high - low, key)
        ordinal, part = np.divmod(place, per_unit)
        epoch, index = np.divmod(ordinal, units)
        if self._shuffle:
            index = permute(index, units, self._keys(_UNITS, source, epoch))
        return source, index * self.unit + part * phase.length

    def iterate(
        self, start_step: int = 0, rows: Rows | None = None, read_threads: int = 4
    ) -> Iterator[Batch]:
        """`batch_at` from `start_step` to the end, read ahead; see `batches`."""
        if not 0 <= start_step <= self.steps:
            raise ValueError(f"start_step: found {start_step}, expected 0 to {self.steps}")
        if read_threads < 0:
            raise ValueError(f"read_threads: found {read_threads}, expected 0 or more")
        return self._iterate(_grain(), start_step, rows, read_threads)

    def _iterate(
        self, grain: Any, start_step: int, rows: Rows | None, threads: int
    ) -> Iterator[Batch]:
        if start_step == self.steps:
            return
        dataset = grain.MapDataset.range(start_step, self.steps)
        dataset = dataset.map(lambda step: self.batch_at(step, rows))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        reader = iter(dataset.to_iter_dataset(options))
        try:
            yield from reader
        finally:
            reader.close()  # grain's threads outlive it otherwise

    def _phase_of(self, step: int) -> int:
        if not 0 <= step < self.steps:
            raise ValueError(f"step: found {step}, expected 0 to {self.steps - 1}")
        return int(np.searchsorted(self._first_step, step, "right")) - 1

    def _keys(self, what: int, source: np.ndarray, epoch: np.ndarray, phase: int = 0) -> np.ndarray:
        """What `permute` takes, for each row. uint64 [rows]."""
        key = self._key
        for part in (source, epoch, np.full_like(source, phase), np.full_like(source, what)):
            key = mix(key + part.astype(np.uint64))
        return key


def batches(
    sources: Sequence[Source],
    phases: Sequence[Phase],
    *,
    seed: int,
    start_step: int = 0,
    rows: Rows | None = None,
    mask_documents: bool = False,
    shuffle: bool = True,
    vocab_size: int | None = None,
    read_threads: int = 4,
) -> Iterator[Batch]:
    """Opens the sources and reads the batches from `start_step` on, some of them ahead.

    Row r of step s is always the same: hosts that each ask for their rows hold the global batch
    between them, and a run goes on at its step, on any number of hosts.

    Args:
      sources, phases, seed, mask_documents, shuffle, vocab_size: as for `Batches`.
      start_step: of the first batch.
      rows: batch size -> the rows this process needs, in order; None is all of them.
      read_threads: batches read at a time; twice as many are held ready.

    Returns:
      An iterator, to be closed (`.close()`) if it is left before its end.

    Raises:
      FileNotFoundError, ValueError: as `Batches`; no such step; grain is missing.
    """
    options = dict(mask_documents=mask_documents, shuffle=shuffle, vocab_size=vocab_size)
    return Batches(sources, phases, seed=seed, **options).iterate(start_step, rows, read_threads)


def _taken(units: np.ndarray, shares: Sequence[int]) -> np.ndarray:
    """How many of the first `units` units of the mixture come from each source.

    Each further unit comes from exactly one source, and no source is ever more than a few units
    away from its share.

    Args:
      units: int64 [N].
      shares: integers proportional to the weights, S of them.

    Returns:
      int64 [S, N].
    """
    left, total, taken = units, sum(shares), []
    for share in shares:
        others = left * (total - share) // total
        taken.append(left - others)
        left, total = others, total - share
    return np.stack(taken)


def _shares(sources: Sequence[Source]) -> tuple[int, ...]:
    """Integers proportional to the weights."""
    if not sources:
        raise ValueError("sources: found none, expected at least one directory of tokens")
    for source in sources:
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise ValueError(
                f"{source.directory}: weight: found {source.weight}, expected more than 0"
            )
    total = math.fsum(s.weight for s in sources)
    return tuple(max(1, round(s.weight / total * _SHARES)) for s in sources)


def _check_sources(opened: Sequence[TokenShards], unit: int) -> None:
    first = opened[0]
    for shards in opened:
        if len(shards) <= unit:
            raise ValueError(
                f"{shards.directory} holds {len(shards)} tokens, expected at least {unit + 1}: one "
                "more than the longest sequence"
            )
        for field in ("tokenizer_sha256", "eos_id"):
            found, expected = (getattr(x.metadata, field) for x in (shards, first))
            if found != expected:
                raise ValueError(
                    f"{shards.directory}: {field}: found {found}, {first.directory} has "
                    f"{expected}; tokenize both with the same tokenizer"
                )


def _check_phases(phases: Sequence[Phase]) -> int:
    """Returns the unit: the longest length."""
    if not phases:
        raise ValueError("phases: found none, expected at least one")
    for i, phase in enumerate(phases):
        for field in ("steps", "batch_size", "length"):
            if (value := getattr(phase, field)) < 1:
                raise ValueError(f"phases.{i}.{field}: found {value}, expected at least 1")
    unit = max(phase.length for phase in phases)
    for i, phase in enumerate(phases):
        if unit % phase.length:
            raise ValueError(
                f"phases.{i}.length: found {phase.length}, expected a divisor of the longest "
                f"length, {unit}, so that no token is lost or repeated between phases"
            )
        multiple = unit // math.gcd(unit, phase.batch_size * phase.length)
        if phase.steps % multiple:
            below = phase.steps // multiple * multiple
            fit = " or ".join(str(n) for n in (below, below + multiple) if n)
            raise ValueError(
                f"phases.{i}.steps: found {phase.steps} (of {phase.batch_size} x {phase.length} "
                f"tokens), expected {fit}: a whole number of stretches of {unit} tokens, the "
                "longest length"
            )
    return unit


def _grain() -> Any:
    try:
        import grain
    except ImportError as e:
        raise ValueError("reading batches needs grain: pip install 'btlm-jax[data]'") from e
    return grain
