"""Preemption: SIGTERM, Ctrl-C and the notices of clusters, checked between steps."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax

logger = logging.getLogger(__name__)

_Handler = Callable[[int, FrameType | None], Any] | int | None


class StopSignal:
    """A context manager that catches SIGTERM and Ctrl-C, to be checked after every step.

    The first signal requests a stop; a second one ends the process at once. If several processes
    have joined, JAX's runtime receives SIGTERM instead (Ctrl-C is forwarded to it as SIGTERM): a
    notice to any process stops all of them after the same step.

    Attributes:
      received: whether this process has received a signal, as far as it is not JAX's.
    """

    def __init__(self) -> None:
        self.received = False
        self._joined = jax.distributed.is_initialized()
        self._previous: dict[int, _Handler] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            caught = [signal.SIGINT] if self._joined else [signal.SIGINT, signal.SIGTERM]
            self._previous = {s: signal.signal(s, self._handle) for s in caught}
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore_handlers()

    def requested(self, step: int) -> bool:
        """Returns whether to stop after `step`; every process calls this after every step."""
        if not self._joined:
            return self.received
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._restore_handlers()  # first, so that a second signal ends even a log that blocks
        name = signal.Signals(number).name
        logger.warning("%s: saving after this step, then exiting; repeat to exit at once", name)
        if self._joined:
            signal.raise_signal(signal.SIGTERM)

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            # None is a handler that Python did not install and therefore cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
