"""Progress of long work: a bar with rate and time left on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

from tqdm import tqdm

from btlm_jax.utils.format import format_bytes

logger = logging.getLogger(__name__)


class Progress:
    """A context manager that counts, towards `total` where that is known.

    Args:
      total: how much there is to do, in `unit`; None if nobody knows.
      unit: such as "B" (shown with binary prefixes) or "step".
      title: what is being done.
      done: how many units an earlier run has done.
      every: seconds between lines when standard error is not a terminal.
      shown: False counts silently, as all but one of several processes should.
      clock: seconds; injected by tests.
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
        self._bar = None
        if shown and sys.stderr.isatty():
            scale = unit == "B"
            base = 1024 if scale else 1000
            self._bar = tqdm(
                total=total,
                initial=done,
                unit=unit,
                desc=title,
                unit_scale=scale,
                unit_divisor=base,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, n: float, note: str = "") -> None:
        """Counts `n` more; `note` is shown beside the count (a loss, say). Threads may."""
        with self._lock:
            self._done += n
            if self._bar is not None:
                self._bar.set_postfix_str(note, refresh=False)
                self._bar.update(n)
                return
            now = self._clock()
            ended = self.total is not None and self._done >= self.total
            if self._shown and (ended or now - self._last >= self._every):
                self._last = now
                logger.info("%s", self.line(now, note))

    def extend(self, n: float) -> None:
        """There are `n` more to do than was known."""
        with self._lock:
            self.total = (self.total or 0) + n
            if self._bar is not None:
                self._bar.total = self.total

    def line(self, now: float, note: str = "") -> str:
        """The plain line: done/total, percentage, rate, time left; of no total, done and rate."""
        rate = (self._done - self._initial) / max(now - self._start, 1e-9)
        line, speed = f"{self.title}: {_count(self._done, self.unit)}", _count(rate, self.unit)
        if self.total is None:
            line += f", {speed}/s"
        else:
            left = max(self.total - self._done, 0) / max(rate, 1e-9)
            part = self._done / max(self.total, 1)
            line += f"/{_count(self.total, self.unit)} ({part:.0%}), {speed}/s, {left:.0f} s left"
        return f"{line}, {note}" if note else line


def _count(n: float, unit: str) -> str:
    if unit == "B":
        return format_bytes(n)
    return f"{n:.4g} {unit}" if isinstance(n, float) else f"{n} {unit}"
