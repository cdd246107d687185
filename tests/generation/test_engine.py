"""An engine gives every request the tokens it gets alone, whatever arrives or leaves beside it."""

from __future__ import annotations

from random import Random

import jax
import numpy as np
import pytest

from btlm_jax import Engine, generate, make_mesh
from btlm_jax.generation import running_batch
from btlm_jax.generation.engine import EngineFull
from btlm_jax.utils.compile_cache import count_compilations
from support import golden

PROMPTS = [
    np.random.default_rng(n).integers(0, 256, size=n).tolist() for n in (3, 30, 17, 5, 62, 40, 9)
]
# Requests with different rules share a batch.
OPTIONS = [
    dict(max_new_tokens=9),
    dict(max_new_tokens=14, do_sample=True, top_k=0, eos_token_id=list(range(40))),
    dict(max_new_tokens=7, do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.3),
    dict(max_new_tokens=11, no_repeat_ngram_size=2, logit_bias={7: 2.0}, min_new_tokens=3),
]


@pytest.fixture(scope="module")
def alone(of_bytes):
    """Returns a function that generates one request's tokens and log-probabilities."""
    model, params, _ = of_bytes
    known = {}

    def tokens_alone(i: int, j: int):
        if (i, j) not in known:
            options = OPTIONS[j] | dict(seed=[(i, j)], return_dict_in_generate=True)
            output = generate(model, params, [PROMPTS[i]], **options)
            known[i, j] = output.sequences[0, len(PROMPTS[i]) :], output.logprobs[0]
        return known[i, j]

    return tokens_alone


def new_engine(model, params, **sizes) -> Engine:
    """Returns an engine that has used the rules of all requests, so that tests share programs."""
    engine = Engine(model, params, **dict(rows=3, max_length=128, chunk=16) | sizes)
    for j in range(len(OPTIONS)):
        submit(engine, 0, j).result()
    return engine


def submit(engine, i, j):
    return engine.submit(PROMPTS[i], seed=[(i, j)], **OPTIONS[j])


def check(handle, expected):
    tokens, logprobs = expected
    result = handle.result()
    np.testing.assert_array_equal(result.tokens, tokens)
    np.testing.assert_allclose(result.logprobs, logprobs, atol=1e-4)


@pytest.mark.parametrize("prefix_bytes", [0, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_requests_that_come_and_go_get_the_tokens_they_get_alone(
    of_bytes, alone, seed, prefix_bytes
):
    r, running, expected = Random(seed), [], {}
    engine = new_engine(*of_bytes[:2], prefix_cache_bytes=prefix_bytes, steps=1 + seed % 2)
    while len(expected) < 12 or engine.step():
        if len(expected) < 12 and r.random() < 0.5:
            i, j = r.randrange(len(PROMPTS)), r.randrange(len(OPTIONS))
            handle = submit(engine, i, j)
            running.append(handle)
            expected[handle] = i, j
        if running and r.random() < 0.1:
            engine.cancel(running.pop(r.randrange(len(running))))
        engine.step()
    assert engine.num_running == engine.num_waiting == 0
    cancelled = [handle for handle in expected if handle.finish_reason == "cancelled"]
    assert len(cancelled) < 8
    for handle, (i, j) in expected.items():
        tokens, logprobs = alone(i, j)
        if handle in cancelled:
            np.testing.assert_array_equal(handle.tokens, tokens[: len(handle.tokens)])
        else:
            check(handle, (tokens, logprobs))


def test_a_mesh_gives_the_same_tokens(of_bytes, alone):
    model = of_bytes[0]
    mesh = make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])
    sharded = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(0), mesh=mesh))
    engine = Engine(model, sharded, rows=3, max_length=128, chunk=16)
    requests = [(1, 1), (4, 0), (2, 1), (1, 0), (0, 0), (6, 1)]
    handles = [submit(engine, i, j) for i, j in requests]
    for handle, request in zip(handles, requests, strict=True):
        check(handle, alone(*request))


def test_running_rows_wait_for_one_chunk_of_a_long_prompt(of_bytes):
    engine = Engine(*of_bytes[:2], rows=3, max_length=256, chunk=16)
    first = engine.submit(PROMPTS[0], max_new_tokens=50, eos_token_id=None)
    engine.step()
    long = engine.submit(np.arange(160) % 256, max_new_tokens=3)
    counts = []
    while not long.tokens:
        engine.step()
        counts.append(len(first.tokens))
    assert len(counts) >= 10 and set(np.diff(counts)) == {1}


def test_a_beginning_that_prompts_share_is_read_once(of_bytes, monkeypatch):
    model, params, _ = of_bytes
    engine = Engine(model, params, rows=3, max_length=256, chunk=16)
    system = np.random.default_rng(0).integers(0, 256, 100).tolist()
    for tail in ([1, 2, 3], [1, 2, 4, 5], [9] * 40):
        prompt = system + tail
        expected = generate(model, params, [prompt], max_new_tokens=5, eos_token_id=None)[0]
        before = engine.prefixes.hits
        result = engine.submit(prompt, max_new_tokens=5, eos_token_id=None).result()
        np.testing.assert_array_equal(result.tokens, expected[len(prompt) :])
        assert engine.prefixes.hits - before in (0, 100, 102)
    assert engine.prefixes.hits == 202 and 0 < engine.prefixes.nbytes <= engine.prefixes.max_bytes


def test_a_request_can_be_cancelled_while_its_prompt_is_read(of_bytes):
    engine = Engine(*of_bytes[:2], rows=3, max_length=256, chunk=16)
    long = engine.submit(np.arange(160) % 256, max_new_tokens=3)
    engine.step()
    assert engine.num_waiting == 1
    engine.cancel(long)
    assert engine.num_waiting == 0 and list(long) == [] and long.finish_reason == "cancelled"
    assert len(engine.submit([1, 2], max_new_tokens=2, eos_token_id=None).result().tokens) == 2


def test_a_failure_while_a_row_starts_leaves_the_others_as_they_were(of_bytes, alone, monkeypatch):
    engine = Engine(*of_bytes[:2], rows=3, max_length=128, chunk=16, prefix_cache_bytes=0)
    first = submit(engine, 0, 0)
    engine.step()
    start = running_batch.start_rows

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(running_batch, "start_rows", fail)
    second = submit(engine, 3, 0)
    with pytest.raises(MemoryError):
        engine.step()
    monkeypatch.setattr(running_batch, "start_rows", start)
    check(first, alone(0, 0))
    check(second, alone(3, 0))


def test_a_full_queue_pushes_back(of_bytes):
    engine = Engine(*of_bytes[:2], rows=1, max_length=64, queue_size=2)
    handles = [engine.submit([1, 2], max_new_tokens=2, eos_token_id=None) for _ in range(2)]
    with pytest.raises(EngineFull, match="2 requests are waiting"):
        engine.submit([1, 2], block=False, max_new_tokens=2)
    handles.append(engine.submit([1, 2], max_new_tokens=2, eos_token_id=None))  # takes steps
    assert handles[0].tokens and [len(list(handle)) for handle in handles] == [2, 2, 2]


def test_stop_strings_end_requests_on_their_own(of_bytes):
    model, params, tokenizer = of_bytes
    options = dict(max_new_tokens=20, do_sample=True, top_k=0, eos_token_id=None, seed=[(5, 0)])
    free = generate(model, params, [PROMPTS[0]], **options)[0, 3:].tolist()
    n = next(n for n in range(2, 20) if tokenizer.decode([free[n]]).isascii())
    end = free.index(free[n]) + 1
    engine = Engine(model, params, rows=2, max_length=64)
    stop = tokenizer.decode([free[n]])
    handle = engine.submit(PROMPTS[0], stop_strings=stop, tokenizer=tokenizer, **options)
    other = engine.submit(PROMPTS[0], **options)
    assert list(handle) == free[:end] and handle.finish_reason == "stop"
    assert list(other) == free and other.finish_reason == "length"


def test_other_values_and_prompts_compile_nothing(of_bytes):
    engine = Engine(*of_bytes[:2], rows=2, max_length=64)

    def run(seed):
        r = Random(seed)
        handles = [
            engine.submit(
                [r.randrange(256) for _ in range(r.randint(1, 30))],
                max_new_tokens=r.randint(1, 20), do_sample=True,
                temperature=r.uniform(0.5, 2), top_k=r.randint(1, 90),
                repetition_penalty=r.uniform(1.1, 2), eos_token_id=[r.randrange(256)], seed=seed,
            )
            for _ in range(3)
        ]  # fmt: skip
        for handle in handles:
            handle.result()

    run(0)
    with count_compilations() as compilations:
        for seed in range(1, 6):
            run(seed)
    assert compilations.count == 0


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([], {}, "prompt: input_ids: found shape"),
        ([1, 258], {}, "prompt: input_ids: found ids from 1 to 258"),
        ([1] * 40, dict(max_new_tokens=30), "prompt: found 40 tokens and 30 new ones, expected at"),
        ([1], dict(num_beams=2), "num_beams: found 2, expected 1: an engine runs single rows"),
        ([1], dict(do_sample=True, num_return_sequences=2), "num_return_sequences: found 2"),
        ([1], dict(logits_processor=lambda *x: x[2]), "logits_processor: found it in a request"),
        ([1], dict(cache_dtype="int8"), "cache_dtype: found it in a request"),
        ([1], dict(temprature=2), "did you mean temperature"),
    ],
)
def test_bad_requests_are_named_and_leave_the_engine_usable(of_bytes, prompt, options, message):
    engine = Engine(*of_bytes[:2], rows=1, max_length=64)
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, **options)
    assert engine.num_waiting == 0


@pytest.mark.parametrize("name", ["rows", "chunk", "steps", "queue_size", "max_length"])
def test_bad_sizes_are_named(of_bytes, name):
    with pytest.raises(ValueError, match=f"{name}: found 0, expected >= "):
        Engine(*of_bytes[:2], **{name: 0})


def test_a_prompt_that_nearly_fills_its_row_after_a_shared_beginning(of_bytes):
    """The padding of its last chunk needs more slots than the row has tokens."""
    model, params, _ = of_bytes
    engine = Engine(model, params, rows=3, max_length=128, chunk=64)
    ids = np.random.default_rng(1).integers(0, 256, 126).tolist()
    for prompt in (ids[:120], ids):
        expected = generate(model, params, [prompt], max_new_tokens=2, eos_token_id=None)[0]
        handle = engine.submit(prompt, max_new_tokens=2, eos_token_id=None)
        assert list(handle) == expected[len(prompt) :].tolist()
    assert engine.prefixes.hits == 120


def test_dynamic_scales_are_those_of_the_whole_prompt():
    c = golden.load("e_alibi_dynamic16")
    engine = Engine(c.model, c.params, rows=2, max_length=64, chunk=8)
    prompt = (c["gen/prompt"][0].tolist() * 8)[:30]
    for _ in range(2):
        expected = generate(c.model, c.params, [prompt], max_new_tokens=6, eos_token_id=None)[0]
        handle = engine.submit(prompt, max_new_tokens=6, eos_token_id=None)
        assert list(handle) == expected[30:].tolist()
    assert engine.prefixes.hits == 0
