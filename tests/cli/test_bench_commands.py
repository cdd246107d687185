"""The command `bench`: its options are the parameters of the benchmark functions."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from btlm_jax import cli
from btlm_jax.cli.bench_commands import BENCHMARKS


def parse(line: str) -> dict:
    """Returns the arguments that a command line passes to its benchmark."""
    return cli.parse_command(["bench", *line.split()]).benchmark.keywords


def test_help_lists_the_benchmarks_without_jax():
    code = """
import sys
from btlm_jax import cli
try:
    cli.main(["bench", "--help"])
except SystemExit as e:
    assert e.code == 0
assert not {"jax", "btlm_jax.train"} & set(sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    lines = [line for line in out.stdout.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in lines] == list(BENCHMARKS)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_option_has_the_default_and_help_of_its_parameter(name, capsys):
    arguments = ["page.md"] if name == "all" else []
    function = cli.parse_command(["bench", name, *arguments]).benchmark.func
    parameters = inspect.signature(function).parameters
    defaults = {k: p.default for k, p in parameters.items() if p.default is not p.empty}
    keywords = parse(" ".join([name, *arguments]))
    assert {k: keywords[k] for k in defaults} == defaults and keywords.keys() == parameters.keys()
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", name, "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and f"usage: btlm bench {name} [-h]" in out
    for parameter in parameters:
        option = {"directory": "DIR", "file": "FILE"}.get(parameter, f"--{parameter}")
        assert option.replace("_", "-") in out
    assert ("--json FILE" in out) == (name not in ("convert", "load", "all"))


def test_options_are_parsed_as_before():
    assert parse("train --dtype bfloat16 --rounds 3")["dtype"] == "bfloat16"
    assert parse("train --torch False")["torch"] is False
    assert parse("decode --batch-size 1 4 --cache-dtype int8")["batch_size"] == (1, 4)
    assert parse("prefill --length 512 2048")["length"] == (512, 2048)
    keywords = parse("convert place --max-memory 1GiB --form bin-sharded --keep")
    assert keywords["directory"] == Path("place") and keywords["max_memory"] == 1 << 30
    assert keywords["form"] == "bin-sharded" and keywords["keep"]
    keywords = parse("all page.md --only loss --only attention --work folder")
    assert keywords == dict(file=Path("page.md"), only=("loss", "attention"), work=Path("folder"))


def test_an_unknown_benchmark_is_refused(capsys):
    assert cli.main(["bench", "trian"]) == 2
    assert "bench: found 'trian', expected one of convert, load, train" in capsys.readouterr().err
