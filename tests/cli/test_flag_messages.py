"""Messages about arguments name the options of the command."""

from __future__ import annotations

import logging

import pytest

from btlm_jax import cli
from btlm_jax.cli.flag_messages import notices_with_options, option_names, with_options

OPTIONS = {"do_sample": "sample"} | {
    name: name for name in ("max_length", "temperature", "overwrite", "on_error", "dtype")
}


@pytest.mark.parametrize(
    "message, expected",
    [
        ("max_length: found 3", "--max-length: found 3"),
        ("in.jsonl:1: max_length: found 3", "in.jsonl:1: --max-length: found 3"),
        ("set do_sample=True or num_beams", "set --sample or num_beams"),
        ("temperature=0.5 does nothing", "--temperature 0.5 does nothing"),
        ("temperature: found 0.0, expected > 0", "--temperature: found 0.0, expected > 0"),
        ("at this temperature, the words max_lengths and --max-length", None),
        ("runs/max_length/x.json: damaged", None),
        ("the temperature: found 3", None),
        (
            "c exists: pass overwrite=True. Pass on_error='skip', or dtype=",
            "c exists: pass --overwrite. Pass --on-error skip, or --dtype",
        ),
    ],
)
def test_arguments_become_options_and_words_stay(message, expected):
    assert with_options(message, OPTIONS) == (expected or message)


def test_notices_of_a_block_are_translated():
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    package = logging.getLogger("btlm_jax")
    package.addHandler(handler)
    try:
        with notices_with_options(OPTIONS):
            package.warning("%s does nothing", "do_sample=True")
        package.warning("do_sample=True")
    finally:
        package.removeHandler(handler)
    assert records == ["--sample does nothing", "do_sample=True"]


def test_options_are_those_of_the_command_or_its_subcommand():
    generate = option_names(cli.parse_command(["generate", "ck", "--prompt", "a"]))
    assert generate["bad_words_ids"] == "bad_words" and "prompt" not in generate
    perplexity = option_names(cli.parse_command(["eval", "perplexity", "ck", "--text", "a"]))
    assert "on_error" in perplexity and "do_sample" not in perplexity
    convert = option_names(cli.parse_command(["convert", "a", "b"]))
    advice = "max_memory: found 1 B; pass on_error='skip', or max_size"
    assert with_options(advice, convert) == f"--max-memory{advice.removeprefix('max_memory')}"
    assert option_names(None) == {} and with_options("pass dtype=", {}) == "pass dtype="
