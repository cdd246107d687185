"""Conversions, exports and quantizations that tests interrupt, and what they leave on disk.

`run_job` runs them for `fork_server`. Run as a program, this file runs them on a small disk that
grows after every failure (`run_on_growing_disk`).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import pytest
from safetensors.numpy import save_file

from btlm_jax.checkpoint import metadata, zarr
from btlm_jax.convert import convert, export, quantize
from btlm_jax.convert.hf.safetensors_writer import SafetensorsFile
from btlm_jax.utils import atomic
from support import golden

ONE_THREAD = 5 * zarr.BLOCK_BYTES  # the smallest budget, under which tensors are written in order
SHARD_BYTES = 20_000  # several files per export
WORK = {"convert": convert, "export": export, "quantize": quantize}
OPTIONS = {
    "convert": {},
    "export": {"max_shard_bytes": SHARD_BYTES},
    "quantize": {"to": "int4"},
}
# A small file that is written after all tensors.
LAST_FILE = {"convert": "_METADATA", "export": "config.json"}


def run(work: str, source: Path | str, target: Path | str, **options: Any):
    """Runs a conversion, export or quantization with the options of these tests."""
    return WORK[work](source, target, **OPTIONS[work], **options)


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Runs the work of a job of `fork_server`."""
    options: dict[str, Any] = {"overwrite": job.get("overwrite", False)}
    if "at" in job:  # one thread: the order of the changes must not depend on timing
        options["max_memory"] = ONE_THREAD
        if job["work"] == "export":
            options["max_memory"] = 5 * metadata.read_metadata(job["source"]).largest_block
    report = run(job["work"], job["source"], job["target"], **options)
    return {"resumed": report.resumed, "tensors": report.tensors}


def write_one_layer_model(
    path: Path, *, negated: bool = False, dtype=ml_dtypes.bfloat16, change=None
) -> Path:
    """Writes a Hugging Face directory of one layer.

    Args:
      path: the directory.
      negated: negate the weights, which gives another model of the same size.
      dtype: dtype of all tensors.
      change: called with the tensors, to edit them in place.
    """
    case = golden.load("g_bf16")
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(case.hf_config | {"n_layer": 1}))
    tensors = {k: x.astype(dtype) for k, x in case.weights.items() if ".h.1." not in k}
    if negated:
        tensors |= {k: -x for k, x in tensors.items() if k != golden.SLOPES}
    if change is not None:
        change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    golden.write_tokenizer(path, case.config.vocab_size)
    return path


class Conversions(NamedTuple):
    """A source, its checkpoint and the export of that; and the same of a negated model."""

    hf: Path
    checkpoint: Path
    export: Path
    negated_hf: Path
    negated_checkpoint: Path
    negated_export: Path

    def source_and_result(self, work: str) -> tuple[Path, Path]:
        """Returns the source of a conversion or an export, and its result."""
        return (self.hf, self.checkpoint) if work == "convert" else (self.checkpoint, self.export)

    def negated(self, work: str) -> tuple[Path, Path]:
        """Returns the same of the negated model."""
        if work == "convert":
            return self.negated_hf, self.negated_checkpoint
        return self.negated_checkpoint, self.negated_export


def make_conversions(folder: Path) -> Conversions:
    """Converts and exports two models without interruption."""
    made = Conversions(*(folder / name for name in Conversions._fields))
    write_one_layer_model(made.hf)
    write_one_layer_model(made.negated_hf, negated=True)
    for pairs in (Conversions.source_and_result, Conversions.negated):
        for work in ("convert", "export"):
            assert run(work, *pairs(made, work)).resumed == 0
    assert len(list(made.export.glob("*.safetensors"))) > 2
    return made


# Directories --------------------------------------------------------------------------------------


def read_tree(folder: Path) -> dict[str, bytes | None]:
    """Returns the bytes of every file in a directory, and None for every folder."""
    entries = folder.rglob("*")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in entries}


def assert_same_tree(folder: Path, expected: Path) -> None:
    """Asserts that two directories hold the same files with the same bytes."""
    a, b = read_tree(folder), read_tree(expected)
    assert sorted(a) == sorted(b)
    assert [name for name in a if a[name] != b[name]] == []


def assert_complete(target: Path, expected: Path) -> None:
    """Asserts that a target equals that of an uninterrupted run, with no leftovers beside it."""
    assert_same_tree(target, expected)
    assert [p.name for p in target.parent.iterdir() if p.name.startswith(f".{target.name}")] == []


def hidden_sibling(target: Path, kind: str = "partial") -> Path:
    """Returns the directory of unfinished work on a target, or of what it is to replace."""
    return target.with_name(f".{target.name}.{kind}")


def finished_pieces(target: Path) -> list[str]:
    """Returns the names of the finished pieces of an unfinished target."""
    files = (hidden_sibling(target) / "finished").glob("*.json")
    return sorted(p.name.removesuffix(".json") for p in files)


def finished_files(target: Path) -> dict[str, tuple[int, int]]:
    """Identifies the files of finished arrays of an unfinished checkpoint; exports have none."""
    content = hidden_sibling(target) / target.name
    arrays = (content / "state" / name for name in finished_pieces(target))
    return file_identities(content, [p for array in arrays for p in array.rglob("*")])


def file_identities(folder: Path, files: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Returns inode and modification time of files, by path in the folder."""
    stats = {str(p.relative_to(folder)): p.stat() for p in files if p.is_file()}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in stats.items()}


# Failures -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def failing_after(tensors: int, error: BaseException):
    """Within the block, writing fails after so many tensors."""
    calls = itertools.count()
    with pytest.MonkeyPatch.context() as patch:

        def limited(write):
            def write_or_fail(*args):
                if next(calls) >= tensors:
                    raise error
                return write(*args)

            return write_or_fail

        patch.setattr(zarr, "write_blocks", limited(zarr.write_blocks))
        patch.setattr(SafetensorsFile, "write", limited(SafetensorsFile.write))
        yield


@contextlib.contextmanager
def disk_full_for(name: str):
    """Within the block, the disk is full when the small file of this name is written."""

    def write(path, *args, real=atomic.write_bytes):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "write_bytes", write)
        yield


def interrupt_after(pieces: int, work: str, source: Path, target: Path) -> None:
    """Leaves a run behind that failed after so many pieces."""
    with failing_after(pieces, RuntimeError("stop")), pytest.raises(RuntimeError, match="stop"):
        run(work, source, target, max_memory=ONE_THREAD)
    assert len(finished_pieces(target)) == pieces and not target.exists()


def run_on_growing_disk(work: str, source: str, mount_point: str, below: str, copy: str) -> None:
    """Runs work on a disk of a few pages, which grows after every failure.

    Prints a JSON list of the failures, each (type, errno, message, number of finished pieces), and
    the number of resumed tensors; and copies the result out of the disk.
    """
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, "size=8k", "tmpfs", mount_point], check=True)
    target = Path(mount_point, below, "c")
    atomic.require_space = lambda *_: None  # it would refuse to begin
    failures, report = [], None
    for pages in range(2, 1000, 4):
        subprocess.run([*mount, f"remount,size={4 * pages}k", "tmpfs", mount_point], check=True)
        try:
            report = run(work, source, target)
            break
        except Exception as error:
            assert not target.exists()
            kind, number = type(error).__name__, getattr(error, "errno", None)
            failures.append([kind, number, str(error), len(finished_pieces(target))])
    print(json.dumps([failures, report.resumed]))
    shutil.copytree(target, copy)


if __name__ == "__main__":
    run_on_growing_disk(*sys.argv[1:])
