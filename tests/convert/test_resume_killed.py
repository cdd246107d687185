"""Conversions and exports that are killed at any point resume to the same bytes."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal

import pytest

import btlm_jax as btlm
from btlm_jax.checkpoint import metadata
from support.conversion_runs import (
    LAST_FILE,
    assert_complete,
    assert_same_tree,
    disk_full_for,
    file_identities,
    finished_files,
    finished_pieces,
    hidden_sibling,
    interrupt_after,
    read_tree,
    run,
)
from support.fork_server import fork_server

WORKS = pytest.mark.parametrize("work", ["convert", "export"])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("needs Linux")
    with fork_server("support.conversion_runs", tmp_path_factory.mktemp("forks")) as server:
        yield server


@WORKS
def test_a_run_killed_before_any_change_resumes(work, conversions, server, tmp_path):
    """Killed before its first, second, ... change of the file system."""
    source, expected = conversions.source_and_result(work)
    uninterrupted = server.run(work, source, tmp_path / "uninterrupted", at=-1)
    changes, total = uninterrupted["changes"], uninterrupted["tensors"]
    assert_complete(tmp_path / "uninterrupted", expected)
    # Every change up to the second tensor, then samples.
    second = [i for i, (_, path) in enumerate(changes) if "/finished/" in path][2]
    renamed = max(i for i, (event, _) in enumerate(changes) if event == "os.rename")
    samples = [*range(second, renamed, 10), renamed, *range(renamed + 1, len(changes), 20)]
    resumed, complete = set(), 0
    for at, target in server.kill_at(work, source, tmp_path, [*range(second), *samples]):
        if at > renamed:  # only leftovers remained to be removed
            complete += 1
            assert_same_tree(target, expected)
            with pytest.raises(FileExistsError):
                run(work, source, target)
            run(work, source, target, overwrite=True)
        else:
            assert not target.exists()
            with pytest.raises(FileNotFoundError):
                btlm.load(target)
            pieces, files = finished_pieces(target), finished_files(target)
            assert run(work, source, target).resumed == len(pieces)
            assert files.items() <= file_identities(target, target.rglob("*")).items()
            resumed.add(len(pieces))
        assert_complete(target, expected)
    assert resumed >= {0, 1, total} and len(resumed) > 5 and complete > 1


@WORKS
def test_a_run_killed_while_replacing_leaves_the_old_or_the_new_target(
    work, conversions, server, tmp_path
):
    """Killed before any change after the last tensor."""
    source, new = conversions.source_and_result(work)
    _, old = conversions.negated(work)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(old, unfinished / "c")
    with disk_full_for(LAST_FILE[work]), pytest.raises(OSError):
        run(work, source, unfinished / "c", overwrite=True)
    shutil.copytree(unfinished, tmp_path / "uninterrupted")
    uninterrupted = server.run(work, source, tmp_path / "uninterrupted/c", overwrite=True)
    assert uninterrupted["resumed"] == uninterrupted["tensors"]
    changes = uninterrupted["changes"]
    renamed = [i for i, (event, _) in enumerate(changes) if event == "os.rename"][-1]
    states, points = [], [*range(renamed + 2), *range(renamed + 2, len(changes), 20)]
    for at in points:
        shutil.copytree(unfinished, tmp_path / str(at))
    for at, target in server.kill_at(work, source, tmp_path, points, overwrite=True):
        if not target.exists():
            states.append("set aside")
            with pytest.raises(FileNotFoundError, match=r"\.c\.replaced: the same command continu"):
                metadata.read_metadata(target)
            with disk_full_for(LAST_FILE[work]), pytest.raises(OSError):  # the next run fails too
                run(work, source, target, overwrite=True)
            assert_same_tree(hidden_sibling(target, "replaced"), old)
        elif at < renamed:
            states.append("old")
            with pytest.raises(FileExistsError):
                run(work, source, target)
            assert_same_tree(target, old)
        else:
            states.append("new")
            assert_same_tree(target, new)
        run(work, source, target, overwrite=True)
        assert_complete(target, new)
    assert states.count("set aside") == 1 and states.count("old") > 5 and states.count("new") > 2


@pytest.mark.parametrize("work, kills", [("convert", 12), ("export", 6)])
def test_runs_killed_at_random_moments_resume(work, kills, conversions, server, tmp_path):
    """Several threads, and moments between file system changes; runs are killed repeatedly."""
    source, expected = conversions.source_and_result(work)
    seconds = min(server.run(work, source, tmp_path / f"w{i}")["seconds"] for i in range(3))
    rng, killed, resumed = random.Random(0), 0, set()
    for target in (tmp_path / f"c{i}" for i in itertools.count()):
        files: dict[str, tuple[int, int]] = {}
        pieces = 0
        while not target.exists():
            answer = server.run(work, source, target, after=rng.uniform(0, 1.25 * seconds))
            killed += answer["ended"] == "killed"
            resumed.add(pieces)
            if not target.exists():
                assert answer["ended"] == "killed"
                with pytest.raises(FileNotFoundError):
                    btlm.load(target)
                assert len(finished_pieces(target)) >= pieces
                pieces, known = len(finished_pieces(target)), files
                files = finished_files(target)
                assert known.items() <= files.items()  # not written again
            elif answer["ended"] == "exited":
                assert answer["resumed"] == pieces
                assert_complete(target, expected)
        assert_same_tree(target, expected)
        assert files.items() <= file_identities(target, target.rglob("*")).items()
        if killed >= kills:
            break
    assert max(resumed) > 0


@WORKS
def test_a_run_killed_while_starting_over_leaves_nothing_wrong(work, conversions, server, tmp_path):
    """The killed run deletes the unfinished work on another source, which then is resumed."""
    source, expected = conversions.source_and_result(work)
    other, _ = conversions.negated(work)
    interrupt_after(3, work, source, tmp_path / "c")
    changes = server.run(work, other, tmp_path / "c", at=-1)["changes"]
    started = [path for _, path in changes].index(".c.partial/key.json.new")
    wrong, points = [], range(0, started + 1, 6)
    for at in points:
        interrupt_after(3, work, source, tmp_path / str(at) / "c")
    for at, target in server.kill_at(work, other, tmp_path, points):
        run(work, source, target)
        if read_tree(target) != read_tree(expected):
            wrong.append(changes[at])
    assert wrong == []


@WORKS
def test_a_run_interrupted_from_the_keyboard_resumes(work, conversions, server, tmp_path):
    """While threads are at work, or the main thread writes the last files."""
    source, expected = conversions.source_and_result(work)
    _, old = conversions.negated(work)
    shutil.copytree(old, tmp_path / "c")
    changes = server.run(work, source, tmp_path / "c", overwrite=True, at=-1)["changes"]
    renames = [i for i, (event, _) in enumerate(changes) if event == "os.rename"]
    assert [changes[i][1] for i in renames[-2:]] == ["c", ".c.partial/c"]
    for at in (renames[3], renames[-9], renames[-3], *renames[-2:]):
        target = tmp_path / str(at) / "c"
        shutil.copytree(old, target)
        answer = server.run(work, source, target, at=at, signal=signal.SIGINT, overwrite=True)
        assert answer["ended"] == "exited" and answer["error"] == "KeyboardInterrupt()"
        assert_same_tree(target, old)
        assert not hidden_sibling(target, "replaced").exists()
        pieces = len(finished_pieces(target))
        assert run(work, source, target, overwrite=True).resumed == pieces > 0
        assert_complete(target, expected)


def test_only_one_process_writes_a_target(conversions, server, tmp_path):
    """The lock is the operating system's: it ends with the process, however that ends."""
    target, expected = tmp_path / "c", conversions.checkpoint
    for end, resumes in ((signal.SIGCONT, False), (signal.SIGKILL, True)):
        first = server.run("convert", conversions.hf, target, at=20, signal=signal.SIGSTOP)
        try:
            assert first["ended"] == "stopped"
            before, pieces = read_tree(tmp_path), len(finished_pieces(target))
            for work, source in (
                ("convert", conversions.hf),
                ("convert", conversions.negated_hf),
                ("export", conversions.checkpoint),
            ):
                with pytest.raises(FileExistsError, match="is being written by another process"):
                    run(work, source, target)
            assert read_tree(tmp_path) == before
        finally:
            os.kill(first["pid"], end)
        answer = server.wait(first["pid"])
        if resumes:
            assert answer["ended"] == "killed"
            assert run("convert", conversions.hf, target).resumed == pieces > 0
        else:
            assert answer["ended"] == "exited" and "error" not in answer
        assert_complete(target, expected)
        shutil.rmtree(target)
