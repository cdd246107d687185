"""`btlm serve` as a process: it listens, answers, and drains on SIGTERM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from btlm_jax import generate
from btlm_jax.cli import main
from btlm_jax.generation.detokenize import detokenize_continuation

openai = pytest.importorskip("openai")


def test_a_checkpoint_is_served_until_sigterm(bytes_checkpoint, of_bytes):
    argv = ("serve", bytes_checkpoint, "--port", "0", "--rows", "2", "--max-length", "64")
    process = subprocess.Popen(
        [sys.executable, "-m", "btlm_jax.cli", *argv, "--api-key", "k", "--name", "bytes"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        (url,) = re.findall(r"serving bytes at (http://127.0.0.1:\d+/v1)", line)
        client = openai.OpenAI(base_url=url, api_key="k", max_retries=0)
        prompt = dict(model="bytes", prompt="the quick", temperature=0)
        stream = client.completions.create(**prompt, max_tokens=30, stream=True)
        pieces = [next(iter(stream))]
        process.send_signal(signal.SIGTERM)
        pieces += list(stream)
        assert process.wait(30) == 0
    finally:
        process.kill()
    model, params, tokenizer = of_bytes
    ids = tokenizer.encode("the quick").ids
    tokens = generate(model, params, [ids], max_new_tokens=30)[0, len(ids) :].tolist()
    text = "".join(piece.choices[0].text for piece in pieces)
    assert text == detokenize_continuation(tokenizer, ids, tokens)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--rows", "0"], "--rows: found 0"),
        (["--chat-template", "no.jinja"], "no.jinja"),
        (["--host", "203.0.113.1"], "--host and --port: cannot listen at 203.0.113.1:8000"),
        (["--port", "70000"], "--host and --port: cannot listen at 127.0.0.1:70000"),
        (["--api-key", ""], "--api-key (or BTLM_API_KEY): found an empty key"),
        (["--max-requests", "0"], "--max-requests: found 0"),
        (["--max-length", "1"], "--max-length: found 1"),
    ],
)
def test_bad_arguments_are_named(bytes_checkpoint, capsys, argv, message):
    assert main(["serve", str(bytes_checkpoint), *argv]) == 2
    assert message in capsys.readouterr().err
