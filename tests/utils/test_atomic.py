"""Directories that appear whole or not at all."""

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


def ours(path) -> bool:
    return (path / "mine").exists()


def new(path, *, overwrite=False, key=None):
    return atomic.new_directory(path, overwrite=overwrite, ours=ours, key=key)


def write(path, text: str, **options) -> None:
    with new(path, **options) as stage:
        (stage.content / "mine").write_text(text)


def interrupt(path, *pieces: str, key=KEY, **options) -> None:
    """Leaves unfinished work."""
    with contextlib.suppress(KeyboardInterrupt), new(path, key=key, **options) as stage:
        for name in pieces:
            (stage.content / name).write_text(name)
            stage.record(name, {"name": name})
        (stage.content / "unfinished").write_text("half of")
        raise KeyboardInterrupt


def interrupt_with(error: BaseException, path, key) -> None:
    with new(path, key=key):
        raise error


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture
def c(tmp_path) -> Path:
    return tmp_path / "c"


def test_appears_when_done(c):
    with new(c) as stage:
        assert stage.finished == {} and names(stage.content) == []
        (stage.content / "mine").write_text("x")
        assert not c.exists()
        assert stage.content.parent.parent == epath.Path(c.parent)  # the same file system
    assert names(c.parent) == ["c"] and (c / "mine").read_text() == "x"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_without_key_leaves_nothing(c, error):
    with pytest.raises(error), new(c) as stage:
        (stage.content / "folder").mkdir()
        (stage.content / "folder/file").write_text("x")
        stage.record("piece", {})
        raise error
    assert names(c.parent) == []


def test_a_failure_with_key_keeps_the_pieces(c, caplog):
    interrupt(c, "a", "b")
    assert names(c.parent) == [".c.partial"]
    assert "unfinished: 2 finished pieces are kept" in caplog.text
    assert atomic.leftovers(c) == [c.parent / ".c.partial"]
    with new(c, key=json.loads(json.dumps(KEY))) as stage:  # a tuple is a list in JSON
        assert stage.finished == {"a": {"name": "a"}, "b": {"name": "b"}}
        assert (stage.content / "a").read_text() == "a"
        stage.record("c", {"name": "c"})
        assert sorted(stage.finished) == ["a", "b", "c"]
    assert names(c.parent) == ["c"] and names(c) == ["a", "b", "unfinished"]


def test_every_piece_is_kept_however_often_it_fails(c):
    interrupt(c, "a")
    interrupt(c, "b")
    with new(c, key=KEY) as stage:
        assert sorted(stage.finished) == ["a", "b"]


def test_threads_record_at_once(c):
    def record(stage, i):
        for j in range(20):
            stage.record(f"{i}.{j}", {"i": i, "j": j})

    with pytest.raises(RuntimeError), new(c, key=KEY) as stage:
        threads = [threading.Thread(target=record, args=(stage, i)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        raise RuntimeError
    with new(c, key=KEY) as stage:
        assert stage.finished == {f"{i}.{j}": {"i": i, "j": j} for i in range(8) for j in range(20)}


@pytest.mark.parametrize("key", [KEY | {"source": "b"}, None])
def test_another_key_starts_over(c, key, caplog):
    interrupt(c, "a")
    with new(c, key=key) as stage:
        assert stage.finished == {} and names(stage.content) == []
    assert "unfinished work of another kind: starting over" in caplog.text
    assert names(c.parent) == ["c"] and names(c) == []


def test_a_killed_run_without_key_leaves_nothing_to_the_next(c):
    (c.parent / ".c.partial/c/folder").mkdir(parents=True)
    (c.parent / ".c.partial/c/folder/file").write_text("half")
    (c.parent / ".c.partial/c/other").write_text("half")
    write(c, "x")
    assert names(c) == ["mine"] and names(c.parent) == ["c"]


@pytest.mark.parametrize("text", ["", '{"name"', "null"])
def test_a_record_cut_short_is_none(c, text):
    interrupt(c, "a", "b")
    (c.parent / ".c.partial/finished/a.json").write_text(text)
    with new(c, key=KEY) as stage:
        assert sorted(stage.finished) == ["b"]


def test_records_without_their_content_are_none(c):
    interrupt(c, "a")
    shutil.rmtree(c.parent / ".c.partial/c")
    with new(c, key=KEY) as stage:
        assert stage.finished == {}


# Taken names -----------------------------------------------------------------------------------


def test_existing(c):
    write(c, "old")
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        write(c, "new")
    assert (c / "mine").read_text() == "old"
    write(c, "new", overwrite=True)
    assert (c / "mine").read_text() == "new" and names(c.parent) == ["c"]


def test_a_failure_to_replace_leaves_the_old(c):
    write(c, "old")
    for key in (None, KEY):
        interrupt(c, "a", key=key, overwrite=True)
        assert (c / "mine").read_text() == "old"
    write(c, "new", overwrite=True, key=KEY)
    assert (c / "mine").read_text() == "new" and names(c.parent) == ["c"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_what_is_not_ours_is_never_replaced(c, kind, overwrite):
    if kind == "file":
        c.write_text("precious")
    else:
        c.mkdir()
        if kind == "folder":
            (c / "precious").write_text("precious")
    for refuse in (
        lambda: atomic.refuse_existing(c, overwrite=overwrite, ours=ours),
        lambda: write(c, "new", overwrite=overwrite),
    ):
        match = "was not written by this command" if overwrite else "exists: choose another name"
        with pytest.raises(FileExistsError, match=match):
            refuse()
    assert names(c.parent) == ["c"]
    assert kind == "empty folder" or (c / "precious" if c.is_dir() else c).read_text() == "precious"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_is_not_replaced(c, overwrite):
    with pytest.raises(FileExistsError), new(c, overwrite=overwrite, key=KEY) as stage:
        (stage.content / "mine").write_text("x")
        c.mkdir()
        (c / "precious").write_text("precious")
    assert names(c) == ["precious"]
    shutil.rmtree(c)
    with new(c, key=KEY) as stage:
        assert names(stage.content) == ["mine"]


def failing_rename(monkeypatch, error: BaseException, *, before: str = "", after: str = "") -> None:
    """The renaming of `before` fails, or that to `after` is interrupted when it is done."""

    def rename(a, b, real=os.rename):
        if before and os.fspath(a).endswith(before):
            raise error
        real(a, b)
        if after and os.fspath(b).endswith(after):
            raise error

    monkeypatch.setattr(os, "rename", rename)


def test_if_it_cannot_take_the_name_the_old_one_has_it_back(c, monkeypatch):
    write(c, "old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="broken"):
        failing_rename(patch, OSError("broken"), before=".c.partial/c")
        write(c, "new", overwrite=True, key=KEY)
    assert (c / "mine").read_text() == "old" and names(c.parent) == [".c.partial", "c"]
    with new(c, overwrite=True, key=KEY) as stage:
        assert (stage.content / "mine").read_text() == "new"
    assert names(c.parent) == ["c"]


def test_interrupted_between_the_two_renames(c, monkeypatch):
    write(c, "old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        failing_rename(patch, KeyboardInterrupt(), after=".replaced")
        write(c, "new", overwrite=True)
    assert names(c.parent) == ["c"] and (c / "mine").read_text() == "old"


def test_what_a_killed_run_put_aside(c):
    """It is kept while it is the only one, and goes when the new one is there."""
    write(c.parent / ".c.replaced", "old")
    assert atomic.leftovers(c) == [c.parent / ".c.replaced"]
    with pytest.raises(FileNotFoundError, match=r"an interrupted run left .*\.c\.replaced"):
        metadata.read_metadata(c)
    interrupt(c, "a", key=None)
    assert (c.parent / ".c.replaced/mine").read_text() == "old"
    write(c, "new")
    assert names(c.parent) == ["c"] and (c / "mine").read_text() == "new"
    # A run killed while it removed it.
    write(c.parent / ".c.replaced", "old")
    write(c, "newer", overwrite=True)
    assert names(c.parent) == ["c"] and (c / "mine").read_text() == "newer"


def test_one_writer_at_a_time(c):
    with new(c, key=KEY) as stage:
        (stage.content / "mine").write_text("first")
        for key in (KEY, None):
            with pytest.raises(FileExistsError, match="is being written by another process"):
                write(c, "second", key=key)
        assert (stage.content / "mine").read_text() == "first"
        write(c.parent / "d", "another name")
    assert (c / "mine").read_text() == "first" and names(c.parent) == ["c", "d"]


# Links and URLs --------------------------------------------------------------------------------


def test_a_link_stays_a_link(tmp_path):
    """Say, a fixed name for the newest, on another disk: the work is done there."""
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to("disk/c")
    interrupt(link, "a")
    assert names(tmp_path / "disk") == [".c.partial"]
    assert atomic.leftovers(link) == [tmp_path / "disk/.c.partial"]
    write(link, "x", key=KEY)  # where the link led to nothing
    with pytest.raises(FileExistsError):
        write(link, "y")
    write(link, "y", overwrite=True)
    assert link.is_symlink() and names(tmp_path) == ["disk", "link"]
    assert (tmp_path / "disk/c/mine").read_text() == "y" and names(tmp_path / "disk") == ["c"]
    assert atomic.leftovers(link) == []


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("relative/deep/c", "x")
    write(f"file://{tmp_path}/with%20space", "x")
    write(f"{tmp_path}/slash/", "x")
    assert names(tmp_path) == ["relative", "slash", "with space"]
    assert atomic.leftovers(tmp_path / "nothing") == []


# Space -----------------------------------------------------------------------------------------


def test_require_space(tmp_path, monkeypatch):
    asked = []
    Usage = namedtuple("Usage", "total used free")

    def disk_usage(path):
        asked.append(Path(path))
        return Usage(10_000, 9_000, 1_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    atomic.require_space(tmp_path / "not/yet/there", 1_000)
    with pytest.raises(OSError, match="1001 B are to be written, 1000 B are free") as error:
        atomic.require_space(tmp_path / "not/yet/there", 1_001)
    assert error.value.errno == errno.ENOSPC
    assert asked == [tmp_path, tmp_path]


@pytest.mark.parametrize(
    "key, said, left",
    [
        (
            KEY,
            "the finished pieces are kept: free space, then run the same command",
            [".c.partial"],
        ),
        (None, "nothing of it is kept: free space or choose another disk", []),
    ],
)
def test_full_disk(c, key, said, left):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")
    with pytest.raises(OSError, match=f"no space left while writing {c}; {said}") as error:
        interrupt_with(full, c, key)
    assert error.value.errno == errno.ENOSPC and error.value.__cause__ is full
    assert names(c.parent) == left
    # What says so itself, and every other failure, is left as it is.
    short = OSError(errno.ENOSPC, "1001 B are to be written; free space or choose another disk")
    for other in (short, OSError(errno.EIO, "broken"), ValueError("no space")):
        with pytest.raises(type(other)) as error:
            interrupt_with(other, c, key)
        assert error.value is other


def test_too_full_to_begin(c, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "make_directory", full)
    with pytest.raises(OSError, match="no space left while writing"):
        write(c, "x", key=KEY)


# Small files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "x" * 100_000, "ü€\n\r\n"])
def test_write_text(tmp_path, text):
    path = epath.Path(tmp_path / "file")
    for _ in range(2):  # new, and over another
        atomic.write_text(path, text)
        assert (tmp_path / "file").read_bytes() == text.encode()
        assert names(tmp_path) == ["file"]
        path.write_text("another")


@pytest.mark.parametrize("at", ["fsync", "rename"])
def test_write_text_is_atomic(tmp_path, monkeypatch, at):
    """Whenever it fails, there is the old text; and it is on the disk before it has the name."""
    path, calls = epath.Path(tmp_path / "file"), []
    path.write_text("old")

    def record(name, *args, real):
        calls.append(name)
        if name == at:
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
