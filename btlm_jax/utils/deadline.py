"""Work that may hang, such as writes to a file system that does not answer, with a deadline."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import NamedTuple, TypeVar

from btlm_jax.utils.side_output import bound_exit

logger = logging.getLogger(__name__)

_WARN_EVERY_SECONDS = 60.0
_POLL_SECONDS = 0.2

_T = TypeVar("_T")


class StalledError(OSError):
    """Work that was not finished in time. Its thread may still be busy with it."""


class Deadline(NamedTuple):
    """How long work may take.

    Attributes:
      seconds: in general, from its beginning.
      stop_seconds: from when a stop is requested, or from its beginning if that is later.
      stopping: returns whether a stop has been requested, such as by SIGTERM.
    """

    seconds: float
    stop_seconds: float
    stopping: Callable[[], bool]


def run_with_deadline(work: Callable[[], _T], doing: str, deadline: Deadline) -> _T:
    """Returns the result of work, which is done in a thread, so that signals are still handled.

    Every minute of it is a warning, and so is a request to stop.

    Args:
      work: the work. It must not depend on which thread calls it.
      doing: what it does, for the messages: "writing PATH".
      deadline: how long it may take.

    Raises:
      StalledError: the deadline has passed. The end of this process will not wait for the thread.
    """
    future: Future[_T] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            future.set_result(context.run(work))
        except BaseException as e:
            future.set_exception(e)

    began = time.monotonic()
    warn_at, end, is_stopping = began + _WARN_EVERY_SECONDS, began + deadline.seconds, False
    try:
        threading.Thread(target=run, name=doing, daemon=True).start()
        while not wait([future], _POLL_SECONDS).done:
            now = time.monotonic()
            if not is_stopping and deadline.stopping():
                is_stopping, end = True, min(end, now + deadline.stop_seconds)
                warn_at = min(warn_at, now + _POLL_SECONDS)  # not if it is about to be finished
            elif now >= warn_at:
                logger.warning(
                    "still %s after %.0f s: its file system is slow or hangs; waiting at most "
                    "%.0f s more", doing, now - began, max(end - now, 0),
                )  # fmt: skip
                warn_at = now + _WARN_EVERY_SECONDS
            if now >= end:
                raise StalledError(f"still {doing} after {now - began:.0f} s")
    except BaseException:  # also Ctrl-C
        bound_exit()
        raise
    return future.result()
