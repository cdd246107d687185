"""The server's routes, its limits and its keys."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from btlm_jax.serving import answers
from btlm_jax.serving.answers import Answer, Continuation, Piece, merge_pieces
from btlm_jax.serving.chat_template import ChatTemplate
from btlm_jax.serving.http_io import (
    EventStream,
    ServerLimits,
    error_response,
    event_bytes,
    read_body,
    unless_disconnected,
)
from btlm_jax.serving.prompt_encoding import PromptEncoder, PromptIds
from btlm_jax.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    SamplingFields,
    parse_chat,
    parse_completion,
    parse_json,
)
from btlm_jax.serving.service import EngineService
from btlm_jax.serving.token_texts import TokenTexts

logger = logging.getLogger(__name__)

_Handler = Callable[[Request], Awaitable[Response]]


class Server:
    """The state of the server and the handlers of its routes."""

    def __init__(
        self,
        service: EngineService,
        tokenizer: Any,
        *,
        model_name: str,
        api_key: str | None = None,
        chat_template: ChatTemplate | None = None,
        limits: ServerLimits | None = None,
    ):
        """Creates a server; `app` makes its application.

        Args:
          service: the engine's thread.
          tokenizer: the tokenizer of the model.
          model_name: the name of the model in requests.
          api_key: a key that requests must have; None for none.
          chat_template: for /v1/chat/completions; None refuses chats.
          limits: what a request may cost.
        """
        self._service, self._tokenizer, self._model_name = service, tokenizer, model_name
        self._api_key, self._chat_template = api_key, chat_template
        self._limits = ServerLimits() if limits is None else limits
        self._texts = TokenTexts(tokenizer)
        self._encoder = PromptEncoder(tokenizer, service.engine.model.config.vocab_size)
        self._created, self._num_requests = int(time.time()), 0

    def app(self) -> Starlette:
        """Returns the application."""
        routes = [
            self._route("/v1/completions", self._completions, "POST"),
            self._route("/v1/chat/completions", self._chat, "POST"),
            self._route("/v1/models", self._models, "GET"),
            self._route("/v1/models/{name:path}", self._models, "GET"),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
        ]

        async def http_error(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            self._service.metrics.observe_response("other", error.status_code)
            message = f"{request.url.path}: {error.detail}"
            return error_response(ApiError(error.status_code, message), error.headers)

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            self._service.start()
            yield
            await asyncio.to_thread(self._service.stop)

        handlers: Any = {HTTPException: http_error}
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)

    def _route(self, path: str, handler: _Handler, method: str) -> Route:
        """Returns a route that checks the key and the number of requests.

        Errors become responses.
        """

        async def handle(request: Request) -> Response:
            try:
                self._check_key(request)
                if self._num_requests >= self._limits.requests:
                    raise ApiError(429, "too many requests at a time", code="too_many_requests")
                self._num_requests += 1
                try:
                    response = await handler(request)
                except BaseException:
                    self._count_down()
                    raise
                if isinstance(response, EventStream):  # ends after its last piece
                    response.on_close.append(self._count_down)
                else:
                    self._count_down()
            except ApiError as e:
                response = error_response(e)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception as e:
                logger.exception("%s failed", request.url.path)
                response = error_response(ApiError(500, f"{type(e).__name__}: {e}"))
            self._service.metrics.observe_response(path, response.status_code)
            return response

        return Route(path, handle, methods=[method])

    def _count_down(self) -> None:
        self._num_requests -= 1

    def _check_key(self, request: Request) -> None:
        if self._api_key is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, f"Bearer {self._api_key}".encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    # Routes ------------------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        if (failure := self._service.failure) is not None:
            return JSONResponse({"status": "failed", "reason": str(failure)}, 503)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        model = {
            "id": self._model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "btlm-jax",
        }
        if "name" in request.path_params:
            self._check_model(request.path_params["name"])
            return JSONResponse(model)
        return JSONResponse({"object": "list", "data": [model]})

    async def _completions(self, request: Request) -> Response:
        fields = parse_completion(parse_json(await read_body(request, self._limits)))
        self._check_model(fields.sampling.model)
        self._check_count(len(fields.prompts) * fields.sampling.n)
        encode = self._encoder.prompt_ids
        prompts = await asyncio.to_thread(lambda: [encode(prompt) for prompt in fields.prompts])
        self._check_lengths(prompts, fields.sampling)
        answer = Answer("text_completion", "cmpl", self._model_name)
        if fields.sampling.max_tokens == 0:
            return await unless_disconnected(request, self._score(fields, prompts, answer))
        opened = await self._open(prompts, fields.sampling)

        def choice(index: int, piece: Piece) -> dict[str, Any]:
            logprobs = None
            if fields.logprobs is not None:
                logprobs = answers.completion_logprobs(
                    self._texts, piece.tokens, piece.logprobs, None
                )
            return {
                "index": index,
                "text": piece.text,
                "logprobs": logprobs,
                "finish_reason": piece.finish_reason,
            }

        if fields.sampling.stream:
            return self._stream(opened, fields.sampling, answer, choice)

        async def whole() -> Response:
            pieces = await _finish(opened)
            choices = []
            for i, (continuation, piece) in enumerate(zip(opened, pieces, strict=True)):
                chosen = choice(i, piece)
                if fields.echo or fields.logprobs:
                    ids = [*continuation.prompt.ids, *piece.tokens]
                    chosen["logprobs"] = await self._text_logprobs(fields, continuation.prompt, ids)
                if fields.echo:
                    chosen["text"] = self._encoder.text(continuation.prompt) + piece.text
                choices.append(chosen)
            return JSONResponse(answer.body(choices, answers.usage(opened, fields.sampling.n)))

        return await unless_disconnected(request, whole(), opened)

    async def _score(
        self, fields: CompletionRequest, prompts: Sequence[PromptIds], answer: Answer
    ) -> Response:
        """Repeats prompts with the log-probabilities of their tokens."""
        choices = []
        for i, prompt in enumerate(prompts):
            logprobs = await self._text_logprobs(fields, prompt, prompt.ids)
            text = self._encoder.text(prompt)
            choices.append(
                {"index": i, "text": text, "logprobs": logprobs, "finish_reason": "length"}
            )
        tokens = sum(len(prompt.ids) for prompt in prompts)
        usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
        return JSONResponse(answer.body(choices, usage))

    async def _text_logprobs(
        self, fields: CompletionRequest, prompt: PromptIds, ids: list[int]
    ) -> dict[str, Any] | None:
        """Returns the log-probabilities of a text: of all of it with echo, else of what is new."""
        if fields.logprobs is None:
            return None
        k = fields.logprobs
        own: list[float | None] = [None]
        top: list[dict[str, float] | None] = [None]
        if len(ids) > 1:
            best = await self._service.call_slowly(
                lambda: answers.top_of_text(self._service, ids, k)
            )
            own += best.logprobs.tolist()
            for top_ids, values in zip(best.top_ids, best.top_logprobs, strict=True):
                texts = (self._texts(token) for token in top_ids[:k].tolist())
                top.append(dict(zip(texts, values[:k].tolist(), strict=True)))
        start = 0 if fields.echo else len(prompt.ids)
        return answers.completion_logprobs(
            self._texts, ids[start:], own[start:], top[start:] if k else None
        )

    async def _chat(self, request: Request) -> Response:
        fields = parse_chat(parse_json(await read_body(request, self._limits)))
        self._check_model(fields.sampling.model)
        if self._chat_template is None:
            raise ApiError(
                400, "the tokenizer has no chat template: use /v1/completions, or start the server "
                "with --chat-template", "messages",
            )  # fmt: skip
        self._check_count(fields.sampling.n)
        text = self._chat_template.render(fields.messages)
        prompt = await asyncio.to_thread(lambda: self._encoder.chat_ids(text))
        self._check_lengths([prompt], fields.sampling)
        opened = await self._open([prompt], fields.sampling)
        if fields.sampling.stream:
            answer = Answer("chat.completion.chunk", "chatcmpl", self._model_name)
            started: set[int] = set()

            def delta(index: int, piece: Piece) -> dict[str, Any]:
                role = {} if index in started else {"role": "assistant"}
                started.add(index)
                return {
                    "index": index,
                    "delta": role | {"content": piece.text},
                    "logprobs": self._chat_logprobs(fields, piece, None),
                    "finish_reason": piece.finish_reason,
                }

            return self._stream(opened, fields.sampling, answer, delta)
        answer = Answer("chat.completion", "chatcmpl", self._model_name)

        async def whole() -> Response:
            choices = []
            for i, piece in enumerate(await _finish(opened)):
                top = None
                if fields.logprobs:
                    ids, k = [*prompt.ids, *piece.tokens], fields.logprobs
                    best = await self._service.call_slowly(
                        lambda ids=ids, k=k: answers.top_of_text(self._service, ids, k)
                    )
                    rows = zip(best.top_ids.tolist(), best.top_logprobs.tolist(), strict=True)
                    pairs = [list(zip(*row, strict=True)) for row in rows]
                    top = pairs[len(prompt.ids) - 1 :]
                choices.append(
                    {
                        "index": i,
                        "message": {"role": "assistant", "content": piece.text},
                        "logprobs": self._chat_logprobs(fields, piece, top),
                        "finish_reason": piece.finish_reason,
                    }
                )
            return JSONResponse(answer.body(choices, answers.usage(opened, fields.sampling.n)))

        return await unless_disconnected(request, whole(), opened)

    def _chat_logprobs(
        self, fields: ChatRequest, piece: Piece, top: list[Any] | None
    ) -> dict[str, Any] | None:
        if fields.logprobs is None:
            return None
        return answers.chat_logprobs(self._texts, piece.tokens, piece.logprobs, top)

    # Parts -------------------------------------------------------------------------------------

    def _check_model(self, name: str) -> None:
        if name != self._model_name:
            raise ApiError(
                404, f"model: found {name!r}, expected {self._model_name!r}", "model",
                "model_not_found",
            )  # fmt: skip

    async def _open(
        self, prompts: Sequence[PromptIds], fields: SamplingFields
    ) -> list[Continuation]:
        """Submits all continuations of a request, or none."""
        requests = []
        for prompt in prompts:
            room = self._service.engine.max_length - len(prompt.ids)
            wanted = room if fields.max_tokens is None else fields.max_tokens
            for _ in range(fields.n):  # each has random numbers of its own
                seed = [(fields.seed, len(requests))]
                options = fields.options | {"max_new_tokens": wanted, "seed": seed}
                requests.append((prompt.ids, options))
        streams = await self._service.submit(requests)
        of_prompts = [prompt for prompt in prompts for _ in range(fields.n)]
        return [
            Continuation(stream, self._tokenizer, prompt, fields.stop)
            for stream, prompt in zip(streams, of_prompts, strict=True)
        ]

    def _check_count(self, count: int) -> None:
        """Raises ApiError for more continuations than can wait."""
        limit = min(self._limits.prompts, self._service.engine.queue_size)
        if count > limit:
            raise ApiError(400, f"n: found {count} continuations, expected at most {limit}", "n")

    def _check_lengths(self, prompts: Sequence[PromptIds], fields: SamplingFields) -> None:
        """Raises ApiError for prompts that do not fit with their continuations."""
        limit = self._service.engine.max_length
        for prompt in prompts:
            wanted = 1 if fields.max_tokens is None else fields.max_tokens
            if len(prompt.ids) + wanted > limit:
                raise ApiError(
                    400, f"prompt: found {len(prompt.ids)} tokens and max_tokens {wanted}, "
                    f"expected at most {limit} together", "max_tokens", "context_length_exceeded",
                )  # fmt: skip

    def _stream(
        self,
        opened: list[Continuation],
        fields: SamplingFields,
        answer: Answer,
        choice: Callable[[int, Piece], dict[str, Any]],
    ) -> EventStream:
        """Returns the pieces of continuations as server-sent events."""

        async def events() -> AsyncIterator[bytes]:
            try:
                async with contextlib.aclosing(merge_pieces(opened)) as pieces:
                    async for index, piece in pieces:
                        yield event_bytes(answer.body([choice(index, piece)]))
                if fields.include_usage:
                    yield event_bytes(answer.body([], answers.usage(opened, fields.n)))
                yield b"data: [DONE]\n\n"
            except ApiError as e:
                yield event_bytes(e.body())
            except Exception as e:
                logger.exception("a stream failed")
                yield event_bytes(ApiError(500, f"{type(e).__name__}: {e}").body())

        return EventStream(events(), [continuation.close for continuation in opened])


async def _finish(opened: Sequence[Continuation]) -> list[Piece]:
    return await asyncio.gather(*(continuation.finish() for continuation in opened))
