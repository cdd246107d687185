"""Measures a machine: runs what `benchmarks.toml` names, writes what it prints as Markdown."""

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

logger = logging.getLogger(__name__)

_HEADER = """# Benchmarks

Written by `btlm bench all`, which ran every command below in a process of its own; it repeats them
on your machine. Machines are noisy: compare the ratios, whose two sides were measured in turn in
one run. Why the numbers are what they are: [performance](performance.md).
"""
_PREPARED = ".prepared"
# Commands of a part run where `btlm` and `python` are those that run us.
_SHELL = 'btlm() { "$BTLM_PYTHON" -m btlm_jax.cli "$@"; }; python() { "$BTLM_PYTHON" "$@"; }\n'


@dataclasses.dataclass(frozen=True)
class Part:
    """A section: commands, in Bash, in a folder of the part's own.

    Attributes:
      title: its heading, without which no other part goes.
      about: what is measured, in Markdown.
      commands: their output is shown.
      prepare: what must be there before; its output is not shown.
      pictures: files the commands leave, to be shown.
      on: where it is run; both if None.
    """

    title: str
    about: str
    commands: tuple[str, ...]
    prepare: str = ""
    pictures: tuple[str, ...] = ()
    on: Literal["cpu", "accelerator"] | None = None

    @property
    def folder(self) -> str:
        """A name for the folder it works in."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def parts(platform: str) -> list[Part]:
    """What `benchmarks.toml` holds for a platform ("cpu", "gpu", "tpu"), in its order."""
    text = (
        importlib.resources.files("btlm_jax.train.bench")
        .joinpath("benchmarks.toml")
        .read_text("utf-8")
    )
    here = "cpu" if platform == "cpu" else "accelerator"
    found = [
        Part(**(part | {name: tuple(part.get(name, ())) for name in ("commands", "pictures")}))
        for part in tomllib.loads(text)["part"]
    ]
    return [part for part in found if part.on in (None, here)]


def bench_all(
    file: str | os.PathLike[str],
    *,
    only: Sequence[str] = (),
    work: str | os.PathLike[str] | None = None,
) -> None:
    """Runs the parts one after the other, and writes the file anew after each.

    Sections of parts that are not run stay as they are. A command that fails is written down with
    its error, and the other parts are run.

    Args:
      file: Markdown of an earlier call, or new. Pictures are written beside it.
      only: titles of parts, or the beginnings of titles; default all.
      work: a folder that keeps what the commands write. Preparations that it has are not repeated,
        and commands that resume go on from there. Default a temporary one.

    Raises:
      FileNotFoundError: the directory of `file` does not exist.
      ValueError: `file` is none of ours, `only` names no part, or a command failed (all that was
        found is written).
    """
    file = Path(file)
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent}: no such directory; make it first")
    machine = _machine()
    known = parts(machine["platform"])
    sections = read(file, [part.title for part in known])
    chosen = _chosen(known, only)
    failed = []
    with tempfile.TemporaryDirectory(prefix="btlm-bench-") as temporary:
        home = Path(temporary if work is None else work)
        for part in chosen:
            logger.info("%s", part.title)
            folder = home / part.folder
            folder.mkdir(parents=True, exist_ok=True)
            sections[part.title], good = _section(
                part, folder.resolve(), file.parent, _conditions(machine)
            )
            if not good:
                failed.append(part.title)
            text = [sections[p.title] for p in known if p.title in sections]
            atomic.write_text(epath.Path(file), "\n".join([_HEADER, *text]))
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}; the errors, and the rest, are in {file}")


def _chosen(known: Sequence[Part], only: Sequence[str]) -> list[Part]:
    chosen = []
    for name in only:
        some = [p for p in known if p.title.lower().startswith(name.lower())]
        if not some:
            titles = ", ".join(repr(p.title) for p in known)
            raise ValueError(f"only: found {name!r}, expected the beginning of one of {titles}")
        chosen += some
    return [p for p in known if p in chosen] if only else list(known)


def read(file: Path, titles: Sequence[str]) -> dict[str, str]:
    """The sections of a file, by title; none if there is no file.

    Raises:
      ValueError: the file, or a section of it, is none of ours.
    """
    if not file.exists():
        return {}
    text = file.read_text("utf-8")
    if not text.startswith(_HEADER):
        raise ValueError(
            f"{file}: found a file that `btlm bench all` has not written, expected a new name or "
            "one of its files"
        )
    found: dict[str, str] = {}
    for section in re.split(r"^(?=## )", text.removeprefix(_HEADER), flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0].removeprefix("## ")
        if title not in titles:
            raise ValueError(
                f"{file}: found the section {title!r}, expected those of this kind of machine: "
                f"{', '.join(titles)}; one file holds one machine"
            )
        found[title] = section.rstrip("\n") + "\n"
    return found


def _section(part: Part, folder: Path, pictures: Path, conditions: str) -> tuple[str, bool]:
    """The Markdown of a part, and whether all of its commands succeeded."""
    out = [f"## {part.title}\n", part.about.strip() + "\n"]
    if part.prepare:
        out.append(f"```bash\n{part.prepare.strip()}\n```\n")
        mark, key = folder / _PREPARED, hashlib.sha256(part.prepare.encode()).hexdigest()
        if not (mark.exists() and mark.read_text() == key):
            lines, good = _run(part.prepare, folder)
            if not good:
                return "\n".join([*out, _block(["...", *lines]), conditions]), False
            mark.write_text(key)
    shown, good = [], True
    for command in part.commands:
        began = time.monotonic()
        lines, good = _run(command, folder)
        shown += ["$ " + command.strip(), *lines, f"({time.monotonic() - began:,.0f} s)"]
        if not good:
            break
    out.append(_block(shown))
    for name in part.pictures if good else ():
        shown_at = pictures / Path(name).name
        shutil.copyfile(folder / name, shown_at)
        out.append(f"![{part.title}]({shown_at.name})\n")
    return "\n".join([*out, conditions]), good


def _block(lines: Sequence[str]) -> str:
    return "```console\n" + "\n".join(lines) + "\n```\n"


def _run(script: str, folder: Path) -> tuple[list[str], bool]:
    """Runs Bash; both outputs are seen as they come. Returns what is to be written, and success."""
    env = os.environ | {"BTLM_PYTHON": sys.executable}
    errors: deque[str] = deque(maxlen=3)
    with subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", _SHELL + script], cwd=folder, env=env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        aside = threading.Thread(target=_pass_on, args=(process.stderr, sys.stderr, errors))
        aside.start()
        lines: list[str] = []
        _pass_on(process.stdout, sys.stdout, lines)
        aside.join()
    if process.returncode:
        lines += [f"FAILED with exit code {process.returncode}", *errors]
    return lines, process.returncode == 0


def _pass_on(source, target, kept: list[str] | deque[str]) -> None:
    for line in source:
        print(line, end="", file=target, flush=True)
        kept.append(line.rstrip())


def _machine() -> dict[str, Any]:
    """`measure.measurement_conditions`, found by a process that ends: a TPU serves one at a time."""
    script = "import json; from btlm_jax.train.bench import measure; print(json.dumps(measure.measurement_conditions()))"
    found = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    return json.loads(found.stdout)


def _conditions(machine: dict[str, Any]) -> str:
    m = machine
    versions = [f"Python {m['python']}", *_versions("jax", "libtpu", "torch", "lm-eval")]
    load = f", load {os.getloadavg()[0]:.1f} when it began" if hasattr(os, "getloadavg") else ""
    return (
        f"*{m['devices']} x {m['device']}, {m['cores']} CPU cores; {', '.join(versions)}; "
        f"{datetime.date.today().isoformat()}{load}.*\n"
    )


def _versions(*packages: str) -> Iterator[str]:
    for name in packages:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"no {name}"
