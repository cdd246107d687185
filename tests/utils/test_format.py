"""Amounts of bytes, aligned columns, and values for JSON."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btlm_jax import cli
from btlm_jax.utils.format import align_columns, finite_json, format_bytes, parse_bytes


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1048576", 1 << 20),
        ("7B", 7),
        ("512MiB", 512 << 20),
        ("5GB", 5 * 10**9),  # decimal, as in Hugging Face's options
        ("1.5 GiB", 3 << 29),
        ("  2 TiB ", 2 << 40),
        ("3kB", 3000),
        ("3KB", 3000),
        ("3kib", 3072),
        ("0.5KiB", 512),
        ("1TB", 10**12),
    ],
)
def test_amounts_of_bytes_are_parsed(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", " ", "MiB", "12parsecs", "5G", "1 2", "-5", "+5", "1e9", "0x10", "0", "0MiB", "0.1", "?"]
    + ["5 ?", "1.GB", ".5GB", "1,5GB", "5GBB", "nan", "inf", "1 GiB extra", "5\nGB\nx"],
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="expected an amount of bytes such as 512MiB") as error:
        parse_bytes(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    "n, expected",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 << 20, "1.5 GiB"),
        (5 * 10**9, "4.7 GiB"),
        (3 << 40, "3.0 TiB"),
        (1 << 50, "1024.0 TiB"),
        (0.4, "0 B"),
    ],
)
def test_bytes_are_formatted_with_binary_prefixes(n, expected):
    assert format_bytes(n) == expected


@given(st.integers(1, 1 << 52), st.sampled_from(["", " "]))
def test_formatted_bytes_can_be_parsed(n, space):
    formatted = format_bytes(n).replace(" ", space)
    assert parse_bytes(formatted) == pytest.approx(n, rel=0.051)  # one decimal of at least 1.0
    assert parse_bytes(str(n)) == parse_bytes(f"{n}B") == n


def test_decimals_are_parsed_exactly():
    for n in range(1000, 10_000):
        assert parse_bytes(f"{n / 1000:.3f}kB") == n


@pytest.mark.parametrize("command", ["convert", "export", "verify"])
def test_the_command_line_refuses_other_texts_without_traceback(capsys, command):
    with pytest.raises(SystemExit) as error:
        cli.main([command, "a", "b", "--max-memory", "12parsecs"])
    out = capsys.readouterr()
    assert error.value.code == 2 and "Traceback" not in out.out + out.err
    text = " ".join((out.out + out.err).replace("│", " ").split())
    assert "max-memory" in text and "12parsecs" in text
    assert "expected an amount of bytes such as 512MiB, 5GB, 1048576" in text


def test_a_budget_below_one_block_is_refused_with_the_minimum(capsys, checkpoint_dir):
    code = cli.main(["verify", str(checkpoint_dir), "--max-memory", "1kB"])
    assert code == 2 and "--max-memory: found 1000 B, expected at least" in capsys.readouterr().err
    assert cli.main(["verify", str(checkpoint_dir), "--max-memory", "80MiB"]) == 0


def test_defaults_in_help_can_be_parsed(capsys):
    with pytest.raises(SystemExit):
        cli.main(["export", "--help"])
    out = capsys.readouterr().out
    assert "512.0MiB" in out and parse_bytes("512.0MiB") == 512 << 20


ROWS = [("", "n"), ("long name", "1"), ("b", "1,000")]


def test_first_column_is_left_aligned_and_others_right_aligned():
    assert align_columns(ROWS) == ["               n", "long name      1", "b          1,000"]


def test_alignment_of_the_last_given_column_applies_to_further_columns():
    assert align_columns(ROWS, "<") == ["           n", "long name  1", "b          1,000"]
    assert align_columns([("a", "b", "c"), ("aa", "bb", "cc")], "><") == [" a  b   c", "aa  bb  cc"]


def test_rows_of_different_lengths_are_refused():
    with pytest.raises(ValueError):
        align_columns([("a", "b"), ("c",)])


def test_numbers_that_are_not_finite_become_null():
    values = {"a": [1.5, float("nan"), (float("inf"), "x")], "b": {"c": -float("inf"), "d": 2}}
    assert finite_json(values) == {"a": [1.5, None, [None, "x"]], "b": {"c": None, "d": 2}}
