"""Directories that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
from etils import epath

from btlm_jax.checkpoint import metadata
from btlm_jax.utils import atomic

KEY = {"source": "a", "sizes": (1, 2)}


def is_ours(path) -> bool:
    return (path / "mine").exists()


def new_directory(path, *, overwrite=False, key=None):
    return atomic.new_directory(path, overwrite=overwrite, ours=is_ours, key=key)


def write_mine(path, text: str, **options) -> None:
    with new_directory(path, **options) as stage:
        (stage.content / "mine").write_text(text)


def interrupt(path, *pieces: str, key=KEY, **options) -> None:
    """Leaves unfinished work behind."""
    with contextlib.suppress(KeyboardInterrupt), new_directory(path, key=key, **options) as stage:
        for name in pieces:
            (stage.content / name).write_text(name)
            stage.record(name, {"name": name})
        (stage.content / "unfinished").write_text("half of")
        raise KeyboardInterrupt


def interrupt_with(error: BaseException, path, key) -> None:
    with new_directory(path, key=key):
        raise error


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture
def c(tmp_path) -> Path:
    return tmp_path / "c"


def test_a_directory_appears_when_the_block_ends(c):
    with new_directory(c) as stage:
        assert stage.finished == {} and names(stage.content) == []
        (stage.content / "mine").write_text("x")
        assert not c.exists()
        assert stage.content.parent.parent == epath.Path(c.parent)  # the same file system
    assert names(c.parent) == ["c"] and (c / "mine").read_text() == "x"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_without_key_leaves_nothing(c, error):
    with pytest.raises(error), new_directory(c) as stage:
        (stage.content / "folder").mkdir()
        (stage.content / "folder/file").write_text("x")
        stage.record("piece", {})
        raise error
    assert names(c.parent) == []


def test_a_failure_with_key_keeps_finished_pieces(c, caplog):
    interrupt(c, "a", "b")
    assert names(c.parent) == [".c.partial"]
    assert "unfinished: 2 finished pieces are kept" in caplog.text
    assert atomic.leftovers(c) == [c.parent / ".c.partial"]
    with new_directory(c, key=json.loads(json.dumps(KEY))) as stage:  # a tuple is a list in JSON
        assert stage.finished == {"a": {"name": "a"}, "b": {"name": "b"}}
        assert (stage.content / "a").read_text() == "a"
        stage.record("c", {"name": "c"})
        assert sorted(stage.finished) == ["a", "b", "c"]
    assert names(c.parent) == ["c"] and names(c) == ["a", "b", "unfinished"]


def test_finished_pieces_are_kept_over_several_failures(c):
    interrupt(c, "a")
    interrupt(c, "b")
    with new_directory(c, key=KEY) as stage:
        assert sorted(stage.finished) == ["a", "b"]


def test_threads_record_pieces_concurrently(c):
    def record(stage, i):
        for j in range(20):
            stage.record(f"{i}.{j}", {"i": i, "j": j})

    with pytest.raises(RuntimeError), new_directory(c, key=KEY) as stage:
        threads = [threading.Thread(target=record, args=(stage, i)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        raise RuntimeError
    with new_directory(c, key=KEY) as stage:
        assert stage.finished == {f"{i}.{j}": {"i": i, "j": j} for i in range(8) for j in range(20)}


@pytest.mark.parametrize("key", [KEY | {"source": "b"}, None])
def test_another_key_starts_over(c, key, caplog):
    interrupt(c, "a")
    with new_directory(c, key=key) as stage:
        assert stage.finished == {} and names(stage.content) == []
    assert "unfinished work of another kind: starting over" in caplog.text
    assert names(c.parent) == ["c"] and names(c) == []


def test_files_of_a_killed_run_without_key_are_discarded(c):
    (c.parent / ".c.partial/c/folder").mkdir(parents=True)
    (c.parent / ".c.partial/c/folder/file").write_text("half")
    (c.parent / ".c.partial/c/other").write_text("half")
    write_mine(c, "x")
    assert names(c) == ["mine"] and names(c.parent) == ["c"]


@pytest.mark.parametrize(
    "text", ["", '{"name"', "null", "[]", "{}", '{"sha256": "0", "record": "{}"}', "\0" * 9]
)
def test_a_damaged_record_is_ignored_with_a_warning(c, text, caplog):
    interrupt(c, "a", "b")
    (c.parent / ".c.partial/finished/a.json").write_text(text)
    with new_directory(c, key=KEY) as stage:
        assert sorted(stage.finished) == ["b"]
    assert "1 damaged records; their pieces are written again" in caplog.text


def test_a_damaged_key_starts_over_with_a_warning(c, caplog):
    interrupt(c, "a", "b")
    (c.parent / ".c.partial/key.json").write_text("")
    with new_directory(c, key=KEY) as stage:
        assert not stage.finished
    assert "key.json is missing or damaged" in caplog.text


def test_records_without_content_are_ignored(c):
    interrupt(c, "a")
    shutil.rmtree(c.parent / ".c.partial/c")
    with new_directory(c, key=KEY) as stage:
        assert stage.finished == {}


# Taken names -----------------------------------------------------------------------------------


def test_an_existing_directory_is_replaced_only_with_overwrite(c):
    write_mine(c, "old")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        write_mine(c, "new")
    assert (c / "mine").read_text() == "old"
    write_mine(c, "new", overwrite=True)
    assert (c / "mine").read_text() == "new" and names(c.parent) == ["c"]


def test_a_failed_replacement_keeps_the_old_directory(c):
    write_mine(c, "old")
    for key in (None, KEY):
        interrupt(c, "a", key=key, overwrite=True)
        assert (c / "mine").read_text() == "old"
    write_mine(c, "new", overwrite=True, key=KEY)
    assert (c / "mine").read_text() == "new" and names(c.parent) == ["c"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_foreign_directories_are_never_replaced(c, kind, overwrite):
    if kind == "file":
        c.write_text("precious")
    else:
        c.mkdir()
        if kind == "folder":
            (c / "precious").write_text("precious")
    for refuse in (
        lambda: atomic.refuse_existing(c, overwrite=overwrite, ours=is_ours),
        lambda: write_mine(c, "new", overwrite=overwrite),
    ):
        match = "was not written by this command" if overwrite else "exists: choose another name"
        with pytest.raises(FileExistsError, match=match):
            refuse()
    assert names(c.parent) == ["c"]
    assert kind == "empty folder" or (c / "precious" if c.is_dir() else c).read_text() == "precious"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_appears_meanwhile_is_not_replaced(c, overwrite):
    with pytest.raises(FileExistsError), new_directory(c, overwrite=overwrite, key=KEY) as stage:
        (stage.content / "mine").write_text("x")
        c.mkdir()
        (c / "precious").write_text("precious")
    assert names(c) == ["precious"]
    shutil.rmtree(c)
    with new_directory(c, key=KEY) as stage:
        assert names(stage.content) == ["mine"]


def failing_rename(monkeypatch, error: BaseException, *, before: str = "", after: str = "") -> None:
    """Makes the rename of `before` fail, or interrupts the one to `after` once it is done."""

    def rename(source, target, real=os.rename):
        if before and os.fspath(source).endswith(before):
            raise error
        real(source, target)
        if after and os.fspath(target).endswith(after):
            raise error

    monkeypatch.setattr(os, "rename", rename)


def test_the_old_directory_is_restored_if_the_rename_fails(c, monkeypatch):
    write_mine(c, "old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="broken"):
        failing_rename(patch, OSError("broken"), before=".c.partial/c")
        write_mine(c, "new", overwrite=True, key=KEY)
    assert (c / "mine").read_text() == "old" and names(c.parent) == [".c.partial", "c"]
    with new_directory(c, overwrite=True, key=KEY) as stage:
        assert (stage.content / "mine").read_text() == "new"
    assert names(c.parent) == ["c"]


def test_the_old_directory_is_restored_if_the_replacement_is_interrupted(c, monkeypatch):
    write_mine(c, "old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        failing_rename(patch, KeyboardInterrupt(), after=".replaced")
        write_mine(c, "new", overwrite=True)
    assert names(c.parent) == ["c"] and (c / "mine").read_text() == "old"


def test_a_backup_of_a_killed_run_is_kept_until_the_new_directory_is_complete(c):
    write_mine(c.parent / ".c.replaced", "old")
    assert atomic.leftovers(c) == [c.parent / ".c.replaced"]
    with pytest.raises(FileNotFoundError, match=r"an interrupted run left .*\.c\.replaced"):
        metadata.read_metadata(c)
    interrupt(c, "a", key=None)
    assert (c.parent / ".c.replaced/mine").read_text() == "old"
    write_mine(c, "new")
    assert names(c.parent) == ["c"] and (c / "mine").read_text() == "new"
    # A run that was killed while it deleted the backup.
    write_mine(c.parent / ".c.replaced", "old")
    write_mine(c, "newer", overwrite=True)
    assert names(c.parent) == ["c"] and (c / "mine").read_text() == "newer"


def test_a_second_writer_is_refused(c):
    with new_directory(c, key=KEY) as stage:
        (stage.content / "mine").write_text("first")
        for key in (KEY, None):
            with pytest.raises(FileExistsError, match="is being written by another process"):
                write_mine(c, "second", key=key)
        assert (stage.content / "mine").read_text() == "first"
        write_mine(c.parent / "d", "another name")
    assert (c / "mine").read_text() == "first" and names(c.parent) == ["c", "d"]


# Links and URLs --------------------------------------------------------------------------------


def test_a_symbolic_link_is_kept_and_its_target_replaced(tmp_path):
    """The work happens beside the target, which may be on another disk."""
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to("disk/c")
    interrupt(link, "a")
    assert names(tmp_path / "disk") == [".c.partial"]
    assert atomic.leftovers(link) == [tmp_path / "disk/.c.partial"]
    write_mine(link, "x", key=KEY)  # the target did not exist
    with pytest.raises(FileExistsError):
        write_mine(link, "y")
    write_mine(link, "y", overwrite=True)
    assert link.is_symlink() and names(tmp_path) == ["disk", "link"]
    assert (tmp_path / "disk/c/mine").read_text() == "y" and names(tmp_path / "disk") == ["c"]
    assert atomic.leftovers(link) == []


def test_relative_paths_urls_and_trailing_slashes_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_mine("relative/deep/c", "x")
    write_mine(f"file://{tmp_path}/with%20space", "x")
    write_mine(f"{tmp_path}/slash/", "x")
    assert names(tmp_path) == ["relative", "slash", "with space"]
    assert atomic.leftovers(tmp_path / "nothing") == []


# Space -----------------------------------------------------------------------------------------


def test_require_space_checks_the_nearest_existing_directory(tmp_path, monkeypatch):
    checked = []
    Usage = namedtuple("Usage", "total used free")

    def disk_usage(path):
        checked.append(Path(path))
        return Usage(10_000, 9_000, 1_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    atomic.require_space(tmp_path / "not/yet/there", 1_000)
    with pytest.raises(OSError, match="1001 B are to be written, 1000 B are free") as error:
        atomic.require_space(tmp_path / "not/yet/there", 1_001)
    assert error.value.errno == errno.ENOSPC
    assert checked == [tmp_path, tmp_path]


@pytest.mark.parametrize(
    "key, message, remaining",
    [
        (
            KEY,
            "the finished pieces are kept: free space, then run the same command",
            [".c.partial"],
        ),
        (None, "nothing of it is kept: free space or choose another disk", []),
    ],
)
def test_a_full_disk_is_explained(c, key, message, remaining):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")
    with pytest.raises(OSError, match=f"no space left while writing {c}; {message}") as error:
        interrupt_with(full, c, key)
    assert error.value.errno == errno.ENOSPC and error.value.__cause__ is full
    assert names(c.parent) == remaining
    # An error with an explanation of its own, and every other error, is passed on unchanged.
    explained = OSError(errno.ENOSPC, "1001 B are to be written; free space or choose another disk")
    for other in (explained, OSError(errno.EIO, "broken"), ValueError("no space")):
        with pytest.raises(type(other)) as error:
            interrupt_with(other, c, key)
        assert error.value is other


def test_a_disk_too_full_to_begin_is_explained(c, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "make_directory", full)
    with pytest.raises(OSError, match="no space left while writing"):
        write_mine(c, "x", key=KEY)


# Small files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "x" * 100_000, "ü€\n\r\n"])
def test_write_text_creates_and_replaces_files(tmp_path, text):
    path = epath.Path(tmp_path / "file")
    for _ in range(2):  # a new file, and an existing one
        atomic.write_text(path, text)
        assert (tmp_path / "file").read_bytes() == text.encode()
        assert names(tmp_path) == ["file"]
        path.write_text("another")


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_write_text_is_atomic(tmp_path, monkeypatch, failing):
    """A failure keeps the old text, and the new text is on disk before it is renamed."""
    path, calls = epath.Path(tmp_path / "file"), []
    path.write_text("old")

    def record(name, *args, real):
        calls.append(name)
        if name == failing:
            raise OSError(errno.ENOSPC, "full")
        return real(*args)

    for name in ("fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, real=real: record(n, *a, real=real))
    with pytest.raises(OSError, match="full"):
        atomic.write_text(path, "new")
    assert path.read_text() == "old" and calls == ["fsync", "rename"][: len(calls)]
    monkeypatch.undo()
    atomic.write_text(path, "new")
    assert path.read_text() == "new" and names(tmp_path) == ["file"]


def test_a_directory_in_place_of_a_file_is_named(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError, match=r"file'$"):
        atomic.write_text(epath.Path(tmp_path / "file"), "text")
    assert names(tmp_path) == ["file"]
