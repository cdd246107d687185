"""The thread that owns an engine, and the way for others to use it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from btlm_jax.generation.engine import Engine, EngineFull
from btlm_jax.generation.request_handle import Handle
from btlm_jax.serving.protocol import ApiError
from btlm_jax.serving.server_metrics import ServerMetrics

logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class _Job:
    """A request of an event loop.

    Attributes:
      handle: its handle in the engine.
      deliver: called from the engine's thread with ("tokens", tokens, logprobs),
        ("end", finish reason) or ("error", exception).
      num_sent: tokens that were delivered.
      arrived: when it was submitted, in seconds.
      last: when its last tokens were delivered.
    """

    handle: Handle
    deliver: Callable[[tuple[Any, ...]], None]
    num_sent: int = 0
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    last: float = 0.0


@dataclasses.dataclass(eq=False)
class TokenStream:
    """The tokens of a request as they come. It must be closed."""

    service: EngineService
    handle: Handle
    events: asyncio.Queue[tuple[Any, ...]]
    finish_reason: str | None = None

    async def next_tokens(self) -> tuple[list[int], list[float]]:
        """Returns the next tokens and their log-probabilities; none when the row has ended.

        Raises:
          ApiError: the generation failed.
        """
        event = await self.events.get()
        if event[0] == "error":
            self.finish_reason = "error"
            raise ApiError(500, f"the generation failed: {event[1]}")
        if event[0] == "end":
            self.finish_reason = event[1]
            return [], []
        return event[1], event[2]

    def close(self) -> None:
        """Ends the request, if it has not ended."""
        if self.finish_reason is None:
            self.finish_reason = "cancelled"
            self.service.cancel(self.handle)


class EngineService:
    """Runs an engine in a thread of its own. Its methods are called from an event loop."""

    def __init__(self, engine: Engine, metrics: ServerMetrics):
        self.engine, self.metrics = engine, metrics
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: list[_Job] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; requests that are running fail."""
        self._commands.put(None)
        self._thread.join()

    async def call(self, function: Callable[[], Any]) -> Any:
        """Returns the result of a function that runs in the engine's thread."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def set_result(result: Any, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        def command() -> None:
            try:
                result, error = function(), None
            except Exception as e:
                result, error = None, e
            loop.call_soon_threadsafe(set_result, result, error)

        self._check_alive()
        self._commands.put(command)
        return await future

    async def submit(self, ids: list[int], options: dict[str, Any]) -> TokenStream:
        """Submits a prompt.

        Args:
          ids: the prompt.
          options: those of `Engine.submit`.

        Raises:
          ApiError: the engine is full, or refuses the request.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()

        def deliver(event: tuple[Any, ...]) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def submit() -> _Job:
            handle = self.engine.submit(np.array(ids, np.int64), block=False, **options)
            job = _Job(handle, deliver)
            self._jobs.append(job)
            return job

        try:
            job = await self.call(submit)
        except EngineFull as e:
            raise ApiError(429, f"the server is busy: {e}", code="engine_full") from None
        except ValueError as e:
            raise ApiError(400, str(e)) from None
        return TokenStream(self, job.handle, events)

    def cancel(self, handle: Handle) -> None:
        """Ends a request; does nothing if it has ended."""
        self._commands.put(lambda: self.engine.cancel(handle))

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise ApiError(503, f"the engine has failed: {self.failure}")

    def _run(self) -> None:
        try:
            while self._take_commands(wait=not self._jobs):
                if self._jobs:
                    self.engine.step()
                    self._deliver()
                self.metrics.observe_engine(self.engine)
        except BaseException as e:
            self.failure = e
            logger.exception("the engine has failed")
        finally:
            error = self.failure or RuntimeError("the server stops")
            for job in self._jobs:
                job.deliver(("error", error))

    def _take_commands(self, *, wait: bool) -> bool:
        """Runs what was asked for; returns False when the thread must end."""
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _deliver(self) -> None:
        now, unfinished = time.monotonic(), []
        for job in self._jobs:
            handle = job.handle
            if count := len(handle.tokens) - job.num_sent:
                first = job.num_sent == 0
                self.metrics.observe_tokens(
                    count, now - (job.arrived if first else job.last), first
                )
                tokens, logprobs = handle.tokens[-count:], handle.logprobs[-count:]
                job.num_sent, job.last = len(handle.tokens), now
                job.deliver(("tokens", tokens, logprobs))
            if handle.error is not None:
                job.deliver(("error", handle.error))
            elif handle.finished:
                job.deliver(("end", handle.finish_reason))
            else:
                unfinished.append(job)
        self._jobs = unfinished
