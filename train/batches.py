"""The sequence of global batches: a function of the step, read through grain.

The tokens of a source are cut into units of U tokens, the longest length of all phases. Every epoch
orders the units at random. A mixture says which source the next unit comes from. A phase takes the
units after those of the previous phase, and cuts each into windows of its own length T:

    0 ... ... ... U ... ... ... 2U      units, each once per epoch
    0 . T . 2T .. U                     windows of T + 1: the last token of one begins the next

So every token is predicted once, however a run is cut into phases, steps and hosts. The only state
is the step.

The order is computed here rather than by grain, because a run may be resumed years later with
another version of grain; and it is computed for whole batches, because a call per sequence would
cost more than reading the sequence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from btlm_jax.train.mixture import Source, check_sources, mixture_shares, units_per_source
from btlm_jax.train.permutation import permute, splitmix64
from btlm_jax.train.recipe import Phase, check_phase_units

# Maps a global batch size to the numbers of the rows to read, in the order to return them.
RowSelection = Callable[[int], Sequence[int] | np.ndarray]

_UNITS, _WINDOWS = 1, 2  # the two things that are permuted, with independent keys


class Batch(NamedTuple):
    """Rows of a global batch: the first T tokens are read, the last T predicted.

    Attributes:
      tokens: int32 [rows, T + 1].
      segment_ids: `document_segments` of the tokens; None if attention may cross documents.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray | None


def document_segments(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """Returns the document that every token belongs to as an input: segment ids for attention.

    Data have no BOS: the EOS that ends a document is predicted from that document, and then begins
    the next one, whose first token is predicted from it alone. So every token is predicted, and a
    document begins as a prompt of EOS does in generation, `eval perplexity` and lm-eval.

    Args:
      tokens: int [..., T].
      eos_id: the token that ends documents.

    Returns:
      int32 [..., T], from 1, increasing by one at each EOS.
    """
    return 1 + np.cumsum(tokens == eos_id, axis=-1, dtype=np.int32)


class Batches:
    """The global batches of a run, in random access. Threads may share one object.

    Args:
      sources: the tokens to mix.
      phases: the phases of the run, one after the other.
      seed: seed of the order; any integer.
      mask_documents: whether batches carry segment ids.
      shuffle: False reads units and windows in order; the mixture is the same.

    Attributes:
      steps: number of steps of all phases.
      unit: U, the longest length.
      epochs: directory of a source -> how often the run reads it.

    Raises:
      ValueError: no sources, invalid weights, sources with different tokenizers or shorter than a
        unit, lengths that do not divide the longest, or a phase that is not a whole number of
        units.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        phases: Sequence[Phase],
        *,
        seed: int,
        mask_documents: bool = False,
        shuffle: bool = True,
    ) -> None:
        self.unit = check_phase_units(phases)
        self._shares = mixture_shares(sources)
        check_sources(sources, self.unit)
        self._tokens = [s.tokens for s in sources]
        self._phases, self._mask, self._shuffle = tuple(phases), mask_documents, shuffle
        self._eos = self._tokens[0].metadata.eos_id
        # The last, incomplete unit is dropped; the first token is read but never predicted.
        self._units = np.array([(len(t) - 1) // self.unit for t in self._tokens], np.int64)
        self._key = splitmix64(np.array([seed % (1 << 64)], np.uint64))
        self._first_step = np.cumsum([0, *(p.steps for p in phases)])
        units = [p.steps * p.tokens_per_step // self.unit for p in phases]
        self._first_unit = np.cumsum([0, *units])
        self.steps = int(self._first_step[-1])
        used = units_per_source(self._first_unit[-1:], self._shares)[:, 0]
        self.epochs = {
            os.fspath(tokens.directory): float(n)
            for tokens, n in zip(self._tokens, used / self._units, strict=True)
        }

    def batch_at(self, step: int, rows: RowSelection | None = None) -> Batch:
        """Returns the batch of a step (from 0).

        Args:
          step: the step.
          rows: the rows to read; None reads all.

        Raises:
          ValueError: the step or a row is out of range.
        """
        source, start = self.windows_at(step, rows)
        tokens = np.empty((len(source), self._phases[self._phase_at(step)].length + 1), np.int32)
        for row, s, first in zip(tokens, source.tolist(), start.tolist(), strict=True):
            self._tokens[s].read_into(first, row)
        if not self._mask:
            return Batch(tokens, None)
        return Batch(tokens, document_segments(tokens, self._eos))

    def windows_at(
        self, step: int, rows: RowSelection | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns where the rows of a batch come from: (source, first token), int64 [rows] each.

        Args, raises: as `batch_at`.
        """
        p = self._phase_at(step)
        phase, (first, end) = self._phases[p], self._first_unit[p : p + 2]  # units of all sources
        row = np.arange(phase.batch_size) if rows is None else np.asarray(rows(phase.batch_size))
        if np.any((row < 0) | (row >= phase.batch_size)):
            raise ValueError(f"rows: found {row}, expected numbers below {phase.batch_size}")
        window = (step - self._first_step[p]) * phase.batch_size + row.astype(np.int64)
        per_unit = self.unit // phase.length
        # The phase reads the mixture once per window of a unit, so that its proportions hold all
        # along.
        lap, unit = np.divmod(window, end - first)
        before = units_per_source(first + unit, self._shares)
        source = (units_per_source(first + unit + 1, self._shares) - before).argmax(0)
        # From here on, counts are per source, from the beginning of the run.
        begin, finish = units_per_source(self._first_unit[p : p + 2], self._shares)[source].T
        rank = before[source, np.arange(len(row))] - begin + lap * (finish - begin)
        position, units = begin * per_unit + rank, self._units[source]
        if self._shuffle and per_unit > 1:
            # Windows are permuted within their phase and epoch, so that none is read twice in an
            # epoch. With one window per unit the order of units is enough. That order does not
            # depend on the phases, so that such a run can be extended.
            epoch = position // (units * per_unit)
            low = np.maximum(begin, epoch * units) * per_unit
            high = np.minimum(finish, (epoch + 1) * units) * per_unit
            key = self._permutation_keys(_WINDOWS, source, epoch, p)
            position = low + permute(position - low, high - low, key)
        ordinal, part = np.divmod(position, per_unit)
        epoch, index = np.divmod(ordinal, units)
        if self._shuffle:
            index = permute(index, units, self._permutation_keys(_UNITS, source, epoch))
        return source, index * self.unit + part * phase.length

    def iterate(
        self, start_step: int = 0, rows: RowSelection | None = None, read_threads: int = 4
    ) -> Iterator[Batch]:
        """Reads the batches from `start_step` to the end, ahead of their use.

        Row r of step s is always the same: hosts that each select their rows hold the global batch
        between them, and a run can be resumed at any step, on any number of hosts.

        Args:
          start_step: step of the first batch.
          rows: the rows this process needs; None reads all.
          read_threads: batches read at a time; twice as many are held ready.

        Returns:
          An iterator, to be closed (`.close()`) if it is left before its end.

        Raises:
          ValueError: the step is out of range, or grain is not installed.
        """
        if not 0 <= start_step <= self.steps:
            raise ValueError(f"start_step: found {start_step}, expected 0 to {self.steps}")
        if read_threads < 0:
            raise ValueError(f"read_threads: found {read_threads}, expected 0 or more")
        return self._iterate(_import_grain(), start_step, rows, read_threads)

    def _iterate(
        self, grain: Any, start_step: int, rows: RowSelection | None, threads: int
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
            reader.close()  # otherwise grain's threads would outlive the iterator

    def _phase_at(self, step: int) -> int:
        """Returns the number of the phase that a step belongs to."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step: found {step}, expected 0 to {self.steps - 1}")
        return int(np.searchsorted(self._first_step, step, "right")) - 1

    def _permutation_keys(
        self, kind: int, source: np.ndarray, epoch: np.ndarray, phase: int = 0
    ) -> np.ndarray:
        """Returns the key of `permute` for each row. uint64 [rows]."""
        key = self._key
        for part in (source, epoch, np.full_like(source, phase), np.full_like(source, kind)):
            key = splitmix64(key + part.astype(np.uint64))
        return key


def _import_grain() -> Any:
    try:
        import grain
    except ImportError as e:
        raise ValueError("reading batches needs grain: pip install 'btlm-jax[data]'") from e
    return grain
