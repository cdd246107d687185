"""The page of all benchmarks: its sections, failures and conditions."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from btlm_jax import cli
from btlm_jax.train import recipe_file
from btlm_jax.train.bench import bench_all, measure
from btlm_jax.train.bench.bench_all import BenchmarkSection

MACHINE = {"platform": "cpu", "device": "cpu", "devices": 1, "cores": 2, "python": "3", "jax": "0"}


@pytest.fixture
def set_sections(monkeypatch):
    """Returns a function that replaces the sections; the machine is `MACHINE`."""
    monkeypatch.setattr(bench_all, "_describe_machine", lambda: MACHINE)
    return lambda *sections: monkeypatch.setattr(
        bench_all, "load_sections", lambda platform: list(sections)
    )


def section(title: str, *commands: str, **options) -> BenchmarkSection:
    return BenchmarkSection(title, f"About {title}.", commands, **options)


def test_output_is_written_with_its_command_and_conditions(set_sections, tmp_path, capsys):
    set_sections(
        section("One", "echo first; echo aside >&2", "python -c 'print(4)'"),
        section("Two", "cat a; cp a x.png", prepare="echo text > a", pictures=("x.png",)),
    )
    file = tmp_path / "page.md"
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
    assert "```bash\necho text > a\n```\n\n```console\n$ cat a" in text
    assert "![Two](x.png)\n" in text and (tmp_path / "x.png").read_text() == "text\n"
    out = capsys.readouterr()
    assert "first\n" in out.out and "aside\n" in out.err


def test_failures_are_written_and_other_sections_still_run(set_sections, tmp_path, capsys):
    set_sections(
        section("Broken", "echo before; btlm bench train --preset none; echo after", "echo never"),
        section("Unprepared", "echo never", prepare="echo why >&2; exit 3"),
        section("Good", "echo fine"),
    )
    file = tmp_path / "page.md"
    assert cli.main(["bench", "all", str(file)]) == 2
    text = file.read_text()
    assert "before\nFAILED with exit code 2\n" in text and "unknown preset 'none'" in text
    assert "...\nFAILED with exit code 3\nwhy\n" in text
    assert "never\n(" not in text and "after\n" not in text.replace("echo after\n", "")
    assert "fine\n" in text
    assert f"failed: Broken, Unprepared; the errors and other results are in {file}" in (
        capsys.readouterr().err
    )


def test_other_sections_and_their_order_stay_unchanged(set_sections, tmp_path):
    set_sections(section("One", "echo old"), section("Two", "echo second"))
    file = tmp_path / "page.md"
    bench_all.bench_all(file=file, only=("two",))
    assert "## One" not in file.read_text()
    bench_all.bench_all(file=file, only=("One",))
    first = file.read_text()
    assert first.index("## One") < first.index("## Two")
    set_sections(section("One", "echo new"), section("Two", "echo other"))
    bench_all.bench_all(file=file, only=("one",))
    text = file.read_text()
    assert "$ echo new\nnew\n" in text and "$ echo second\nsecond\n" in text
    assert text.count("## ") == 2 and [p.name for p in tmp_path.iterdir()] == ["page.md"]


def test_preparations_are_repeated_only_after_a_change(set_sections, tmp_path):
    work = tmp_path / "work"
    for prepare, lines in [("echo x >> a", 1), ("echo x >> a", 1), ("echo y >> a", 2)]:
        set_sections(section("A, b", "cat a", prepare=prepare))
        bench_all.bench_all(file=tmp_path / "page.md", work=work)
        assert (work / "a-b" / "a").read_text().count("\n") == lines


@pytest.mark.parametrize(
    "text, message",
    [
        ("# Mine\n", "that `btlm bench all` has not written"),
        (bench_all._HEADER + "\n## GPU\n\nx\n", "found the section 'GPU'.*one file holds one mach"),
    ],
)
def test_other_files_are_never_overwritten(set_sections, tmp_path, text, message):
    set_sections(section("One", "echo first"))
    file = tmp_path / "page.md"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        bench_all.bench_all(file=file)
    assert file.read_text() == text


def test_bad_arguments_are_refused(set_sections, tmp_path):
    set_sections(section("One", "echo first"))
    with pytest.raises(FileNotFoundError, match="missing: no such directory; make it first"):
        bench_all.bench_all(file=tmp_path / "missing" / "x.md")
    with pytest.raises(ValueError, match=r"only: found 'Tow', expected the beginning of.*'One'"):
        bench_all.bench_all(file=tmp_path / "x.md", only=("Tow",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_every_command_parses_and_every_override_is_a_field(platform):
    sections = bench_all.load_sections(platform)
    assert len({s.title for s in sections}) == len({s.folder for s in sections}) == len(sections)
    names = set()
    for s in sections:
        scripts = [s.prepare, *s.commands]
        for line in "\n".join(scripts).replace("\\\n", " ").splitlines():
            if line.strip().startswith("btlm "):
                line = re.sub(r"\$\d", "7", re.sub(r"\$\{@[^}]*\}", "", line))
                words = shlex.split(line)[1:]
                command = cli.parse_command(words)
                names.add(words[0] if words[0] != "bench" else words[1])
                for setting in getattr(command, "set", ()):
                    assert "=" in setting
                if words[0] == "compile":
                    recipe_file.load_recipe(command.recipe, command.set)
        for picture in s.pictures:
            assert "/" in picture or any(picture in command for command in s.commands)
    everywhere = {"loss", "attention", "train", "decode", "prefill", "coord-check", "transfer"}
    assert everywhere <= names
    if platform == "cpu":
        assert {"convert", "load", "eval", "collapse", "compile"} <= names


def test_the_published_page_can_be_continued():
    titles = [s.title for s in bench_all.load_sections("cpu")]
    page = Path(__file__).parents[3] / "docs" / "benchmarks.md"
    assert set(bench_all.read_section_texts(page, titles)) <= set(titles)


def test_the_machine_is_described_by_a_process_that_ends(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    machine = bench_all._describe_machine()
    assert (machine["platform"], machine["devices"]) == ("cpu", 3)
    assert machine["cores"] == os.cpu_count()
    assert machine.keys() == measure.measurement_conditions().keys()
