"""Measures conversion and loading beside a plain copy of the same bytes on the same disk."""

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

from btlm_jax.train.bench.random_checkpoint import FORMS, Form, write_random_checkpoint
from btlm_jax.utils import atomic
from btlm_jax.utils.format import DEFAULT_MEMORY, format_bytes
from btlm_jax.utils.local_paths import local_path

_BLOCK_BYTES = 16 << 20
# The code of the measured processes. They time themselves, so that starting Python does not count.
_TIMED = """
import sys, time
{imports}
start = time.perf_counter()
{work}
seconds = time.perf_counter() - start
from btlm_jax.utils.process_memory import peak_rss
print(seconds, peak_rss())
"""


class TimedStep(NamedTuple):
    """A row of the table: one step over all weights of the checkpoint."""

    name: str
    seconds: float
    nbytes: int
    peak_rss: int | None

    def __str__(self) -> str:
        rss = f"{format_bytes(self.peak_rss):>10}" if self.peak_rss else " " * 10
        rate = format_bytes(self.nbytes / self.seconds)
        return f"{self.name:<34} {self.seconds:8.2f} s {rate:>12}/s {rss}"


MeasureStep = Callable[[str, Callable[[], tuple[float, int | None]]], TimedStep]


def bench_convert(
    *,
    directory: Path = Path("btlm-bench"),
    layers: int = 32,
    form: Form = "safetensors",
    max_memory: int = DEFAULT_MEMORY,
    keep: bool = False,
) -> None:
    """Converts, quantizes, verifies and exports a random checkpoint of the 3B shape.

    Each step runs in a process, whose peak memory is reported, beside plain copies of the same
    files. Conversion and export include writing to the disk (fsync), as does one of the copies; the
    other copy ends in the page cache, as `cp` does. The benchmark needs three to four times the
    checkpoint's bytes (5.3 GB with 32 layers) on the disk.

    Args:
      directory: working directory; must not exist, and is removed at the end.
      layers: layers of the model; the embedding keeps its size.
      form: file format of the checkpoint to convert.
      max_memory: bytes of weights in flight, such as 512MiB.
      keep: keep the files.

    Raises:
      FileExistsError: the directory exists.
      OSError: the disk is full or fails.
      ValueError: the form is unknown, or a process failed (with its output).
    """
    directory = local_path(directory, "directory")
    table = _open_table(directory, layers, form, room=3, keep=keep)
    with table as (source, measure_step):
        cached_copy = measure_step("copy (to the page cache)", lambda: _copy(source, sync=False))
        copy = measure_step("copy (to the disk)", lambda: _copy(source, sync=True))
        for copied in directory.glob("copy*"):
            shutil.rmtree(copied)
        converted, exported = directory / "orbax", directory / "back"

        def run_ours(function: str, *arguments: Path | str) -> tuple[float, int]:
            imports = f"from btlm_jax.convert import {function}"
            work = f"assert {function}(*sys.argv[1:], max_memory={max_memory})"
            return _run_timed(imports, work, *arguments)

        convert = measure_step("convert", lambda: run_ours("convert", source, converted))
        measure_step(
            "quantize to int4", lambda: run_ours("quantize", source, directory / "int4", "int4")
        )
        measure_step("verify (hash again)", lambda: run_ours("verify", converted))
        export = measure_step("export", lambda: run_ours("export", converted, exported))
        measure_step(
            "verify (export against original)", lambda: run_ours("verify", source, exported)
        )
        for step in (convert, export):
            print(
                f"{step.name}: {copy.seconds / step.seconds:.2f} of the rate of a copy to the "
                f"disk, {cached_copy.seconds / step.seconds:.2f} of one to the page cache"
            )


def bench_load(
    *, directory: Path = Path("btlm-bench"), layers: int = 32, keep: bool = False
) -> None:
    """Loads a random checkpoint of the 3B shape onto the devices, in both file formats.

    It is loaded from Hugging Face files and from an Orbax checkpoint, each in a process, whose peak
    memory is reported, beside a plain read of the files.

    Args:
      directory: working directory; must not exist, and is removed at the end.
      layers: layers of the model; the embedding keeps its size.
      keep: keep the files.

    Raises:
      FileExistsError: the directory exists.
      OSError: the disk is full or fails.
      ValueError: a process failed (with its output).
    """
    directory = local_path(directory, "directory")
    table = _open_table(directory, layers, "safetensors", room=1, keep=keep)
    with table as (source, measure_step):
        converted = directory / "orbax"
        imports, work = "from btlm_jax.convert import convert", "convert(*sys.argv[1:])"
        measure_step("convert", lambda: _run_timed(imports, work, source, converted))
        read = measure_step("read the files", lambda: _read(source))
        work = "jax.block_until_ready(load(sys.argv[1])[1])"
        for name, function, path in (
            ("load Hugging Face files", "btlm_jax.convert import load_hf", source),
            ("load Orbax checkpoint", "btlm_jax import load", converted),
        ):
            imports = f"import jax; from {function} as load"
            step = measure_step(name, lambda i=imports, w=work, p=path: _run_timed(i, w, p))
            rate = read.seconds / step.seconds
            multiple = (step.peak_rss or 0) / step.nbytes
            print(
                f"{name}: {rate:.2f} of the rate of reading, {multiple:.2f} x the weights in memory"
            )


@contextlib.contextmanager
def _open_table(
    directory: Path, layers: int, form: str, *, room: float, keep: bool
) -> Iterator[tuple[Path, MeasureStep]]:
    """Writes the checkpoint and the head of the table.

    The directory is removed at the end, unless `keep`.

    Args:
      directory: working directory; must not exist.
      layers: layers of the checkpoint.
      form: file format of the checkpoint.
      room: free space that the benchmark needs, in multiples of the checkpoint.
      keep: keep the files.

    Yields:
      The checkpoint, and a function that runs a step, prints its row and returns it.
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
        nbytes = write_random_checkpoint(source, layers=layers, form=form)
        atomic.require_space(directory, int(room * nbytes))
        os.sync()
        print(f"{form}, {layers} layers, {nbytes:,} bytes of bf16 weights, in {directory}")
        print(f"{'':<34} {'time':>10} {'rate':>14} {'peak RSS':>10}")

        def measure_step(name: str, run: Callable[[], tuple[float, int | None]]) -> TimedStep:
            seconds, rss = run()
            step = TimedStep(name, seconds, nbytes, rss)
            print(step)
            os.sync()
            return step

        yield source, measure_step
    finally:
        if not keep:
            shutil.rmtree(directory)


def _copy(source: Path, sync: bool) -> tuple[float, None]:
    """Returns the seconds of a copy, to the page cache or (`sync`) to the disk."""
    target = source.with_name("copy on disk" if sync else "copy")
    target.mkdir()
    start = time.perf_counter()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        if sync:
            with open(target / file.name, "rb+") as copied:
                os.fsync(copied.fileno())
    return time.perf_counter() - start, None


def _read(source: Path) -> tuple[float, None]:
    """Returns the seconds of reading all files."""
    buffer, start = bytearray(_BLOCK_BYTES), time.perf_counter()
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start, None


def _run_timed(imports: str, work: str, *arguments: Path | str) -> tuple[float, int]:
    """Runs code in a process; returns its seconds and the peak memory of the process in bytes."""
    code = _TIMED.format(imports=imports, work=work)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise ValueError(f"{work} failed:\n{done.stdout}")
    seconds, rss = done.stdout.splitlines()[-1].split()
    return float(seconds), int(rss)
