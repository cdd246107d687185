"""Bodies of HTTP requests and responses, and their limits."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from btlm_jax.serving.answers import Continuation
from btlm_jax.serving.protocol import ApiError


@dataclasses.dataclass(frozen=True)
class ServerLimits:
    """What a request may cost.

    Attributes:
      body_bytes: largest body.
      body_seconds: within which a body must arrive.
      requests: requests at a time; further ones get status 429.
      prompts: continuations of one request, over all its prompts.
    """

    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    requests: int = 256
    prompts: int = 128


class EventStream(StreamingResponse):
    """Server-sent events, and what is called when they end, or the client has gone before."""

    def __init__(self, events: AsyncIterator[bytes], on_close: list[Callable[[], None]]):
        super().__init__(events, media_type="text/event-stream")
        self.on_close = on_close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for call in self.on_close:
                call()


async def read_body(request: Request, limits: ServerLimits) -> bytes:
    """Reads the body of a request.

    Raises:
      ApiError: it is too large, or does not arrive in time.
    """
    body = bytearray()

    async def read() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > limits.body_bytes:
                raise ApiError(413, f"the body is larger than {limits.body_bytes:,} bytes")

    try:
        await asyncio.wait_for(read(), limits.body_seconds)
    except TimeoutError:
        message = f"the body did not arrive within {limits.body_seconds:g} s"
        raise ApiError(408, message) from None
    return bytes(body)


def event_bytes(body: Any) -> bytes:
    """Returns a server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """Returns an error as a response."""
    all_headers = dict(headers or {}) | ({"Retry-After": "1"} if error.status == 429 else {})
    body = json.dumps(error.body()).encode()  # ASCII, whatever the client sent
    return Response(body, error.status, all_headers, "application/json")


async def unless_disconnected(
    request: Request, work: Awaitable[Response], opened: Sequence[Continuation] = ()
) -> Response:
    """Returns the response, or cancels the work when the client has gone.

    Args:
      request: the request, whose body has been read.
      work: what makes the response.
      opened: continuations that are closed at the end.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        for continuation in opened:
            continuation.close()
