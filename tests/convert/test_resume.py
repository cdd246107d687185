"""Conversions and exports that are killed, fail or meet a full disk go on, to the same bytes.

Run as a program, this file is the server that forks the processes to be killed (`Forks`), or fills
a small disk (`fill_disk`).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import btlm_jax as btlm
from btlm_jax.checkpoint import checkpoint, metadata, zarr
from btlm_jax.convert import convert, export
from btlm_jax.convert.hf.safetensors_writer import SafetensorsFile
from btlm_jax.convert.hf.source import open_hf
from btlm_jax.utils import atomic
from support import golden

ONE_THREAD = 5 * zarr.BLOCK_BYTES  # the least memory: tensors are written in order
SHARD = 20_000  # several files per export
WORK = {"convert": convert, "export": export}
SMALL = {"convert": "_METADATA", "export": "config.json"}  # files written after all tensors
OPTIONS = {"convert": {}, "export": {"max_shard_bytes": SHARD}}


def write_source(path: Path, *, other: bool = False, dtype=ml_dtypes.bfloat16, change=None) -> Path:
    """A Hugging Face directory of one layer; `other` has other weights, of the same size."""
    case = golden.load("g_bf16")
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(case.hf_config | {"n_layer": 1}))
    w = {k: x.astype(dtype) for k, x in case.weights.items() if ".h.1." not in k}
    if other:
        w |= {k: -x for k, x in w.items() if k != golden.SLOPES}
    if change is not None:
        change(w)
    save_file(w, path / "model.safetensors", metadata={"format": "pt"})
    golden.write_tokenizer(path, case.config.vocab_size)
    return path


Made = namedtuple("Made", "hf checkpoint export other old_checkpoint old_export")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """Two sources, and what uninterrupted runs make of them."""
    folder = tmp_path_factory.mktemp("made")
    out = Made(*(folder / name for name in Made._fields))
    for source, target, exported in (
        (out.hf, out.checkpoint, out.export),
        (out.other, out.old_checkpoint, out.old_export),
    ):
        write_source(source, other=source == out.other)
        assert convert(source, target).resumed == 0
        export(target, exported, max_shard_bytes=SHARD)
    assert len(list(out.export.glob("*.safetensors"))) > 2
    return out


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a directory: its files with their bytes, and its folders."""
    found = folder.rglob("*")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in found}


def assert_same(found: Path, expected: Path) -> None:
    a, b = tree(found), tree(expected)
    assert sorted(a) == sorted(b)
    assert [name for name in a if a[name] != b[name]] == []


def assert_done(target: Path, expected: Path) -> None:
    """The target is what an uninterrupted run makes, and nothing hidden is left beside it."""
    assert_same(target, expected)
    assert [p.name for p in target.parent.iterdir() if p.name.startswith(f".{target.name}")] == []


def hidden(target: Path, kind: str = "partial") -> Path:
    return target.with_name(f".{target.name}.{kind}")


def records(target: Path) -> list[str]:
    """The names of the finished pieces of an unfinished target."""
    files = (hidden(target) / "finished").glob("*.json")
    return sorted(p.name.removesuffix(".json") for p in files)


def finished_files(target: Path) -> dict[str, tuple[int, int]]:
    """The files of the finished arrays of an unfinished checkpoint; none of an export."""
    content = hidden(target) / target.name
    return identities(
        content, [p for name in records(target) for p in (content / "state" / name).rglob("*")]
    )


def identities(folder: Path, files: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Inode and time of change of files."""
    found = {str(p.relative_to(folder)): p.stat() for p in files if p.is_file()}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


@contextlib.contextmanager
def failing(after: int, error: BaseException):
    """Within, no more than so many tensors can be written."""
    calls = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        for owner in (zarr, SafetensorsFile):

            def write(*args, real=owner.write):
                if next(calls) >= after:
                    raise error
                return real(*args)

            patch.setattr(owner, "write", write)
        yield


@contextlib.contextmanager
def full_disk_for(name: str):
    """Within, the small file of this name does not fit the disk."""

    def write(path, *args, real=atomic.write_bytes):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "write_bytes", write)
        yield


def begin(what: str, source: Path, target: Path, pieces: int) -> None:
    """Leaves a run after so many pieces."""
    with failing(pieces, RuntimeError("stop")), pytest.raises(RuntimeError, match="stop"):
        WORK[what](source, target, max_memory=ONE_THREAD, **OPTIONS[what])
    assert len(records(target)) == pieces and not target.exists()


def sources(what: str, made: Made) -> tuple[Path, Path, Path, Path]:
    """A source, what comes of it, and the same of the other one."""
    if what == "convert":
        return made.hf, made.checkpoint, made.other, made.old_checkpoint
    return made.checkpoint, made.export, made.old_checkpoint, made.old_export


# Killed ----------------------------------------------------------------------------------------


class Forks:
    """A process that has everything imported, and forks: a killed run then costs no start-up."""

    def __init__(self, folder: Path) -> None:
        one = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # threads do not survive a fork
        env = os.environ | one | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TMPDIR": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def run(self, what: str, source: Path, target: Path, **job) -> dict:
        """Runs a conversion or an export in a process of its own.

        Args:
          what, source, target: which.
          job: `at`: send it `signal` (default SIGKILL) before its change number `at` of the file
            system; `after`: kill it after so many seconds; `overwrite`.

        Returns:
          `ended`: "killed", "stopped" or "exited"; `pid`; and if it exited, `changes`: what it did
          to the file system; `seconds`; `resumed` and `tensors`, or `error`.
        """
        self._ask(job | {"what": what, "source": str(source), "target": str(target)})
        return self._answer()

    def kill(
        self, what: str, source: Path, folder: Path, points: Iterable[int], **job
    ) -> Iterator[tuple[int, Path]]:
        """Kills a run at each of the points; yields the point and the target, in `folder`.

        While the caller looks at what one has left, the next is running.
        """
        targets = {at: folder / str(at) / "c" for at in points}
        for at, target in targets.items():
            target.parent.mkdir(exist_ok=True)
            self._ask(job | {"what": what, "source": str(source), "target": str(target), "at": at})
        answers = (self._answer() for _ in targets)
        try:
            for (at, target), answer in zip(targets.items(), answers, strict=True):
                assert answer["ended"] == "killed"
                yield at, target
        finally:
            list(answers)

    def wait(self, pid: int) -> dict:
        """How a process that was stopped ended, as `run`."""
        self._ask({"wait": pid})
        return self._answer()

    def _ask(self, job: dict) -> None:
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict:
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(10) == 0


def serve() -> None:
    pipes: dict[int, int] = {}
    for line in sys.stdin:
        job = json.loads(line)
        pid = job.get("wait") or _fork(job, pipes)
        if "after" in job:
            time.sleep(job["after"])
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, os.WUNTRACED)
        answer = {"pid": pid, "ended": "killed" if os.WIFSIGNALED(status) else "exited"}
        if os.WIFSTOPPED(status):
            answer["ended"] = "stopped"
        else:
            with open(pipes.pop(pid)) as pipe:
                answer |= json.loads(pipe.read() or "{}")
        print(json.dumps(answer), flush=True)


def _fork(job: dict, pipes: dict[int, int]) -> int:
    assert len(os.listdir("/proc/self/task")) == 1, "a fork of several threads can hang"
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        pipes[pid] = reader
        return pid
    os.dup2(2, 1)
    # A shell starts its background jobs deaf to Ctrl-C, and the child would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.write(writer, json.dumps(_child(job)).encode())
    os._exit(0)


def _child(job: dict) -> dict:
    changes: list[tuple[str, str]] = []
    folder = os.path.dirname(job["target"])

    def hook(event: str, args) -> None:
        if event == "open":
            if not isinstance(args[0], str) or not args[2] & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        path = os.fspath(args[0])
        if not os.path.isabs(path):  # relative to an open folder, in rmtree
            path = os.path.join(os.readlink(f"/proc/self/fd/{args[-1]}"), path)
        if path.startswith(f"{folder}/"):
            changes.append((event, os.path.relpath(path, folder)))
            if len(changes) - 1 == job.get("at"):
                os.kill(os.getpid(), job.get("signal", signal.SIGKILL))

    sys.addaudithook(hook)
    began, out = time.monotonic(), {}
    options = OPTIONS[job["what"]] | {"overwrite": job.get("overwrite", False)}
    if "at" in job:  # which change it is must not depend on threads
        options["max_memory"] = ONE_THREAD
        if job["what"] == "export":
            options["max_memory"] = 5 * metadata.read_metadata(job["source"]).largest_block
    try:
        report = WORK[job["what"]](job["source"], job["target"], **options)
        out |= {"resumed": report.resumed, "tensors": report.tensors}
    except BaseException as error:
        out["error"] = repr(error)
    return out | {"changes": changes, "seconds": time.monotonic() - began}


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("needs Linux")
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.mark.parametrize("what", ["convert", "export"])
def test_killed_on_the_way(what, made, forks, tmp_path):
    """Killed before its first, second, … change of the file system: the next run continues."""
    source, expected, *_ = sources(what, made)
    whole = forks.run(what, source, tmp_path / "whole", at=-1)
    changes, total = whole["changes"], whole["tensors"]
    assert_done(tmp_path / "whole", expected)
    second = [i for i, (_, path) in enumerate(changes) if "/finished/" in path][2]
    named = max(i for i, (event, _) in enumerate(changes) if event == "os.rename")
    samples = [*range(second, named, 5), named, *range(named + 1, len(changes), 20)]
    resumed, taken = set(), 0
    for at, target in forks.kill(what, source, tmp_path, [*range(second), *samples]):
        if at > named:  # only the traces were still to be removed
            taken += 1
            assert_same(target, expected)
            with pytest.raises(FileExistsError):
                WORK[what](source, target, **OPTIONS[what])
            WORK[what](source, target, overwrite=True, **OPTIONS[what])
        else:
            assert not target.exists()
            with pytest.raises(FileNotFoundError):
                btlm.load(target)
            done, files = records(target), finished_files(target)
            assert WORK[what](source, target, **OPTIONS[what]).resumed == len(done)
            assert files.items() <= identities(target, target.rglob("*")).items()
            resumed.add(len(done))
        assert_done(target, expected)
    assert resumed >= {0, 1, total} and len(resumed) > 7 and taken > 1


@pytest.mark.parametrize("what", ["convert", "export"])
def test_killed_while_replacing(what, made, forks, tmp_path):
    """From the last tensor on, before any change: the old or the new one is there, and whole."""
    source, new, _, old = sources(what, made)
    begun = tmp_path / "begun"
    shutil.copytree(old, begun / "c")
    with full_disk_for(SMALL[what]), pytest.raises(OSError):
        WORK[what](source, begun / "c", overwrite=True, **OPTIONS[what])
    shutil.copytree(begun, tmp_path / "whole")
    whole = forks.run(what, source, tmp_path / "whole/c", overwrite=True)
    assert whole["resumed"] == whole["tensors"]
    named = [i for i, (event, _) in enumerate(whole["changes"]) if event == "os.rename"][-1]
    found, points = [], [*range(named + 2), *range(named + 2, len(whole["changes"]), 20)]
    for at in points:
        shutil.copytree(begun, tmp_path / str(at))
    for at, target in forks.kill(what, source, tmp_path, points, overwrite=True):
        if not target.exists():
            found.append("aside")
            with pytest.raises(FileNotFoundError, match=r"\.c\.replaced: the same command continu"):
                metadata.read_metadata(target)
            with full_disk_for(SMALL[what]), pytest.raises(OSError):  # the next run fails too
                WORK[what](source, target, overwrite=True, **OPTIONS[what])
            assert_same(hidden(target, "replaced"), old)
        elif at < named:
            found.append("old")
            with pytest.raises(FileExistsError):
                WORK[what](source, target, **OPTIONS[what])
            assert_same(target, old)
        else:
            found.append("new")
            assert_same(target, new)
        WORK[what](source, target, overwrite=True, **OPTIONS[what])
        assert_done(target, new)
    assert found.count("aside") == 1 and found.count("old") > 5 and found.count("new") > 2


@pytest.mark.parametrize("what, kills", [("convert", 24), ("export", 12)])
def test_killed_at_random_moments(what, kills, made, forks, tmp_path):
    """Several threads, and moments between those of the sweep above; runs killed over and over."""
    source, expected, *_ = sources(what, made)
    whole = min(forks.run(what, source, tmp_path / f"w{i}")["seconds"] for i in range(3))
    rng, killed, resumed = random.Random(0), 0, set()
    for target in (tmp_path / f"c{i}" for i in itertools.count()):
        files: dict[str, tuple[int, int]] = {}
        done = 0
        while not target.exists():
            found = forks.run(what, source, target, after=rng.uniform(0, 1.25 * whole))
            killed += found["ended"] == "killed"
            resumed.add(done)
            if not target.exists():
                assert found["ended"] == "killed"
                with pytest.raises(FileNotFoundError):
                    btlm.load(target)
                assert len(records(target)) >= done
                done, known = len(records(target)), files
                files = finished_files(target)
                assert known.items() <= files.items()  # not written again
            elif found["ended"] == "exited":
                assert found["resumed"] == done
                assert_done(target, expected)
        assert_same(target, expected)
        assert files.items() <= identities(target, target.rglob("*")).items()
        if killed >= kills:
            break
    assert max(resumed) > 0


@pytest.mark.parametrize("what", ["convert", "export"])
def test_killed_while_starting_over(what, made, forks, tmp_path):
    """The run that is killed deletes the work on another source, to which the user goes back."""
    source, expected, other, _ = sources(what, made)
    begin(what, source, tmp_path / "c", 3)
    changes = forks.run(what, other, tmp_path / "c", at=-1)["changes"]
    begun = [path for _, path in changes].index(".c.partial/key.json.new")
    wrong, points = [], range(0, begun + 1, 3)
    for at in points:
        begin(what, source, tmp_path / str(at) / "c", 3)
    for at, target in forks.kill(what, other, tmp_path, points):
        WORK[what](source, target, **OPTIONS[what])
        if tree(target) != tree(expected):
            wrong.append(changes[at])
    assert wrong == []


@pytest.mark.parametrize("what", ["convert", "export"])
def test_interrupted_from_the_keyboard(what, made, forks, tmp_path):
    """Whether threads are at work or the main thread finishes up."""
    source, expected, _, old = sources(what, made)
    shutil.copytree(old, tmp_path / "c")
    changes = forks.run(what, source, tmp_path / "c", overwrite=True, at=-1)["changes"]
    renames = [i for i, (event, _) in enumerate(changes) if event == "os.rename"]
    assert [changes[i][1] for i in renames[-2:]] == ["c", ".c.partial/c"]
    for at in (renames[3], renames[-9], renames[-3], *renames[-2:]):
        target = tmp_path / str(at) / "c"
        shutil.copytree(old, target)
        found = forks.run(what, source, target, at=at, signal=signal.SIGINT, overwrite=True)
        assert found["ended"] == "exited" and found["error"] == "KeyboardInterrupt()"
        assert_same(target, old)
        assert not hidden(target, "replaced").exists()
        done = len(records(target))
        assert WORK[what](source, target, overwrite=True, **OPTIONS[what]).resumed == done > 0
        assert_done(target, expected)


@pytest.mark.parametrize("what", ["convert", "export"])
def test_interrupt_in_a_thread(what, made, tmp_path):
    source, expected, *_ = sources(what, made)
    with failing(5, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        WORK[what](source, tmp_path / "c", **OPTIONS[what])
    done = len(records(tmp_path / "c"))
    assert WORK[what](source, tmp_path / "c", **OPTIONS[what]).resumed == done >= 5
    assert_done(tmp_path / "c", expected)


def test_one_writer_at_a_time(made, forks, tmp_path):
    """The lock is the operating system's: it goes with the process, however that ends."""
    target = tmp_path / "c"
    for end, resumes in ((signal.SIGCONT, False), (signal.SIGKILL, True)):
        first = forks.run("convert", made.hf, target, at=20, signal=signal.SIGSTOP)
        try:
            assert first["ended"] == "stopped"
            before, done = tree(tmp_path), len(records(target))
            for source in (made.hf, made.other):
                with pytest.raises(FileExistsError, match="is being written by another process"):
                    convert(source, target)
            with pytest.raises(FileExistsError, match="is being written by another process"):
                export(made.checkpoint, target)
            assert tree(tmp_path) == before
        finally:
            os.kill(first["pid"], end)
        ended = forks.wait(first["pid"])
        if resumes:
            assert ended["ended"] == "killed"
            assert convert(made.hf, target).resumed == done > 0
        else:
            assert ended["ended"] == "exited" and "error" not in ended
        assert_done(target, made.checkpoint)
        shutil.rmtree(target)


# Continued --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["convert", "export"])
def test_only_the_rest_is_written(what, made, tmp_path, caplog):
    source, expected, *_ = sources(what, made)
    begin(what, source, tmp_path / "c", 5)
    assert "unfinished: 5 finished pieces are kept" in caplog.text
    assert "the same command continues" in caplog.text
    total = WORK[what](source, tmp_path / "whole", **OPTIONS[what]).tensors
    with failing(total - 5, AssertionError("one too many")):
        report = WORK[what](source, tmp_path / "c", **OPTIONS[what])
    assert report.resumed == 5 and "5 of them by an interrupted run" in str(report)
    assert_done(tmp_path / "c", expected)


def other_weights(source: Path) -> None:
    write_source(source, other=True)


def touched(source: Path) -> None:
    """The same bytes, but nobody knows without reading them all."""
    os.utime(source / "model.safetensors", ns=(0, 0))


def other_config(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))


@pytest.mark.parametrize("change", [other_weights, touched, other_config])
def test_a_changed_source_starts_over(change, tmp_path, caplog):
    source, target = write_source(tmp_path / "hf"), tmp_path / "c"
    begin("convert", source, target, 5)
    change(source)
    assert convert(source, target).resumed == 0
    assert "unfinished work of another kind: starting over" in caplog.text
    convert(source, tmp_path / "expected")
    assert_done(target, tmp_path / "expected")


def test_another_checkpoint_or_sharding_starts_over(made, tmp_path, caplog):
    begin("export", made.checkpoint, tmp_path / "c", 5)
    with failing(5, RuntimeError("stop")), pytest.raises(RuntimeError):
        export(made.old_checkpoint, tmp_path / "c", max_shard_bytes=SHARD)
    assert caplog.text.count("starting over") == 1
    assert export(made.old_checkpoint, tmp_path / "c").resumed == 0
    assert caplog.text.count("starting over") == 2
    assert [p.name for p in (tmp_path / "c").glob("*.safetensors")] == ["model.safetensors"]


def test_a_new_tokenizer_is_taken(tmp_path):
    """Small files are no part of what is continued."""
    source, target = write_source(tmp_path / "hf"), tmp_path / "c"
    begin("convert", source, target, 5)
    golden.write_tokenizer(source, 50)
    (source / "merges.txt").write_text("new")
    assert convert(source, target).resumed == 5
    convert(source, tmp_path / "expected")
    assert_done(target, tmp_path / "expected")


def test_a_removed_tokenizer_file_is_not_kept(tmp_path):
    source, target = write_source(tmp_path / "hf"), tmp_path / "c"
    convert(source, tmp_path / "expected")
    (source / "merges.txt").write_text("to be removed")
    with full_disk_for(SMALL["convert"]), pytest.raises(OSError):
        convert(source, target)
    (source / "merges.txt").unlink()
    convert(source, target)
    assert_done(target, tmp_path / "expected")


@pytest.mark.parametrize("cut", ["", '{"sha256": "1f', "\0" * 40], ids=["empty", "half", "zeros"])
@pytest.mark.parametrize("what", ["convert", "export"])
def test_a_record_cut_short_counts_as_none(what, cut, made, tmp_path):
    source, expected, *_ = sources(what, made)
    begin(what, source, tmp_path / "c", 5)
    name = records(tmp_path / "c")[2]
    (hidden(tmp_path / "c") / "finished" / f"{name}.json").write_text(cut)
    assert WORK[what](source, tmp_path / "c", **OPTIONS[what]).resumed == 4
    assert_done(tmp_path / "c", expected)


def test_a_key_cut_short_starts_over(made, tmp_path):
    begin("convert", made.hf, tmp_path / "c", 5)
    (hidden(tmp_path / "c") / "key.json").write_text('{"by": "conv')
    assert convert(made.hf, tmp_path / "c").resumed == 0
    assert_done(tmp_path / "c", made.checkpoint)


# A full disk ------------------------------------------------------------------------------------


class FullDisk:
    """An array on a full disk, as TensorStore reports it."""

    def __getitem__(self, part):
        return self

    def write(self, *args, **kwargs):
        return self

    def result(self):
        raise ValueError(
            'RESOURCE_EXHAUSTED: Error writing local file "c/0": Failed writing: "c/0.__lock": '
            "Failed to write 387732 bytes to file 3: No space left on device [os_error_code='28']"
        )


def assert_says_what_to_do(error: OSError, target: Path) -> None:
    assert error.errno == errno.ENOSPC
    for part in (str(target), "finished pieces are kept", "free space", "same command again"):
        assert part in str(error)


@pytest.mark.parametrize("at", ["opening", "writing"])
def test_disk_full(at, made, tmp_path, monkeypatch):
    create, calls = zarr.create_array, itertools.count()

    def full(*args):
        if next(calls) < 5:
            return create(*args)
        return FullDisk() if at == "writing" else FullDisk().result()

    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(zarr, "create", full)
        convert(made.hf, tmp_path / "c", max_memory=ONE_THREAD)
    assert_says_what_to_do(error.value, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert convert(made.hf, tmp_path / "c").resumed == 5
    assert_done(tmp_path / "c", made.checkpoint)


@pytest.mark.parametrize(
    "what, name",
    [
        ("convert", "ln_f.bias.json"),
        ("export", "transformer.ln_f.bias.json"),
        *SMALL.items(),
    ],
)
def test_disk_full_for_a_small_file(what, name, made, tmp_path):
    source, expected, *_ = sources(what, made)
    with full_disk_for(name), pytest.raises(OSError) as error:
        WORK[what](source, tmp_path / "c", **OPTIONS[what])
    assert not (tmp_path / "c").exists() and len(records(tmp_path / "c")) > 5
    assert_says_what_to_do(error.value, tmp_path / "c")
    WORK[what](source, tmp_path / "c", **OPTIONS[what])
    assert_done(tmp_path / "c", expected)


def fill_disk(what: str, source: str, folder: str, below: str, out: str) -> None:
    """Runs on a disk of a few pages, which grows after every failure; prints how they failed."""
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, "size=8k", "tmpfs", folder], check=True)
    target = Path(folder, below, "c")
    atomic.require_space = lambda *_: None  # it would refuse to begin
    failures, report = [], None
    for pages in range(2, 1000, 4):
        subprocess.run([*mount, f"remount,size={4 * pages}k", "tmpfs", folder], check=True)
        try:
            report = WORK[what](source, target, **OPTIONS[what])
            break
        except Exception as error:
            assert not target.exists()
            kind, number = type(error).__name__, getattr(error, "errno", None)
            failures.append([kind, number, str(error), len(records(target))])
    print(json.dumps([failures, report.resumed]))
    shutil.copytree(target, out)


@pytest.fixture
def small_disk(tmp_path):
    """Calls `fill_disk`."""
    private = ["unshare", "-r", "-m"]
    try:
        with tempfile.TemporaryDirectory(prefix="d") as folder:  # a short path
            mount = ["mount", "-t", "tmpfs", "tmpfs", folder]
            subprocess.run([*private, *mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small disk: {error}")

    def fill(what: str, source: Path, below: str) -> tuple[list, int]:
        out = tmp_path / "copied" / "c"
        out.parent.mkdir()
        program = [sys.executable, __file__, "fill_disk", what, source]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        with tempfile.TemporaryDirectory(prefix="d") as folder:
            done = subprocess.run(
                [*private, *program, folder, below, out], stdout=subprocess.PIPE, env=env
            )
        assert done.returncode == 0
        return json.loads(done.stdout), out

    return fill


@pytest.mark.parametrize(
    "what, below",
    [
        ("convert", ""),
        ("export", ""),
        ("convert", "a-folder-with-a-name-of-no-uncommon-length/another"),
    ],
)
def test_disk_really_full(what, below, made, small_disk):
    source, expected, *_ = sources(what, made)
    (failures, resumed), out = small_disk(what, source, below)
    assert {(kind, number) for kind, number, *_ in failures} == {("OSError", errno.ENOSPC)}
    explained = [text for _, _, text, _ in failures if "run the same command again" in text]
    assert len(explained) > 5
    kept = [count for *_, count in failures]
    assert kept == sorted(kept) and len(set(kept)) > 3 and resumed == kept[-1] > 0
    assert_done(out, expected)


@pytest.mark.parametrize("what", ["convert", "export"])
def test_too_little_space_is_seen_at_once(what, made, tmp_path, monkeypatch):
    source, expected, *_ = sources(what, made)
    size = sum(
        x.size * x.dtype.itemsize for x in metadata.read_metadata(made.checkpoint).leaves.values()
    )
    begin(what, source, tmp_path / "c", 3)
    Usage = namedtuple("Usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, size // 2))
        with (
            failing(0, AssertionError("writes")),
            pytest.raises(OSError, match="are free") as error,
        ):
            WORK[what](source, tmp_path / "new", **OPTIONS[what])
        assert error.value.errno == errno.ENOSPC and str(tmp_path / "new") in str(error.value)
        assert not (tmp_path / "new").exists() and records(tmp_path / "new") == []
        # What is there already needs no space again.
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, size - 100))
        assert WORK[what](source, tmp_path / "c", **OPTIONS[what]).resumed == 3
    assert_done(tmp_path / "c", expected)


# NaN and Inf ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, nan, inf",
    [
        (np.dtype(np.float32), 0xFFC00123, 0xFF800000),
        (np.dtype(ml_dtypes.bfloat16), 0xFFC1, 0xFF80),
        (np.dtype(np.float16), 0xFE23, 0xFC00),
    ],
    ids=str,
)
def test_nonfinite(dtype, nan, inf, tmp_path, caplog):
    """Refused with all names; allowed, they keep their bits (a NaN has a sign and a payload)."""
    bits = {2: np.uint16, 4: np.uint32}[dtype.itemsize]
    bad = {"transformer.h.0.mlp.c_fc.weight": (nan, 3), "transformer.ln_f.bias": (inf, 1)}

    def change(w):
        for name, (value, count) in bad.items():
            w[name].reshape(-1).view(bits)[-count:] = value

    source = write_source(tmp_path / "hf", dtype=dtype, change=change)
    with pytest.raises(ValueError, match="NaN or Inf in 2 tensors") as error:
        convert(source, tmp_path / "c")
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert sorted(lines[1:-1]) == [f"{name}: {count}" for name, (_, count) in bad.items()]
    assert "--allow-nonfinite" in lines[-1]
    assert not (tmp_path / "c").exists()
    caplog.clear()
    report = convert(source, tmp_path / "c", allow_nonfinite=True)
    assert report.resumed == report.tensors and report.dtypes == {dtype.name: report.tensors}
    warned = "".join(r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert all(f"{name}: {count}" in warned for name, (_, count) in bad.items())
    convert(source, tmp_path / "whole", allow_nonfinite=True)
    assert_done(tmp_path / "c", tmp_path / "whole")
    export(tmp_path / "c", tmp_path / "back")
    original, back = open_hf(source), open_hf(tmp_path / "back")
    assert set(original.tensors) == set(back.tensors)
    for name in original.tensors:
        assert original.read_tensor(name).tobytes() == back.read_tensor(name).tobytes(), name


# Memory -----------------------------------------------------------------------------------------


def test_too_little_memory(made, tmp_path):
    with pytest.raises(ValueError, match=r"max_memory: found .*, expected at least 80.0 MiB"):
        convert(made.hf, tmp_path / "c", max_memory=ONE_THREAD // 2)
    # An export needs less where all arrays are small.
    with pytest.raises(ValueError, match=r"max_memory: found 1000 B, expected at least"):
        export(made.checkpoint, tmp_path / "c", max_memory=1000)
    assert list(tmp_path.iterdir()) == []


def test_save_leaves_nothing_of_a_failure(made, tmp_path):
    """Weights in memory cannot be known again, so `save` starts anew each time."""
    model, params = btlm.load(made.checkpoint)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error, said in ((OSError("broken"), "broken"), (full, f"{tmp_path / 'c'}; nothing of it")):
        with failing(3, error), pytest.raises(OSError, match=said):
            checkpoint.save(tmp_path / "c", model.config, params)
        assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    {"serve": serve, "fill_disk": fill_disk}[sys.argv[1]](*sys.argv[2:])
