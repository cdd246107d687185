"""When to stop: SIGTERM, Ctrl-C, and the preemption notices of clusters."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

import jax

logger = logging.getLogger(__name__)


class StopSignal:
    """A context manager that turns SIGTERM and Ctrl-C into a question to ask after every step.

    With one process, the first signal asks to stop and a second one ends the process at once. With
    several, JAX's coordination service receives SIGTERM in whichever process it arrives and has all
    of them stop after the same step.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            watched = [signal.SIGINT]
            if jax.process_count() == 1:
                watched.append(signal.SIGTERM)
            self._previous = {s: signal.signal(s, self._receive) for s in watched}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        name = signal.Signals(number).name
        logger.warning("%s: saving after this step, then leaving; again to leave at once", name)
        for watched, handler in self._previous.items():
            signal.signal(watched, handler)  # type: ignore

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; every process asks, after every step."""
        if jax.process_count() == 1:
            return self._received is not None
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
