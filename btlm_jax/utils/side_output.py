"""Outputs beside the work, such as metrics and pictures, that can neither end nor hang it."""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

logger = logging.getLogger(__name__)

_CAPACITY = 4096
_EXIT_SECONDS = 20.0
_exit_code = 1  # what a Python program will exit with is not known


class SideOutput:
    """Runs the calls that write an output, in order, in a thread of its own.

    The first call that fails, or a stall, gives the output up, with one warning that states what is
    lost; further calls are then dropped. The caller waits for a full queue at most `patience`
    seconds in all, and can call `put` from a signal handler.

    Args:
      name: the output and where it is written, for the warning.
      cost: what giving it up means, for the warning.
      release: called in the thread after the last call, also after one that failed.
      patience: seconds for which the caller waits while more than 4096 calls are waiting.
    """

    def __init__(
        self,
        name: str,
        cost: str,
        release: Callable[[], Any] | None = None,
        *,
        patience: float = 10.0,
        capacity: int = _CAPACITY,
    ) -> None:
        self._name, self._cost, self._release = name, cost, release
        self._patience, self._capacity = patience, capacity
        # The one queue of the standard library that a signal handler may use.
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._given_up = self._ended = False
        self._thread = threading.Thread(target=self._run, name=f"write {name}", daemon=True)
        self._thread.start()

    @property
    def given_up(self) -> bool:
        """Whether writing failed or stalled, so that nothing more is written."""
        return self._given_up

    def put(self, write: Callable[..., Any], *args: Any) -> None:
        """Has the thread call `write(*args)`; returns at once unless the queue is full."""
        while self._calls.qsize() >= self._capacity and not self._given_up:
            if self._patience <= 0:
                self._give_up("it takes no more", stalled=True)
            time.sleep(0.02)
            self._patience -= 0.02
        if not self._given_up:
            if not self._thread.is_alive():
                self._give_up("its thread has ended")
                return
            self._calls.put(lambda: write(*args))

    def end(self) -> None:
        """Lets the thread finish the calls that wait, and release the output."""
        if not self._ended:
            self._ended = True
            self._calls.put(None)

    def close(self, seconds: float = 10.0) -> None:
        """Ends the output, and waits until it is complete or the seconds have passed."""
        self.end()
        if not self._given_up:
            self._thread.join(max(seconds, 0.0))
        if self._thread.is_alive():
            self._give_up(f"it was not finished within {seconds:.0f} s", stalled=True)

    def _run(self) -> None:
        try:
            while (call := self._calls.get()) is not None and not self._given_up:
                call()
        except BaseException as e:  # SystemExit too would end the thread without a word
            self._give_up(describe_error(e))
        finally:
            if self._release is not None:
                try:
                    self._release()
                except BaseException as e:
                    self._give_up(describe_error(e))

    def _give_up(self, reason: str, *, stalled: bool = False) -> None:
        if self._given_up:
            return
        self._given_up = True
        if stalled:
            bound_exit()
        logger.warning("%s: %s; %s", self._name, reason, self._cost)


def close_all(outputs: Iterable[SideOutput], seconds: float = 10.0) -> None:
    """Closes several outputs within the seconds that one may take."""
    outputs = list(outputs)
    deadline = time.monotonic() + seconds
    for output in outputs:
        output.end()
    for output in outputs:
        output.close(deadline - time.monotonic())


def attempt(name: str, cost: str, work: Callable[[], Any], seconds: float = 60.0) -> bool:
    """Does work whose failure must not matter; a failure or a stall becomes a warning.

    Returns:
      Whether the work was done.
    """
    output = SideOutput(name, cost)
    output.put(work)
    output.close(seconds)
    return not output.given_up


def describe_error(error: BaseException) -> str:
    """Returns the first line of an error, with its type where the text alone would not say much."""
    text = (str(error).splitlines() or [""])[0]
    if len(text) > 200:  # the reason may stand at the end, after a long path
        text = f"{text[:80]} … {text[-120:]}"
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"


@functools.cache
def bound_exit() -> None:
    """Bounds the exit of this process, in which a thread has stalled.

    Python, and the library that the thread belongs to, may wait for it once more. The exit code is
    that of `set_exit_code`, or else 1.
    """
    exiting = threading.Event()

    def end() -> None:
        exiting.wait()
        time.sleep(_EXIT_SECONDS)
        os._exit(_exit_code)

    threading.Thread(target=end, name="bound the exit", daemon=True).start()
    # `atexit` would be too late: Python first waits for threads that are no daemons.
    threading._register_atexit(exiting.set)  # pyrefly: ignore


def set_exit_code(code: int) -> None:
    """Sets the exit code of a process that is about to end, in case a stalled thread keeps it."""
    global _exit_code
    _exit_code = code
