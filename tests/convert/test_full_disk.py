"""Conversions and exports on a full disk say what is kept and how to continue."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest

import btlm_jax as btlm
from btlm_jax.checkpoint import checkpoint, metadata, zarr
from btlm_jax.convert import convert
from support import compiling, conversion_runs
from support.conversion_runs import (
    LAST_FILE,
    ONE_THREAD,
    assert_complete,
    disk_full_for,
    failing_after,
    finished_pieces,
    interrupt_after,
    run,
)


class ArrayOnFullDisk:
    """An array that fails to be written as TensorStore's does on a full disk."""

    def __getitem__(self, part):
        return self

    def write(self, *args, **kwargs):
        return self

    def result(self):
        raise ValueError(
            'RESOURCE_EXHAUSTED: Error writing local file "c/0": Failed writing: "c/0.__lock": '
            "Failed to write 387732 bytes to file 3: No space left on device [os_error_code='28']"
        )


def assert_explains_how_to_continue(error: OSError, target: Path) -> None:
    assert error.errno == errno.ENOSPC
    for part in (str(target), "finished pieces are kept", "free space", "same command again"):
        assert part in str(error)


@pytest.mark.parametrize("moment", ["opening", "writing"])
def test_a_full_disk_for_an_array_keeps_the_finished_ones(
    moment, conversions, tmp_path, monkeypatch
):
    create_array, calls = zarr.create_array, itertools.count()

    def full(*args):
        if next(calls) < 5:
            return create_array(*args)
        return ArrayOnFullDisk() if moment == "writing" else ArrayOnFullDisk().result()

    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(zarr, "create_array", full)
        convert(conversions.hf, tmp_path / "c", max_memory=ONE_THREAD)
    assert_explains_how_to_continue(error.value, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert convert(conversions.hf, tmp_path / "c").resumed == 5
    assert_complete(tmp_path / "c", conversions.checkpoint)


@pytest.mark.parametrize(
    "work, name",
    [
        ("convert", "ln_f.bias.json"),
        ("export", "transformer.ln_f.bias.json"),
        *LAST_FILE.items(),
    ],
)
def test_a_full_disk_for_a_small_file_keeps_the_tensors(work, name, conversions, tmp_path):
    source, expected = conversions.source_and_result(work)
    with disk_full_for(name), pytest.raises(OSError) as error:
        run(work, source, tmp_path / "c")
    assert not (tmp_path / "c").exists() and len(finished_pieces(tmp_path / "c")) > 5
    assert_explains_how_to_continue(error.value, tmp_path / "c")
    run(work, source, tmp_path / "c")
    assert_complete(tmp_path / "c", expected)


@pytest.fixture
def growing_disk(tmp_path):
    """Calls `conversion_runs.run_on_growing_disk` in a process that may mount one."""
    private = ["unshare", "-r", "-m"]
    try:
        with tempfile.TemporaryDirectory(prefix="d") as folder:  # a short path
            mount = ["mount", "-t", "tmpfs", "tmpfs", folder]
            subprocess.run([*private, *mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small disk: {error}")

    def fill(work: str, source: Path, below: str) -> tuple[list, Path]:
        copy = tmp_path / "copied" / "c"
        copy.parent.mkdir()
        program = [sys.executable, conversion_runs.__file__, work, source]
        tests = Path(conversion_runs.__file__).parents[1]
        env = compiling.one_device() | {"PYTHONPATH": str(tests)}
        with tempfile.TemporaryDirectory(prefix="d") as folder:
            command = [*private, *program, folder, below, copy]
            done = subprocess.run(command, stdout=subprocess.PIPE, env=env)
        assert done.returncode == 0
        return json.loads(done.stdout), copy

    return fill


@pytest.mark.parametrize(
    "work, below",
    [
        ("convert", ""),
        ("export", ""),
        ("convert", "a-folder-with-a-name-of-no-uncommon-length/another"),
    ],
)
def test_a_run_on_a_growing_disk_completes(work, below, conversions, growing_disk):
    source, expected = conversions.source_and_result(work)
    (failures, resumed), copy = growing_disk(work, source, below)
    assert {(kind, number) for kind, number, *_ in failures} == {("OSError", errno.ENOSPC)}
    explained = [text for _, _, text, _ in failures if "run the same command again" in text]
    assert len(explained) > 5
    pieces = [count for *_, count in failures]
    assert pieces == sorted(pieces) and len(set(pieces)) > 3 and resumed == pieces[-1] > 0
    assert_complete(copy, expected)


@pytest.mark.parametrize("work", ["convert", "export"])
def test_too_little_space_is_noticed_before_writing(work, conversions, tmp_path, monkeypatch):
    source, expected = conversions.source_and_result(work)
    leaves = metadata.read_metadata(conversions.checkpoint).leaves.values()
    size = sum(x.size * x.dtype.itemsize for x in leaves)
    interrupt_after(3, work, source, tmp_path / "c")
    Usage = namedtuple("Usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, size // 2))
        with (
            failing_after(0, AssertionError("writes")),
            pytest.raises(OSError, match="are free") as error,
        ):
            run(work, source, tmp_path / "new")
        assert error.value.errno == errno.ENOSPC and str(tmp_path / "new") in str(error.value)
        assert not (tmp_path / "new").exists() and finished_pieces(tmp_path / "new") == []
        # Finished tensors need no space again.
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, size - 100))
        assert run(work, source, tmp_path / "c").resumed == 3
    assert_complete(tmp_path / "c", expected)


def test_a_failed_save_leaves_nothing(conversions, tmp_path):
    """Weights in memory cannot be recognized later, so `save` starts over each time."""
    model, params = btlm.load(conversions.checkpoint)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error, message in (
        (OSError("broken"), "broken"),
        (full, f"{tmp_path / 'c'}; nothing of it"),
    ):
        with failing_after(3, error), pytest.raises(OSError, match=message):
            checkpoint.save(tmp_path / "c", model.config, params)
        assert list(tmp_path.iterdir()) == []
