"""A machine, measured: commands run in processes of their own, and written down."""

from __future__ import annotations

import os
import re
import shlex

import pytest
import tyro

from btlm_jax import BTLMConfig, cli
from btlm_jax.perf import chips
from btlm_jax.train import recipe_file
from btlm_jax.train.bench import bench_all, measure
from btlm_jax.train.bench.bench_all import Part

MACHINE = {"platform": "cpu", "device": "cpu", "devices": 1, "cores": 2, "python": "3", "jax": "0"}


@pytest.fixture
def machine(monkeypatch):
    """Sets the parts; the machine is known."""
    monkeypatch.setattr(bench_all, "_machine", lambda: MACHINE)
    return lambda *parts: monkeypatch.setattr(bench_all, "parts", lambda platform: list(parts))


def part(title: str, *commands: str, **more) -> Part:
    return Part(title, f"About {title}.", commands, **more)


def test_output_is_written_with_its_command_and_conditions(machine, tmp_path, capsys):
    machine(
        part("One", "echo first; echo aside >&2", "python -c 'print(4)'"),
        part("Two", "cat made; cp made x.png", prepare="echo text > made", pictures=("x.png",)),
    )  # fmt: skip
    file = tmp_path / "found.md"
    assert cli.main(["bench", "all", str(file)]) == 0
    text = file.read_text()
    assert text.startswith("# Benchmarks\n")
    assert re.search(
        r"\n## One\n\nAbout One.\n\n```console\n\$ echo first; echo aside >&2\nfirst\n\(\d+ s\)\n"
        r"\$ python -c .*\n4\n\(\d+ s\)\n```\n\n\*1 x cpu, 2 CPU cores; Python 3, jax [\d.]+, "
        r"(no libtpu|libtpu [\d.]+), .*; 20\d\d-\d\d-\d\d, load [\d.]+ when it began.\*\n"
        r"\n## Two\n",
        text,
    )
    assert "```bash\necho text > made\n```\n\n```console\n$ cat made" in text
    assert "![Two](x.png)\n" in text and (tmp_path / "x.png").read_text() == "text\n"
    said = capsys.readouterr()
    assert "first\n" in said.out and "aside\n" in said.err


def test_failures_are_written_down_and_the_rest_goes_on(machine, tmp_path, capsys):
    machine(
        part("Broken", "echo before; btlm bench train --preset none; echo after", "echo never"),
        part("Unprepared", "echo never", prepare="echo why >&2; exit 3"),
        part("Good", "echo fine"),
    )
    file = tmp_path / "found.md"
    assert cli.main(["bench", "all", str(file)]) == 2
    text = file.read_text()
    assert "before\nFAILED with exit code 2\n" in text and "unknown preset 'none'" in text
    assert "...\nFAILED with exit code 3\nwhy\n" in text
    assert "never\n(" not in text and "after\n" not in text.replace("echo after\n", "")
    assert "fine\n" in text
    assert f"failed: Broken, Unprepared; the errors, and the rest, are in {file}" in (
        capsys.readouterr().err
    )


def test_other_sections_stay_and_the_order_is_kept(machine, tmp_path):
    machine(part("One", "echo old"), part("Two", "echo second"))
    file = tmp_path / "found.md"
    bench_all.bench_all(file, only=["two"])
    assert "## One" not in file.read_text()
    bench_all.bench_all(file, only=["One"])
    first = file.read_text()
    assert first.index("## One") < first.index("## Two")
    machine(part("One", "echo new"), part("Two", "echo other"))
    bench_all.bench_all(file, only=["one"])
    text = file.read_text()
    assert "$ echo new\nnew\n" in text and "$ echo second\nsecond\n" in text
    assert text.count("## ") == 2 and [p.name for p in tmp_path.iterdir()] == ["found.md"]


def test_preparations_are_kept_while_they_are_the_same(machine, tmp_path):
    work = tmp_path / "work"
    for prepare, lines in [("echo x >> a", 1), ("echo x >> a", 1), ("echo y >> a", 2)]:
        machine(part("A, b", "cat a", prepare=prepare))
        bench_all.bench_all(tmp_path / "found.md", work=work)
        assert (work / "a-b" / "a").read_text().count("\n") == lines


@pytest.mark.parametrize(
    "text, message",
    [
        ("# Mine\n", "that `btlm bench all` has not written"),
        (bench_all._HEADER + "\n## GPU\n\nx\n", "found the section 'GPU'.*one file holds one mach"),
    ],
)
def test_files_of_others_are_left_alone(machine, tmp_path, text, message):
    machine(part("One", "echo first"))
    file = tmp_path / "found.md"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        bench_all.bench_all(file)
    assert file.read_text() == text


def test_bad_arguments(machine, tmp_path):
    machine(part("One", "echo first"))
    with pytest.raises(FileNotFoundError, match="missing: no such directory; make it first"):
        bench_all.bench_all(tmp_path / "missing" / "x.md")
    with pytest.raises(ValueError, match=r"only: found 'Tow', expected the beginning of.*'One'"):
        bench_all.bench_all(tmp_path / "x.md", only=["Tow"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_what_is_measured_exists(platform):
    """Every command has arguments that `btlm` takes, every recipe's override a field."""
    found = bench_all.parts(platform)
    assert len({p.title for p in found}) == len({p.folder for p in found}) == len(found)
    named = set()
    for p in found:
        scripts = [p.prepare, *p.commands]
        for line in "\n".join(scripts).replace("\\\n", " ").splitlines():
            if line.strip().startswith("btlm "):
                line = re.sub(r"\$\d", "7", re.sub(r"\$\{@[^}]*\}", "", line))
                words = shlex.split(line)[1:]
                command = tyro.cli(cli.Command, args=words)
                named.add(words[0] if words[0] != "bench" else words[1])
                for setting in getattr(command, "set", ()):
                    assert "=" in setting
                if words[0] == "compile":
                    recipe_file.load_recipe(command.recipe, command.set)
        for picture in p.pictures:
            assert "/" in picture or any(picture in c for c in p.commands)
    everywhere = {"loss", "attention", "train", "decode", "prefill", "coord-check", "transfer"}
    assert everywhere <= named
    if platform == "cpu":
        assert {"convert", "load", "eval", "collapse", "compile"} <= named


def test_the_machine_is_asked_in_a_process_that_ends(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    found = bench_all._machine()
    assert (found["platform"], found["devices"], found["cores"]) == ("cpu", 3, os.cpu_count())
    assert found.keys() == measure.measurement_conditions().keys()


def test_beside_mpt(monkeypatch):
    """Of 48,200 tokens/s on an H200, by hand: 6 N and full attention, over 989 TFLOP/s."""
    from btlm_jax.train.bench import step_bench

    found = {"preset": "btlm-3b-8k", "length": 2048, "rates": {"step": 48_200.0}}
    (line,) = step_bench._beside_mpt(found)
    assert "24,100 tokens/s/GPU, MFU 43.7 % of the data sheet's peak; " in line
    assert line.endswith("here 2.00 x its tokens/s")
    monkeypatch.setattr(chips, "peak_flops", lambda kind: 989e12)
    c = BTLMConfig.preset("btlm-3b-8k")
    kernels = c.n_layer * (4 * c.n_embd**2 + 3 * c.n_embd * c.n_inner) + c.vocab_size * c.n_embd
    per_token = 6 * kernels + 12 * c.n_layer * 2048 * c.n_embd
    (line,) = step_bench._beside_mpt(found)
    assert line.endswith(f"x its tokens/s, MFU {per_token * 48_200 / 989e12:.1%}")
    assert not list(step_bench._beside_mpt(found | {"length": 512}))
    assert not list(step_bench._beside_mpt(found | {"preset": "tiny"}))
