"""Progress of long work: a bar with rate and time left on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

from tqdm import tqdm

from btlm_jax.utils.format import format_bytes
from btlm_jax.utils.side_output import SideOutput

logger = logging.getLogger(__name__)


class Progress:
    """A context manager that counts finished work, towards `total` if that is known.

    Args:
      total: the amount of work in `unit`; None if unknown.
      unit: such as "B" (shown with binary prefixes) or "step".
      title: what is being done.
      done: number of units that an earlier run finished.
      every: seconds between log lines when standard error is not a terminal.
      shown: False counts silently, as all processes but one should.
      clock: returns seconds; tests inject it.
    """

    def __init__(
        self,
        total: float | None,
        unit: str,
        title: str,
        *,
        done: float = 0,
        every: float = 10.0,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.unit, self.title = total, unit, title
        self._every, self._shown, self._clock = every, shown, clock
        self._start = self._last = clock()
        self._initial = self._done = done
        self._lock = threading.Lock()
        self._bar: tqdm | None = None
        self._output: SideOutput | None = None
        if shown and sys.stderr is not None and sys.stderr.isatty():
            # A terminal may be closed, or stopped with Ctrl-S; the work continues.
            self._output = SideOutput(
                "the progress bar", "it is no longer shown", self._close_bar, patience=1.0
            )
            self._output.put(self._open_bar)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._output is not None:
            self._output.close(5.0)

    def update(self, n: float, note: str = "") -> None:
        """Counts `n` more units; thread-safe.

        Args:
          n: number of units.
          note: shown beside the count, such as a loss.
        """
        with self._lock:
            self._done += n
            if self._output is not None:
                self._output.put(self._update_bar, n, note)
                return
            now = self._clock()
            complete = self.total is not None and self._done >= self.total
            if self._shown and (complete or now - self._last >= self._every):
                self._last = now
                logger.info("%s", self.line(now, note))

    def extend(self, n: float) -> None:
        """Adds `n` units to the total."""
        with self._lock:
            self.total = (self.total or 0) + n
            if self._output is not None:
                self._output.put(self._update_bar, 0, "")

    def _open_bar(self) -> None:
        is_bytes = self.unit == "B"
        self._bar = tqdm(
            total=self.total,
            initial=self._initial,
            unit=self.unit,
            desc=self.title,
            unit_scale=is_bytes,
            unit_divisor=1024 if is_bytes else 1000,
        )

    def _update_bar(self, n: float, note: str) -> None:
        assert self._bar is not None
        self._bar.total = self.total
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(n)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def line(self, now: float, note: str = "") -> str:
        """Returns the log line: done/total, percentage, rate and time left.

        Without a total it shows the amount done and the rate.
        """
        rate = (self._done - self._initial) / max(now - self._start, 1e-9)
        line = f"{self.title}: {_format_count(self._done, self.unit)}"
        speed = _format_count(rate, self.unit)
        if self.total is None:
            line += f", {speed}/s"
        else:
            seconds = max(self.total - self._done, 0) / max(rate, 1e-9)
            fraction = self._done / max(self.total, 1)
            total = _format_count(self.total, self.unit)
            line += f"/{total} ({fraction:.0%}), {speed}/s, {seconds:.0f} s left"
        return f"{line}, {note}" if note else line


def _format_count(n: float, unit: str) -> str:
    if unit == "B":
        return format_bytes(n)
    return f"{n:.4g} {unit}" if isinstance(n, float) else f"{n} {unit}"
