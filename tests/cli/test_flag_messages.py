"""Messages about arguments name the options of the command."""

from __future__ import annotations

import logging

import pytest

from btlm_jax.cli.flag_messages import messages_with_flags, with_flags

FLAGS = {"do_sample": "sample", "max_length": "max_length", "temperature": "temperature"}


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
    ],
)
def test_arguments_become_flags_and_words_stay(message, expected):
    assert with_flags(message, FLAGS) == (expected or message)


def test_errors_and_notices_of_a_block_are_translated():
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    package = logging.getLogger("btlm_jax")
    package.addHandler(handler)
    try:
        with (
            pytest.raises(ValueError, match=r"^--max-length: found 3"),
            messages_with_flags(["max_length"], {"do_sample": "sample"}),
        ):
            package.warning("%s does nothing", "do_sample=True")
            raise ValueError("max_length: found 3")
        package.warning("do_sample=True")
    finally:
        package.removeHandler(handler)
    assert records == ["--sample does nothing", "do_sample=True"]
