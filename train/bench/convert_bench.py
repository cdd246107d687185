"""Measure conversion against a plain copy of the same bytes on the same disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from btlm_jax.train.bench.random_checkpoint import FORMS, make
from btlm_jax.utils import atomic
from btlm_jax.utils.format import format_bytes

_BLOCK = 16 << 20
# What the measured processes run. They time themselves, so that starting Python does not count.
_TIMED = """
import sys, time
{imports}
began = time.perf_counter()
{work}
seconds = time.perf_counter() - began
from btlm_jax.utils.process_memory import peak_rss
print(seconds, peak_rss())
"""
Show = Callable[[object], None]


class Row(NamedTuple):
    """One measurement."""

    what: str
    seconds: float
    nbytes: int
    peak_rss: int | None

    def __str__(self) -> str:
        rss = f"{format_bytes(self.peak_rss):>10}" if self.peak_rss else " " * 10
        rate = format_bytes(self.nbytes / self.seconds)
        return f"{self.what:<34} {self.seconds:8.2f} s {rate:>12}/s {rss}"


def bench_convert(
    directory: Path, *, layers: int, form: str, max_memory: int, keep: bool, show: Show = print
) -> None:
    """Makes a random checkpoint of the 3B shape; copies, converts, quantizes, verifies, exports it.

    Every step runs in a process of its own, whose peak memory the system reports. Conversion and
    export end when their bytes are on the disk (fsync), as the copy "to the disk" does; the one "to
    the page cache" ends when `cp` would.

    Args:
      directory: where; must not exist, and is removed afterwards unless `keep`.
      layers: of 32.
      form: one of `random_checkpoint.FORMS`.
      max_memory: of weights in flight.
      keep: keep the files.
      show: takes each line of the report.

    Raises:
      FileExistsError: the directory exists.
      OSError: the disk is full or fails.
      ValueError: an unknown form, or a process failed (its message).
    """
    with _table(directory, layers=layers, form=form, room=3, keep=keep, show=show) as (source, row):
        cached = row("copy (to the page cache)", lambda: _copy(source, sync=False))
        copy = row("copy (to the disk)", lambda: _copy(source, sync=True))
        for copied in directory.glob("copy*"):
            shutil.rmtree(copied)
        converted, back = directory / "orbax", directory / "back"

        def ours(name: str, *arguments: Path | str) -> tuple[float, int]:
            imports = f"from btlm_jax.convert import {name}"
            return _run(
                imports, f"assert {name}(*sys.argv[1:], max_memory={max_memory})", *arguments
            )

        convert = row("convert", lambda: ours("convert", source, converted))
        row("quantize to int4", lambda: ours("quantize", source, directory / "int4", "int4"))
        row("verify (hash again)", lambda: ours("verify", converted))
        export = row("export", lambda: ours("export", converted, back))
        row("verify (export against original)", lambda: ours("verify", source, back))
        for one in (convert, export):
            show(
                f"{one.what}: {copy.seconds / one.seconds:.2f} of the rate of a copy to the disk, "
                f"{cached.seconds / one.seconds:.2f} of one to the page cache"
            )


def bench_load(directory: Path, *, layers: int, keep: bool, show: Show = print) -> None:
    """Makes a random checkpoint of the 3B shape and loads it, from both formats, onto the devices.

    Args:
      directory, layers, keep, show: as for `bench_convert`.

    Raises:
      As `bench_convert`.
    """
    form = "safetensors"
    with _table(directory, layers=layers, form=form, room=1, keep=keep, show=show) as (source, row):
        converted = directory / "orbax"
        convert = "from btlm_jax.convert import convert"
        row("convert", lambda: _run(convert, "convert(*sys.argv[1:])", source, converted))
        read = row("read the files", lambda: _read(source))
        for what, module, path in (
            ("load Hugging Face files", "btlm_jax.convert import load_hf", source),
            ("load Orbax checkpoint", "btlm_jax import load", converted),
        ):
            imports = f"import jax; from {module} as load"
            work = "jax.block_until_ready(load(sys.argv[1])[1])"
            found = row(what, lambda i=imports, w=work, p=path: _run(i, w, p))
            rate = read.seconds / found.seconds
            held = (found.peak_rss or 0) / found.nbytes
            show(f"{what}: {rate:.2f} of the rate of reading, {held:.2f} x the weights in memory")


@contextlib.contextmanager
def _table(
    directory: Path, *, layers: int, form: str, room: float, keep: bool, show: Show
) -> Iterator[tuple[Path, Callable[[str, Callable[[], tuple[float, int | None]]], Row]]]:
    """Makes the checkpoint, and gives a function that shows a measurement as a row of a table.

    The directory is removed at the end, unless `keep`.
    """
    if form not in FORMS:
        raise ValueError(f"form: found {form!r}, expected one of {', '.join(FORMS)}")
    if layers < 1:
        raise ValueError(f"layers: found {layers}, expected at least 1")
    if directory.exists():
        raise FileExistsError(f"{directory} exists: name another directory, or delete it first")
    directory.mkdir(parents=True)
    try:
        source = directory / "hf"
        nbytes = make(source, layers=layers, form=form)
        atomic.require_space(directory, int(room * nbytes))
        os.sync()
        show(f"{form}, {layers} layers, {nbytes:,} bytes of bf16 weights, in {directory}")
        show(f"{'':<34} {'time':>10} {'rate':>14} {'peak RSS':>10}")

        def row(what: str, run: Callable[[], tuple[float, int | None]]) -> Row:
            seconds, rss = run()
            found = Row(what, seconds, nbytes, rss)
            show(found)
            os.sync()
            return found

        yield source, row
    finally:
        if not keep:
            shutil.rmtree(directory)


def _copy(source: Path, sync: bool) -> tuple[float, None]:
    target = source.with_name("copy on disk" if sync else "copy")
    target.mkdir()
    began = time.perf_counter()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        if sync:
            with open(target / file.name, "rb+") as copied:
                os.fsync(copied.fileno())
    return time.perf_counter() - began, None


def _read(source: Path) -> tuple[float, None]:
    buffer, began = bytearray(_BLOCK), time.perf_counter()
    for file in sorted(source.iterdir()):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - began, None


def _run(imports: str, work: str, *arguments: Path | str) -> tuple[float, int]:
    """Times `work` in a process of its own. Returns seconds, and its peak memory in bytes."""
    code = _TIMED.format(imports=imports, work=work)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise ValueError(f"{work} failed:\n{done.stdout}")
    seconds, rss = done.stdout.splitlines()[-1].split()
    return float(seconds), int(rss)
