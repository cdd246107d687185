"""`pipeline` behaves as transformers' text-generation pipeline."""

from __future__ import annotations

import numpy as np
import pytest

from btlm_jax import generate, pipeline
from btlm_jax.generation.pipeline import TextGeneration

PROMPT = "Albert Einstein was known for "


@pytest.fixture(scope="module")
def pipe(bytes_checkpoint):
    return pipeline(bytes_checkpoint)


def test_the_model_card_examples_give_the_text_of_generate(pipe, of_bytes):
    model, params, tokenizer = of_bytes
    ids = np.array([tokenizer.encode(PROMPT).ids])

    def text(tokens):
        return tokenizer.decode(tokens.tolist())

    greedy = dict(max_length=50, do_sample=False, no_repeat_ngram_size=2)
    (answer,) = pipe(PROMPT, **greedy)
    assert answer == {"generated_text": text(generate(model, params, ids, **greedy)[0])}
    beams = dict(num_beams=5, max_new_tokens=8, early_stopping=True, no_repeat_ngram_size=2)
    (answer,) = pipe(PROMPT, **beams)
    assert answer == {"generated_text": text(generate(model, params, ids, **beams)[0])}


def test_lists_of_prompts_give_lists_of_answers(pipe):
    options = dict(max_new_tokens=4, do_sample=True, num_return_sequences=2, seed=1)
    short_answers = pipe(["Hello", "Hé"], return_full_text=False, batch_size=3, **options)
    assert [len(answers) for answers in short_answers] == [2, 2]
    full_answers = pipe(("Hello", "Hé"), **options)
    for prompt, short, full in zip(("Hello", "Hé"), short_answers, full_answers, strict=True):
        for a, b in zip(short, full, strict=True):
            assert b["generated_text"] == prompt + a["generated_text"]
    assert pipe([]) == []


def test_stop_strings_end_the_text(pipe):
    (free,) = pipe("Hello", max_new_tokens=20, do_sample=True, return_full_text=False)
    stop = next(c for c in free["generated_text"] if c.isascii())
    (answer,) = pipe(
        "Hello", max_new_tokens=20, do_sample=True, return_full_text=False, stop_strings=stop
    )
    text = free["generated_text"]
    assert answer["generated_text"] == text[: text.index(stop) + 1]


def test_weights_in_memory_give_the_same_text(of_bytes, pipe):
    assert TextGeneration(*of_bytes)("Hi", max_new_tokens=3) == pipe("Hi", max_new_tokens=3)


def test_dtype_is_the_compute_dtype(bytes_checkpoint):
    assert pipeline(bytes_checkpoint, dtype="bfloat16").model.compute_dtype == "bfloat16"


@pytest.mark.parametrize(
    "text_inputs, options, message",
    [
        ("", {}, "text_inputs: found no text, expected at least one character"),
        (["a", 3], {}, "text_inputs: found 3"),
        ("a", dict(max_lenght=3), "did you mean max_length"),
        ("a", dict(max_length=1), "prompt 0: max_length: found 1"),
    ],
)
def test_bad_arguments_are_named(pipe, text_inputs, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(text_inputs, **options)


def test_bad_checkpoints_are_refused(tmp_path, bytes_checkpoint):
    with pytest.raises(ValueError, match="task: found 'summarization'"):
        pipeline(bytes_checkpoint, task="summarization")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pipeline(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises((ValueError, FileNotFoundError), match="btlm convert"):
        pipeline(tmp_path)
