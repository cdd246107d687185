"""The thread that owns an engine, and the way for others to use it."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from btlm_jax.generation.engine import Engine, EngineFull
from btlm_jax.generation.request_handle import Handle
from btlm_jax.serving.protocol import ApiError
from btlm_jax.serving.server_metrics import ServerMetrics

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclasses.dataclass(eq=False)
class _Job:
    """A request of an event loop.

    Attributes:
      handle: its handle in the engine.
      deliver: called from the engine's thread with ("tokens", tokens, logprobs),
        ("end", finish reason) or ("error", exception).
      arrived: when it was submitted, in seconds.
      num_sent: tokens that were delivered.
      last: when its last tokens were delivered.
    """

    handle: Handle
    deliver: Callable[[tuple[Any, ...]], Any]
    arrived: float
    num_sent: int = 0
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
        self._slow: collections.deque[Callable[[], None]] = collections.deque()
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

    async def call(self, function: Callable[[], T]) -> T:
        """Returns the result of a quick function that runs in the engine's thread.

        Raises:
          ApiError: the engine has failed.
        """
        return await self._run_in_thread(function, self._commands.put)

    async def call_slowly(self, function: Callable[[], T]) -> T:
        """Like `call`, for a function that takes long: one runs between two steps of the engine."""
        return await self._run_in_thread(
            function, lambda command: self._commands.put(lambda: self._slow.append(command))
        )

    async def _run_in_thread(
        self, function: Callable[[], T], put: Callable[[Callable[[], None]], None]
    ) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def set_result(result: Any, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        def command() -> None:
            result, error = None, None
            try:
                self._check_alive()
                result = function()
            except Exception as e:
                error = e
            loop.call_soon_threadsafe(set_result, result, error)

        put(command)
        return await future

    async def submit(
        self, requests: Sequence[tuple[list[int], dict[str, Any]]]
    ) -> list[TokenStream]:
        """Submits prompts: all of them or none.

        Args:
          requests: prompts, and options of `Engine.submit`.

        Raises:
          ApiError: the engine is full, or refuses a request.
        """
        loop, arrived = asyncio.get_running_loop(), time.monotonic()
        streams: list[TokenStream] = []

        def submit() -> None:
            jobs: list[_Job] = []
            try:
                for ids, options in requests:
                    events: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
                    prompt = np.array(ids, np.int64)
                    handle = self.engine.submit(prompt, block=False, **options)
                    deliver = functools.partial(loop.call_soon_threadsafe, events.put_nowait)
                    jobs.append(_Job(handle, deliver, arrived))
                    streams.append(TokenStream(self, handle, events))
            except BaseException:
                for job in jobs:
                    self.engine.cancel(job.handle)
                raise
            self._jobs += jobs

        def close_all() -> None:
            for stream in streams:
                stream.close()

        try:
            await self.call(submit)
        except EngineFull as e:
            raise ApiError(429, f"the server is busy: {e}", code="engine_full") from None
        except ValueError as e:
            raise ApiError(400, _with_field_names(str(e))) from None
        except asyncio.CancelledError:
            # The engine's thread may be about to submit them.
            self._commands.put(close_all)
            raise
        return streams

    def cancel(self, handle: Handle) -> None:
        """Ends a request; does nothing if it has ended, or if the engine has failed."""
        self._commands.put(lambda: None if self.failure else self.engine.cancel(handle))

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise ApiError(503, f"the engine has failed: {self.failure}")

    def _run(self) -> None:
        try:
            while self._take_commands(wait=not self._jobs and not self._slow):
                if self._slow:
                    self._slow.popleft()()
                if self._jobs:
                    self.engine.step()
                    self._deliver()
                self.metrics.observe_engine(self.engine)
            self.failure = RuntimeError("the server has stopped")
        except BaseException as e:
            self.failure = e
            logger.exception("the engine has failed")
            self._answer_all()
            while self._take_commands(wait=True):  # each is answered with the failure
                self._answer_all()
        self._answer_all()

    def _answer_all(self) -> None:
        """Answers everyone who waits with the failure."""
        for job in self._jobs:
            job.deliver(("error", self.failure))
        self._jobs = []
        while self._slow:
            self._slow.popleft()()

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


def _with_field_names(message: str) -> str:
    """Returns a message of the engine with the names of the fields of requests."""
    for option, field in (("max_new_tokens", "max_tokens"), ("min_new_tokens", "min_tokens")):
        message = message.replace(option, field)
    return message
