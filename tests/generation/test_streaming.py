"""Streams yield the tokens of `generate` while they are generated."""

from __future__ import annotations

import gc
import weakref

import jax
import numpy as np
import pytest

from btlm_jax import generate, stream
from btlm_jax.generation import row_batch, sample_loop
from btlm_jax.model import kv_cache
from btlm_jax.utils.compile_cache import count_compilations

PROMPT = np.array([72, 101, 108])


@pytest.mark.parametrize(
    "options",
    [
        dict(max_new_tokens=12, eos_token_id=None, repetition_penalty=1.3),
        dict(max_length=20, do_sample=True, eos_token_id=list(range(20))),
    ],
    ids=["greedy", "sampled"],
)
def test_tokens_are_those_of_generate(of_bytes, options):
    model, params, _ = of_bytes
    lengths = set()
    for seed in range(4) if options.get("do_sample") else [0]:
        expected = generate(model, params, PROMPT[None], seed=seed, **options)[0, 3:]
        for chunk in (1, 5):
            tokens = list(stream(model, params, PROMPT, chunk=chunk, seed=seed, **options))
            assert tokens == expected.tolist() and all(type(t) is int for t in tokens)
        lengths.add(len(tokens))
    assert len(lengths) > 1 or not options.get("do_sample")  # some end early


def test_text_ends_with_a_stop_string(of_bytes):
    model, params, tokenizer = of_bytes
    options = dict(
        max_new_tokens=20, do_sample=True, top_k=0, eos_token_id=None, tokenizer=tokenizer
    )
    free = generate(model, params, PROMPT[None], **options)[0, 3:].tolist()
    text = "".join(stream(model, params, PROMPT, **options))
    assert text == tokenizer.decode(free)
    stop = next(c for c in text if c.isascii() and c.isprintable())
    pieces = list(stream(model, params, PROMPT, stop_strings=stop, **options))
    assert "".join(pieces) == text[: text.index(stop) + 1] and pieces[-1].endswith(stop)


def test_a_running_stream_compiles_nothing_until_its_cache_grows(of_bytes, monkeypatch):
    model, params, _ = of_bytes
    options = dict(max_new_tokens=30, eos_token_id=None)
    expected = list(stream(model, params, PROMPT, **options))
    tokens = stream(model, params, PROMPT[:2], **options)
    next(tokens)
    with count_compilations() as compiled:
        list(tokens)
    assert compiled.count == 0
    monkeypatch.setattr(row_batch, "INITIAL_SLOTS", 8)
    capacities, resized = [], kv_cache.resized

    def record_capacity(cache, capacity):
        capacities.append(capacity)
        return resized(cache, capacity)

    monkeypatch.setattr(kv_cache, "resized", record_capacity)
    assert list(stream(model, params, PROMPT, chunk=3, **options)) == expected
    assert capacities == [16, 32]


def test_the_next_step_is_dispatched_before_the_last_token_is_fetched(of_bytes, monkeypatch):
    model, params, _ = of_bytes
    events, advance, fetch = [], sample_loop.advance_loop, jax.device_get
    monkeypatch.setattr(
        sample_loop, "advance_loop", lambda *a: events.append("step") or advance(*a)
    )
    monkeypatch.setattr(jax, "device_get", lambda x: events.append("fetch") or fetch(x))
    tokens = stream(model, params, PROMPT, max_new_tokens=8, eos_token_id=None)
    next(tokens), next(tokens)
    assert events == ["step", "fetch"] * 2


def test_closing_a_stream_frees_it(of_bytes):
    model, params, tokenizer = of_bytes
    for interrupt in (False, True):
        pieces = stream(model, params, PROMPT, tokenizer=tokenizer, eos_token_id=None)
        next(pieces)
        reference = weakref.ref(pieces)
        if interrupt:
            with pytest.raises(KeyboardInterrupt):
                for _ in pieces:
                    raise KeyboardInterrupt
        else:
            pieces.close()
            assert list(pieces) == []
        del pieces
        gc.collect()
        assert reference() is None


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        (PROMPT, dict(num_beams=2), "num_beams: found 2, expected 1"),
        (PROMPT, dict(do_sample=True, num_return_sequences=2), "num_return_sequences: found 2"),
        (np.array([[1, 2], [3, 4]]), {}, r"input_ids: found shape \(2, 2\).* generate_batch"),
        (PROMPT, dict(chunk=0), "chunk: found 0"),
        (PROMPT, dict(num_beam=2), "did you mean num_beams"),
        (PROMPT, dict(prompt_cache=3), "prompt_cache: found it in a stream"),
        (PROMPT[:0], {}, "prompt 0: .*no empty prompt"),
        (PROMPT, dict(max_length=3), "prompt 0: max_length: found 3"),
    ],
)
def test_bad_arguments_are_named_before_the_first_token(of_bytes, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        stream(*of_bytes[:2], prompt, **options)
