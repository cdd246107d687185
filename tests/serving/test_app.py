"""The server, driven by OpenAI's client and by hand: the tokens of the library, errors by name."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time

import numpy as np
import openai
import pytest

from btlm_jax import generate, score
from btlm_jax.generation.detokenize import detokenize_continuation

PROMPT = "the quick"
GREEDY = dict(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0)
SAMPLED = dict(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0.8, top_p=0.9, seed=7)


def expected(of_bytes, prompt=PROMPT, index=0, **options):
    """Returns the tokens and the text of `generate`."""
    model, params, tokenizer = of_bytes
    ids = tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
    seed = [(options.pop("seed", 0), index)]
    output = generate(model, params, [ids], seed=seed, return_dict_in_generate=True, **options)
    tokens = output.sequences[0, len(ids) :].tolist()
    return tokens, detokenize_continuation(tokenizer, ids, tokens), output.logprobs[0]


def test_greedy_and_sampled_completions_are_those_of_generate(client, of_bytes):
    tokens, text, logprobs = expected(of_bytes, max_new_tokens=8)
    answer = client.completions.create(**GREEDY, logprobs=0)
    choice = answer.choices[0]
    assert choice.text == text and choice.finish_reason in ("stop", "length")
    np.testing.assert_allclose(choice.logprobs.token_logprobs, logprobs, atol=1e-4)
    assert answer.usage.completion_tokens == len(tokens) and answer.usage.prompt_tokens == 9
    options = dict(max_new_tokens=8, do_sample=True, temperature=0.8, top_p=0.9, top_k=0, seed=7)
    for several in (dict(n=3), dict(prompt=[PROMPT] * 3)):  # each draws on its own
        answer = client.completions.create(**SAMPLED | several)
        for i, choice in enumerate(answer.choices):
            assert choice.index == i and choice.text == expected(of_bytes, index=i, **options)[1]


def test_prompts_are_texts_or_ids_one_or_several(client, of_bytes):
    text = expected(of_bytes, max_new_tokens=8)[1]
    ids = of_bytes[2].encode(PROMPT).ids
    for prompt, count in ((ids, 1), ([PROMPT, PROMPT], 2), ([ids, ids], 2)):
        answer = client.completions.create(**GREEDY | dict(prompt=prompt))
        assert [choice.text for choice in answer.choices] == [text] * count


def test_streams_have_the_text_and_the_usage(client):
    whole = client.completions.create(**SAMPLED, n=2)
    stream = client.completions.create(
        **SAMPLED, n=2, stream=True, stream_options={"include_usage": True}
    )
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_stop_texts_end_a_continuation_and_are_not_part_of_it(client):
    free = client.completions.create(**SAMPLED | dict(max_tokens=20)).choices[0].text
    stop = free[3:5]
    arguments = SAMPLED | dict(max_tokens=20, stop=[stop, "never"])
    choice = client.completions.create(**arguments).choices[0]
    assert choice.text == free[: free.index(stop)] and choice.finish_reason == "stop"
    pieces = client.completions.create(**arguments, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == choice.text


def test_echo_returns_the_log_probabilities_of_the_prompt(client, of_bytes):
    model, params, tokenizer = of_bytes
    ids = tokenizer.encode(PROMPT).ids
    arguments = dict(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=2)
    choice = client.completions.create(**arguments).choices[0]
    assert choice.text == PROMPT
    found = choice.logprobs
    np.testing.assert_allclose(
        found.token_logprobs[1:], score(model, params, [ids])[0, 1:], atol=1e-4
    )
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    logits = np.asarray(model.apply(params, np.array([ids])), np.float64)[0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for t, top in enumerate(found.top_logprobs[1:]):
        best = np.sort(logprobs[t])[::-1][:2]
        np.testing.assert_allclose(sorted(top.values(), reverse=True), best, atol=1e-4)
    assert "".join(found.tokens) == PROMPT and found.text_offset == list(range(9))
    answer = client.completions.create(**GREEDY | dict(echo=True, logprobs=1))
    assert answer.choices[0].text.startswith(PROMPT)
    assert len(answer.choices[0].logprobs.tokens) == 9 + answer.usage.completion_tokens


def test_chats_use_the_template(client, of_bytes):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    prompt = "system: be brief\nuser: hi\nassistant:"
    _, text, logprobs = expected(of_bytes, prompt, max_new_tokens=6)
    arguments = dict(model="tiny", messages=messages, max_completion_tokens=6, temperature=0)
    answer = client.chat.completions.create(**arguments, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert choice.message.content == text and choice.message.role == "assistant"
    found = choice.logprobs.content
    np.testing.assert_allclose([entry.logprob for entry in found], logprobs, atol=1e-4)
    assert all(entry.top_logprobs[0].logprob >= entry.logprob - 1e-4 for entry in found)
    stream = client.chat.completions.create(**arguments, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text


def test_models_health_and_metrics_are_served(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "btlm-jax"
    status, body = http(server, "GET", "/health")
    assert status == 200 and json.loads(body) == {"status": "ok"}
    client.completions.create(**GREEDY)
    status, body = http(server, "GET", "/metrics")
    assert status == 200 and b"btlm_time_to_first_token_seconds_count" in body
    for name in (b"btlm_tokens_total", b"btlm_compilations_total"):
        (line,) = [x for x in body.splitlines() if x.startswith(name + b" ")]
        assert float(line.split()[1]) > 0


def test_concurrent_streams_lose_and_mix_nothing(server, of_bytes):
    options = dict(max_new_tokens=8, do_sample=True, temperature=0.8, top_p=0.9, top_k=0)

    async def one(client, seed):
        stream = await client.completions.create(**SAMPLED | dict(seed=seed), stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them():
        async with server.async_client() as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(8)))

    texts = asyncio.run(all_of_them())
    assert texts == [expected(of_bytes, seed=seed, **options)[1] for seed in range(8)]


def test_a_client_that_leaves_frees_its_row(server, client):
    long = GREEDY | dict(max_tokens=100, extra_body={"logit_bias": {"256": -100, "257": -100}})
    stream = client.completions.create(**long, stream=True)
    next(iter(stream))
    stream.close()
    body = json.dumps({**GREEDY, "max_tokens": 100, "logit_bias": {"256": -100}}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request_bytes("POST", "/v1/completions", body))
    deadline = time.monotonic() + 20
    while server.engine.num_running or server.engine.num_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_full_engine_answers_429_with_retry_after(of_bytes):
    from serving.conftest import RunningServer

    long = dict(model="tiny", prompt="a", max_tokens=100, temperature=0, stream=True)
    with RunningServer(*of_bytes, rows=1, queue_size=1) as server:
        client = server.client()
        streams = [client.completions.create(**long)]
        next(iter(streams[0]))
        streams.append(client.completions.create(**long))
        with pytest.raises(openai.RateLimitError) as error:
            client.completions.create(**long)
        assert error.value.response.headers["retry-after"] == "1"
        for stream in streams:
            stream.close()


def test_absurd_numbers_leave_the_engine_alive(client):
    huge = GREEDY | dict(temperature=1, extra_body={"top_k": 3_000_000_000})
    for arguments in (huge, GREEDY):
        assert client.completions.create(**arguments).choices[0].finish_reason


def test_an_engine_that_fails_answers_everyone(of_bytes, monkeypatch):
    from serving.conftest import RunningServer

    with RunningServer(*of_bytes, rows=1) as server:
        client = server.client()

        def fail():
            raise RuntimeError("out of memory")

        stream = client.completions.create(**GREEDY | dict(max_tokens=100), stream=True)
        next(iter(stream))
        monkeypatch.setattr(server.engine, "step", fail)
        with pytest.raises(openai.APIError, match="out of memory"):
            list(stream)
        for _ in range(2):
            with pytest.raises(openai.APIStatusError, match="the engine has failed") as error:
                client.completions.create(**GREEDY)
            assert error.value.status_code == 503
        status, body = http(server, "GET", "/health")
        assert status == 503 and b"out of memory" in body


def test_a_server_that_ends_finishes_what_is_running(of_bytes):
    from serving.conftest import RunningServer

    with RunningServer(*of_bytes) as server:
        stream = server.client().completions.create(**GREEDY | dict(max_tokens=60), stream=True)
        chunks = [next(iter(stream))]
        server.uvicorn.should_exit = True
        chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    "change, status, message",
    [
        (dict(model="other"), 404, "model: found 'other', expected 'tiny'"),
        (dict(prompt=[1, 258]), 400, "prompt: found the token id 258, expected 0 to 257"),
        (dict(prompt=[300], max_tokens=0, echo=True), 400, "found the token id 300"),
        (dict(prompt=[1] * 129, max_tokens=0, echo=True, logprobs=0), 400, "expected at most 128"),
        (dict(prompt=[2**40]), 400, "prompt: found"),
        (dict(min_tokens=3_000_000_000), 400, "min_tokens: found 3000000000"),
        (dict(n=9), 400, "n: found 9 continuations, expected at most 8"),
        (dict(top_p="x", temperature=0), 400, 'top_p: found "x"'),
        (dict(logit_bias={"1" * 5000: 1}), 400, "logit_bias: found"),
        (dict(prompt=[]), 400, "prompt: found .*, expected a string"),
        (dict(prompt=""), 400, "prompt: "),
        (dict(prompt=[1] * 125), 400, "found 125 tokens and max_tokens 8, expected at most 128"),
        (dict(temperature=-1), 400, "temperature: found -1, expected a number from 0 to 100"),
        (dict(temperature="hot"), 400, 'temperature: found "hot"'),
        (dict(top_p=0), 400, "top_p: found 0"),
        (dict(max_tokens=True), 400, "max_tokens: found true, expected an integer"),
        (dict(n=0), 400, "n: found 0, expected an integer from 1 to 128"),
        (dict(best_of=3), 400, "best_of: not supported"),
        (
            dict(presence_penalty=0.5),
            400,
            "presence_penalty: not supported: use repetition_penalty",
        ),
        (dict(logit_bias={"x": 1}), 400, "logit_bias: found"),
        (dict(logit_bias={"300": 1}), 400, "logit_bias: found"),
        (dict(stop=["a"] * 5), 400, "stop: found .* up to 4 texts"),
        (dict(colour="red"), 400, "colour: unknown field"),
        (dict(echo=True, stream=True), 400, "echo: not supported in a stream"),
        (dict(stream_options={"include_usage": True}), 400, "stream_options: found"),
    ],
)
def test_bad_fields_are_named_with_the_right_status(client, change, status, message):
    body = {**GREEDY, "temperature": 1, **change}
    with pytest.raises(openai.APIStatusError, match=message) as error:
        client.post("/completions", body=body, cast_to=object)
    assert error.value.status_code == status
    assert client.completions.create(**GREEDY).choices[0].text


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b"{", 400, "the body is not JSON"),
        (b"\xff", 400, "the body is not JSON"),
        (b"[1]", 400, "found a JSON array, expected an object"),
        (b'{"temperature": NaN}', 400, "the body holds NaN, expected finite numbers"),
        (b'{"model": "tiny", "prompt": "a", "\\ud800": 1}', 400, "unknown field"),
        (b'{"prompt": ' + b"[" * 9000, 400, "the body is nested too deeply|is not JSON"),
        (b" " * 20_001, 413, "the body is larger than 20,000 bytes"),
    ],
)
def test_bad_bodies_are_refused_and_the_server_continues(server, client, body, status, message):
    found, answer = http(server, "POST", "/v1/completions", body)
    assert found == status
    error = json.loads(answer)["error"]
    assert re.search(message, error["message"]) and error["type"]
    assert client.completions.create(**GREEDY).choices[0].text


def test_a_body_that_does_not_arrive_times_out(server, client):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = request_bytes("POST", "/v1/completions", b"x" * 100)
        connection.sendall(head[:-50])
        assert client.completions.create(**GREEDY).choices[0].text
        connection.settimeout(20)
        assert b"408" in connection.recv(100)


def test_requests_without_the_key_or_the_route_are_refused(server):
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        server.client(api_key="other").completions.create(**GREEDY)
    status, body = http(server, "GET", "/v1/nothing")
    assert status == 404 and "Not Found" in json.loads(body)["error"]["message"]
    status, body = http(server, "GET", "/v1/completions")
    assert status == 405 and json.loads(body)["error"]["type"] == "invalid_request_error"


def request_bytes(method: str, path: str, body: bytes = b"") -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1", "Host: test", "Authorization: Bearer secret",
        f"Content-Length: {len(body)}", "Connection: close", "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + body


def http(server, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Returns status and body of a response, without a client's checks."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request_bytes(method, path, body))
        data = b""
        while part := connection.recv(65536):
            data += part
    head, _, content = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), content
