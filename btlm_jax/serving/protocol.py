"""The bodies of OpenAI's requests, checked; and its errors.

Fields that are unknown, or that this server does not support, are refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from collections.abc import Mapping
from typing import Any

from btlm_jax.utils.json_files import json_type

# Fields that change nothing here, and are accepted.
_WITHOUT_EFFECT = ("user", "store", "metadata")
# Field -> (values that are as if it were absent, why it is refused).
_NOT_SUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "best_of": ((None, 1), "candidates are not ranked: use n"),
    "suffix": ((None, ""), "the model continues a text and cannot fill one in"),
    "presence_penalty": ((None, 0), "use repetition_penalty"),
    "frequency_penalty": ((None, 0), "use repetition_penalty"),
    "tools": ((None, []), "the model cannot call tools"),
    "tool_choice": ((None, "none"), "the model cannot call tools"),
    "functions": ((None, []), "the model cannot call functions"),
    "function_call": ((None, "none"), "the model cannot call functions"),
    "response_format": ((None, {"type": "text"}), "answers are text"),
    "modalities": ((None, ["text"]), "answers are text"),
    "service_tier": ((None, "auto", "default"), "there is one"),
}
_MAX_STOPS, _MAX_N, _MAX_LOGPROBS = 4, 128, 5


class ApiError(Exception):
    """An error of OpenAI's form.

    Attributes:
      status: the HTTP status.
      message: what is wrong.
      param: the field, or None.
      code: a machine-readable code, or None.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Returns the body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}


@dataclasses.dataclass(frozen=True)
class SamplingFields:
    """The fields of a request that decide how its text is continued.

    Attributes:
      model: the name of the model.
      max_tokens: maximum number of new tokens; None is as many as fit.
      n: continuations.
      stop: texts that end a continuation, which does not contain them.
      seed: of the first continuation; drawn if the request gives none.
      stream: send the tokens as they come.
      include_usage: send the numbers of tokens at the end of a stream.
      options: further options of `generate`.
    """

    model: str
    max_tokens: int | None
    n: int
    stop: tuple[str, ...]
    seed: int
    stream: bool
    include_usage: bool
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """The body of /v1/completions.

    Attributes:
      sampling: how to continue.
      prompts: texts or token ids.
      echo: repeat the prompt in front of the continuation.
      logprobs: number of most likely tokens whose log-probabilities are returned, beside that of
        every token; None for no log-probabilities.
    """

    sampling: SamplingFields
    prompts: list[str | list[int]]
    echo: bool
    logprobs: int | None


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """The body of /v1/chat/completions.

    Attributes:
      sampling: how to continue.
      messages: what was said.
      logprobs: number of most likely tokens whose log-probabilities are returned; None for none.
    """

    sampling: SamplingFields
    messages: list[dict[str, str]]
    logprobs: int | None


def parse_json(body: bytes) -> dict[str, Any]:
    """Parses the body of a request.

    Raises:
      ApiError: it is not a JSON object, or holds NaN or Infinity.
    """

    def refuse(name: str) -> None:
        raise ApiError(400, f"the body holds {name}, expected finite numbers")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        reason = "is nested too deeply" if isinstance(e, RecursionError) else f"is not JSON: {e}"
        raise ApiError(400, f"the body {reason}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"found a JSON {json_type(value)}, expected an object")
    return value


def parse_completion(body: Mapping[str, Any]) -> CompletionRequest:
    """Checks the body of /v1/completions.

    Raises:
      ApiError: a field is unknown, not supported, or has a wrong type or value.
    """
    fields = _Fields(body)
    prompts = _prompts(fields.take("prompt"))
    echo = fields.boolean("echo")
    logprobs = fields.integer("logprobs", None, 0, _MAX_LOGPROBS)
    max_tokens = fields.integer("max_tokens", 16, 0)
    sampling = _sampling(fields, max_tokens)
    if max_tokens == 0 and not echo:
        raise ApiError(400, "max_tokens: found 0, expected >= 1 without echo", "max_tokens")
    if max_tokens == 0 and sampling.n > 1:
        raise ApiError(400, f"n: found {sampling.n}, expected 1 if max_tokens is 0", "n")
    if sampling.stream and (echo or logprobs):
        name = "echo" if echo else "logprobs"
        raise ApiError(400, f"{name}: not supported in a stream: leave it out", name)
    fields.finish()
    return CompletionRequest(sampling, prompts, echo, logprobs)


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """Checks the body of /v1/chat/completions.

    Raises:
      ApiError: as `parse_completion`.
    """
    fields = _Fields(body)
    messages = _messages(fields.take("messages"))
    count = fields.integer("top_logprobs", 0, 0, _MAX_LOGPROBS)
    logprobs = count if fields.boolean("logprobs") else None
    if count and logprobs is None:
        raise ApiError(400, "top_logprobs: needs logprobs=true", "top_logprobs")
    max_tokens = fields.integer("max_completion_tokens", None, 1)
    older = fields.integer("max_tokens", None, 1)
    sampling = _sampling(fields, max_tokens if max_tokens is not None else older)
    if sampling.stream and count:
        raise ApiError(400, "top_logprobs: not supported in a stream", "top_logprobs")
    fields.finish()
    return ChatRequest(sampling, messages, logprobs)


class _Fields:
    """The fields of a body, of which each is taken once."""

    def __init__(self, body: Mapping[str, Any]):
        self._left = dict(body)

    def take(self, name: str, default: Any = None) -> Any:
        value = self._left.pop(name, None)
        return default if value is None else value

    def integer(
        self, name: str, default: int | None, lowest: int, highest: float = math.inf
    ) -> Any:
        value = self.take(name, default)
        if value is None:
            return None
        valid = isinstance(value, int) and not isinstance(value, bool)
        if not valid or not lowest <= value <= highest:
            limit = "" if highest == math.inf else f" to {highest}"
            raise _invalid(name, value, f"an integer from {lowest}{limit}")
        return value

    def number(self, name: str, lowest: float, highest: float) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        valid = isinstance(value, int | float) and not isinstance(value, bool)
        if not valid or not lowest <= value <= highest:
            raise _invalid(name, value, f"a number from {lowest:g} to {highest:g}")
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise _invalid(name, value, "true or false")
        return value

    def finish(self) -> None:
        """Raises ApiError for a field that is left."""
        for name, value in self._left.items():
            if name in _NOT_SUPPORTED:
                absent, reason = _NOT_SUPPORTED[name]
                if value not in absent:
                    raise ApiError(400, f"{name}: not supported: {reason}", name)
            elif name not in _WITHOUT_EFFECT and value is not None:
                raise ApiError(400, f"{name}: unknown field", name, "unknown_parameter")


def _invalid(name: str, value: Any, expected: str) -> ApiError:
    text = json.dumps(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return ApiError(400, f"{name}: found {text}, expected {expected}", name)


def _sampling(fields: _Fields, max_tokens: int | None) -> SamplingFields:
    model = fields.take("model")
    if not isinstance(model, str):
        raise _invalid("model", model, "the name of a model")
    temperature = fields.number("temperature", 0, 100)
    options: dict[str, Any] = {"do_sample": temperature != 0}
    if temperature:
        options["temperature"] = temperature
    if temperature != 0:
        options |= {"top_k": fields.integer("top_k", 0, 0)}
        limits = {"top_p": (0, 1), "min_p": (0, 1), "typical_p": (0, 1)}
    else:  # the most likely token is in all of these
        limits = {}
        fields.integer("top_k", 0, 0)
        for name in ("top_p", "min_p", "typical_p"):
            fields.number(name, 0, 1)
    limits["repetition_penalty"] = (0, 100)
    for name, (lowest, highest) in limits.items():
        if (value := fields.number(name, lowest, highest)) is not None:
            options[name] = value
    highest = math.inf if max_tokens is None else max_tokens
    if (value := fields.integer("min_tokens", None, 0, highest)) is not None:
        options["min_new_tokens"] = value
    if bias := _logit_bias(fields.take("logit_bias", {})):
        options["logit_bias"] = bias
    stream, stream_options = fields.boolean("stream"), fields.take("stream_options", {})
    known = isinstance(stream_options, dict) and stream_options.keys() <= {"include_usage"}
    if not known or (stream_options and not stream):
        raise _invalid("stream_options", stream_options, "include_usage, with stream=true")
    seed = fields.integer("seed", None, 0, 2**32 - 1)
    return SamplingFields(
        model,
        max_tokens,
        fields.integer("n", 1, 1, _MAX_N),
        _stops(fields.take("stop", [])),
        secrets.randbits(32) if seed is None else seed,
        stream,
        bool(stream_options.get("include_usage")),
        options,
    )


def _prompts(value: Any) -> list[str | list[int]]:
    expected = "a string, a list of token ids, or a list of either"
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if not isinstance(value, list) or not value:
        raise _invalid("prompt", value, expected)
    if not all(isinstance(x, str) for x in value) and not all(_is_ids(x) for x in value):
        raise _invalid("prompt", value, expected)
    return value


def _is_ids(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(type(x) is int and 0 <= x < 2**31 for x in value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    valid = isinstance(stops, list) and len(stops) <= _MAX_STOPS
    if not valid or not all(isinstance(x, str) and x for x in stops):
        raise _invalid("stop", value, f"up to {_MAX_STOPS} texts that are not empty")
    return tuple(stops)


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise _invalid("logit_bias", value, "an object of token ids and numbers")
    bias = {}
    for token, number in value.items():
        valid = isinstance(number, int | float) and not isinstance(number, bool)
        is_id = token.isascii() and token.isdecimal() and len(token) < 10
        if not is_id or not valid or abs(number) > 100:
            raise _invalid("logit_bias", {token: number}, "a token id and -100 to 100")
        bias[int(token)] = float(number)
    return bias


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _invalid("messages", value, "a list of messages")
    messages = []
    for i, message in enumerate(value):
        name = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _invalid(name, message, "an object with role and content")
        if extra := message.keys() - {"role", "content"}:
            raise ApiError(400, f"{name}.{min(extra)}: not supported", "messages")
        messages.append({"role": message["role"], "content": _content(name, message)})
    return messages


def _content(name: str, message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [None]:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise _invalid(f"{name}.content", content, "text, or parts of type text")
        if not isinstance(part.get("text"), str):
            raise _invalid(f"{name}.content", content, "text, or parts of type text")
        texts.append(part["text"])
    return "".join(texts)
