"""Runs the commands of `benchmarks.toml`, and writes their output as Markdown."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import importlib.resources
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from etils import epath

from btlm_jax.utils import atomic
from btlm_jax.utils.local_paths import local_path

logger = logging.getLogger(__name__)

_HEADER = """# Benchmarks

`btlm bench all` wrote this page: it ran every command below in its own process, and repeats them on
your machine. Machines are noisy, so compare the ratios: both sides of each were measured in turn in
one run. [Performance](performance.md) explains the numbers.
"""
_PREPARED = ".prepared"
# In the commands, `btlm` and `python` are those of this process.
_SHELL = 'btlm() { "$BTLM_PYTHON" -m btlm_jax.cli "$@"; }; python() { "$BTLM_PYTHON" "$@"; }\n'


@dataclasses.dataclass(frozen=True)
class BenchmarkSection:
    """A section of the page: Bash commands, which run in the section's own folder.

    Attributes:
      title: its unique heading.
      description: Markdown above the output.
      commands: commands whose output is shown.
      prepare: a script that runs first; its output is not shown.
      pictures: files that the commands write and the page shows.
      platform: where the section runs; None is everywhere.
    """

    title: str
    description: str
    commands: tuple[str, ...]
    prepare: str = ""
    pictures: tuple[str, ...] = ()
    platform: Literal["cpu", "accelerator"] | None = None

    @property
    def folder(self) -> str:
        """Returns the name of the folder that the commands run in."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def load_sections(platform: str) -> list[BenchmarkSection]:
    """Returns the sections of `benchmarks.toml` for "cpu", "gpu" or "tpu", in its order."""
    resource = importlib.resources.files("btlm_jax.train.bench").joinpath("benchmarks.toml")
    sections = []
    for table in tomllib.loads(resource.read_text("utf-8"))["section"]:
        lists = {name: tuple(table.get(name, ())) for name in ("commands", "pictures")}
        sections.append(BenchmarkSection(**(table | lists)))
    kind = "cpu" if platform == "cpu" else "accelerator"
    return [section for section in sections if section.platform in (None, kind)]


def bench_all(*, file: Path, only: tuple[str, ...] = (), work: Path | None = None) -> None:
    """Runs all benchmarks of this kind of machine, and writes their output as Markdown.

    Each command runs in a process. The file is written again after each section; sections that are
    not run stay as they are. If a command fails, its error is written, and the other sections run.
    All sections take hours on two cores; on accelerators they include btlm-3b-8k at 2k and 8k
    tokens, beside the rates published for MPT-3B.

    Args:
      file: the page, new or written by an earlier call, one per machine. Pictures are written
        beside it.
      only: run a section, by the beginning of its title; may be repeated. By default all run.
      work: directory for the files of the commands. Its preparations are not repeated, and commands
        that can resume do so. By default a temporary one.

    Raises:
      FileNotFoundError: the directory of `file` does not exist.
      ValueError: `file` was not written by this function, `only` matches no section, or a command
        failed (its error is in the file).
    """
    file = local_path(file, "file")
    work = None if work is None else local_path(work, "work")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent}: no such directory; make it first")
    machine = _describe_machine()
    sections = load_sections(machine["platform"])
    texts = read_section_texts(file, [section.title for section in sections])
    failed = []
    with tempfile.TemporaryDirectory(prefix="btlm-bench-") as temporary:
        root = work or Path(temporary)
        for section in _select_sections(sections, only):
            logger.info("%s", section.title)
            folder = root / section.folder
            folder.mkdir(parents=True, exist_ok=True)
            conditions = _format_conditions(machine)
            text, succeeded = _run_section(section, folder.resolve(), file.parent, conditions)
            texts[section.title] = text
            if not succeeded:
                failed.append(section.title)
            page = [_HEADER, *(texts[s.title] for s in sections if s.title in texts)]
            atomic.write_text(epath.Path(file), "\n".join(page))
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}; the errors and other results are in {file}")


def read_section_texts(file: Path, titles: Sequence[str]) -> dict[str, str]:
    """Returns the text of every section in a page by title; none if the file does not exist.

    Raises:
      ValueError: the file was not written by `bench_all`, or has a section with another title.
    """
    if not file.exists():
        return {}
    page = file.read_text("utf-8")
    if not page.startswith(_HEADER):
        raise ValueError(
            f"{file}: found a file that `btlm bench all` has not written, expected a new name or "
            "one of its files"
        )
    texts: dict[str, str] = {}
    for text in re.split(r"^(?=## )", page.removeprefix(_HEADER), flags=re.MULTILINE)[1:]:
        title = text.partition("\n")[0].removeprefix("## ")
        if title not in titles:
            raise ValueError(
                f"{file}: found the section {title!r}, expected those of this kind of machine: "
                f"{', '.join(titles)}; one file holds one machine"
            )
        texts[title] = text.rstrip("\n") + "\n"
    return texts


def _select_sections(
    sections: Sequence[BenchmarkSection], only: Sequence[str]
) -> list[BenchmarkSection]:
    selected = []
    for prefix in only:
        matches = [s for s in sections if s.title.lower().startswith(prefix.lower())]
        if not matches:
            titles = ", ".join(repr(s.title) for s in sections)
            raise ValueError(f"only: found {prefix!r}, expected the beginning of one of {titles}")
        selected += matches
    return [s for s in sections if s in selected] if only else list(sections)


def _run_section(
    section: BenchmarkSection, folder: Path, pictures: Path, conditions: str
) -> tuple[str, bool]:
    """Runs a section; returns its Markdown, and whether all commands succeeded.

    Args:
      section: the section.
      folder: where its commands run.
      pictures: the directory that pictures are copied to.
      conditions: the last line.
    """
    text = [f"## {section.title}\n", section.description.strip() + "\n"]
    if section.prepare:
        text.append(f"```bash\n{section.prepare.strip()}\n```\n")
        marker = folder / _PREPARED
        checksum = hashlib.sha256(section.prepare.encode()).hexdigest()
        if not (marker.exists() and marker.read_text() == checksum):
            lines, succeeded = _run_script(section.prepare, folder)
            if not succeeded:
                return "\n".join([*text, _console_block(["...", *lines]), conditions]), False
            marker.write_text(checksum)
    output, succeeded = [], True
    for command in section.commands:
        start = time.monotonic()
        lines, succeeded = _run_script(command, folder)
        output += ["$ " + command.strip(), *lines, f"({time.monotonic() - start:,.0f} s)"]
        if not succeeded:
            break
    text.append(_console_block(output))
    for name in section.pictures if succeeded else ():
        picture = pictures / Path(name).name
        shutil.copyfile(folder / name, picture)
        text.append(f"![{section.title}]({picture.name})\n")
    return "\n".join([*text, conditions]), succeeded


def _console_block(lines: Sequence[str]) -> str:
    return "```console\n" + "\n".join(lines) + "\n```\n"


def _run_script(script: str, folder: Path) -> tuple[list[str], bool]:
    """Runs Bash and passes its output on as it comes.

    Returns:
      The lines for the page, and whether the script succeeded. After a failure, the lines end with
      its exit code and the end of its standard error.
    """
    env = os.environ | {"BTLM_PYTHON": sys.executable}
    lines: list[str] = []
    errors: deque[str] = deque(maxlen=3)
    with subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", _SHELL + script], cwd=folder, env=env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        thread = threading.Thread(target=_echo_lines, args=(process.stderr, sys.stderr, errors))
        thread.start()
        _echo_lines(process.stdout, sys.stdout, lines)
        thread.join()
    if process.returncode:
        lines += [f"FAILED with exit code {process.returncode}", *errors]
    return lines, process.returncode == 0


def _echo_lines(source, target, lines: list[str] | deque[str]) -> None:
    for line in source:
        print(line, end="", file=target, flush=True)
        lines.append(line.rstrip())


def _describe_machine() -> dict[str, Any]:
    """Returns `measure.measurement_conditions` from a process that ends, and so frees a TPU."""
    script = (
        "import json; from btlm_jax.train.bench import measure; "
        "print(json.dumps(measure.measurement_conditions()))"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def _format_conditions(machine: dict[str, Any]) -> str:
    versions = [f"Python {machine['python']}", *_versions("jax", "libtpu", "torch", "lm-eval")]
    load = f", load {os.getloadavg()[0]:.1f} when it began" if hasattr(os, "getloadavg") else ""
    return (
        f"*{machine['devices']} x {machine['device']}, {machine['cores']} CPU cores; "
        f"{', '.join(versions)}; {datetime.date.today().isoformat()}{load}.*\n"
    )


def _versions(*packages: str) -> Iterator[str]:
    for name in packages:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"no {name}"
