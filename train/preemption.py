"""When to stop: SIGTERM, Ctrl-C, and the preemption notices of clusters."""

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
    """A context manager that turns SIGTERM and Ctrl-C into a question to ask after every step.

    The first signal asks to stop, a second one ends the process at once. Where JAX's runtime joins
    processes it is the one to receive SIGTERM (and Ctrl-C is passed on to it as such): a notice to
    any process has all of them stop after the same step.
    """

    def __init__(self) -> None:
        self._received = False
        self._joined = jax.distributed.is_initialized()
        self._previous: dict[int, _Handler] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            watched = [signal.SIGINT] if self._joined else [signal.SIGINT, signal.SIGTERM]
            self._previous = {s: signal.signal(s, self._receive) for s in watched}
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that is not Python's, which cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        name = signal.Signals(number).name
        logger.warning("%s: saving after this step, then leaving; again to leave at once", name)
        self._restore()
        if self._joined:
            signal.raise_signal(signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; every process asks, after every step."""
        if not self._joined:
            return self._received
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
