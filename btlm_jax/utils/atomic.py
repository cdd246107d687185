"""Directories that appear complete under their name, or not at all, however the writer ends.

The work happens in a hidden sibling, `.NAME.partial`, on the same file system, and takes its name
by one atomic rename. Work that names its `key` can be taken up again: every finished piece leaves a
record, and the next run with the same key is handed the records. Object stores cannot rename: there
the work happens in place, and what makes it loadable (its metadata) is written last by the caller.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import jax
from etils import epath

from btlm_jax.utils import paths
from btlm_jax.utils.format import format_bytes

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StagedDirectory:
    """Work in progress.

    Attributes:
      content: the directory to fill.
      finished: the records of pieces that this run or an interrupted one has finished, by name.
    """

    content: epath.Path
    finished: dict[str, Any]
    _records: epath.Path

    def record(self, name: str, value: Mapping[str, Any]) -> None:
        """Notes a finished piece, once its data is on disk. Threads may call it at once."""
        write_text(self._records / f"{name}.json", json.dumps(value))
        self.finished[name] = dict(value)


@contextlib.contextmanager
def new_directory(
    path: str | os.PathLike[str],
    *,
    overwrite: bool,
    ours: Callable[[epath.Path], bool],
    key: Mapping[str, Any] | None = None,
) -> Iterator[StagedDirectory]:
    """A context manager with a `StagedDirectory`; its content takes the name when the block ends.

    A directory that has the name is replaced only then.

    Args:
      path: the final name.
      overwrite: replace what exists under the name.
      ours: whether an existing directory is of the kind about to be written; others are never
        replaced.
      key: JSON-able facts that tell this work from any other. With a key, a block that fails or is
        killed leaves its finished pieces for the next run with the same key; without, it leaves
        nothing.

    Raises:
      FileExistsError: see `refuse_existing`; or another process is writing there.
      ValueError: several processes, which would each write here; overwriting in an object store.
      OSError: the disk is full (it says what is kept and what to do) or fails.
    """
    # Only asked where it can be so: it starts JAX's backends, which a converter on a TPU host that
    # trains should not.
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        raise ValueError("writing a checkpoint from several processes is not supported yet")
    target = paths.location(path)
    if not paths.is_remote(target):
        target = epath.Path(os.path.realpath(target))  # a link stays a link
    refuse_existing(target, overwrite=overwrite, ours=ours)
    if paths.is_remote(target):
        work, content = target / ".partial", target
    else:
        work = target.parent / f".{target.name}.partial"
        content = work / target.name
    with (
        _full_disk_explained(path, resumable=key is not None),
        _locked_work_directory(work, target),
    ):
        stage = StagedDirectory(content, _resume_or_clear(work, content, key), work / "finished")
        done = False
        try:
            yield stage
            if not paths.is_remote(target):
                refuse_existing(target, overwrite=overwrite, ours=ours)  # it may be new
                _rename(content, target, aside=target.parent / f".{target.name}.replaced")
            done = True
        finally:
            if done or key is None:
                if not done and paths.is_remote(target):
                    _remove(target)
                _remove(work)
            else:
                logger.warning(
                    "unfinished: %d finished pieces are kept in %s; the same command continues "
                    "from there", len(stage.finished), work,
                )  # fmt: skip


def refuse_existing(
    path: str | os.PathLike[str], *, overwrite: bool, ours: Callable[[epath.Path], bool]
) -> None:
    """Refuses to write under a name that is taken, or to replace what we did not write.

    Raises:
      FileExistsError: `path` exists, and `overwrite` is not set or it is not `ours`.
      ValueError: `overwrite` in an object store, which cannot replace at one stroke.
    """
    target = paths.location(path)
    if paths.is_remote(target):
        if overwrite:
            raise ValueError(
                f"{target}: an object store cannot replace a checkpoint at one stroke: choose "
                "another name, or delete it first"
            )
        paths.forget_listings(target)
        if ours(target):
            raise FileExistsError(f"{target} exists: choose another name")
        names = {p.name for p in target.iterdir()} if target.exists() else set()
        if names and ".partial" not in names:
            raise FileExistsError(f"{target} is not empty: choose another name")
        return
    if not target.exists():
        return
    if not overwrite:
        left = ", ".join(map(str, leftovers(target)))
        also = f" (a killed run left {left}, which --overwrite removes)" if left else ""
        raise FileExistsError(f"{target} exists: choose another name, or pass --overwrite{also}")
    if not ours(target):
        raise FileExistsError(
            f"{target} exists and was not written by this command, so --overwrite does not replace "
            "it: choose another name"
        )


def require_space(path: str | os.PathLike[str], nbytes: int) -> None:
    """Raises OSError if the disk of a local `path` lacks room for `nbytes`."""
    place = paths.location(path)
    if paths.is_remote(place):
        return
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise OSError(
            errno.ENOSPC,
            f"no space for {path}: {format_bytes(nbytes)} are to be written, "
            f"{format_bytes(free)} are free; free space or choose another disk",
        )


def leftovers(path: str | os.PathLike[str]) -> list[epath.Path]:
    """What killed runs left for `path`: unfinished work, or what was being replaced."""
    target = paths.location(path)
    if paths.is_remote(target):
        return [p for p in (target / ".partial",) if p.exists()]
    target = epath.Path(os.path.realpath(target))
    names = (f".{target.name}.partial", f".{target.name}.replaced")
    return [p for name in names if (p := target.parent / name).exists()]


def make_directory(path: epath.Path) -> None:
    """Makes a folder, if it is not there; object stores know none, but fsspec may make a bucket."""
    if not paths.is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def write_text(path: epath.Path, text: str) -> None:
    """As `write_bytes`, of text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a small file so that it is there as a whole or not at all, also after a power cut."""
    if paths.is_remote(path):
        path.write_bytes(data)
        return
    fresh = path.with_name(f"{path.name}.new")
    with open(fresh, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(fresh, path)


@contextlib.contextmanager
def _full_disk_explained(path: str | os.PathLike[str], *, resumable: bool) -> Iterator[None]:
    """Says of a full disk what is kept and what to do."""
    try:
        yield
    except OSError as e:
        if e.errno != errno.ENOSPC or "free space" in str(e):  # `require_space` has said it
            raise
        kept = (
            "the finished pieces are kept: free space, then run the same command again"
            if resumable
            else "nothing of it is kept: free space or choose another disk, then write it again"
        )
        raise OSError(errno.ENOSPC, f"no space left while writing {path}; {kept}") from e


@contextlib.contextmanager
def _locked_work_directory(work: epath.Path, target: epath.Path) -> Iterator[None]:
    """Makes the folder and keeps a second process out of it while this one lives.

    Object stores know neither folders nor locks.
    """
    make_directory(work)
    if paths.is_remote(work):
        yield
        return
    with open(work / "lock", "w") as file:
        lock_file(file, target)
        yield


def lock_file(file: IO[Any], target: Any) -> None:
    """Keeps other processes from what `file` stands for, until it is closed.

    Raises:
      FileExistsError: another one holds it; it is writing `target`.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileExistsError(
            f"{target} is being written by another process: wait for it, or choose another name"
        ) from None


def _resume_or_clear(
    work: epath.Path, content: epath.Path, key: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Makes the working folders, and returns the records of an interrupted run with this key."""
    paths.forget_listings(work)
    found = _parsed(paths.read_files(work, ["key.json"])["key.json"])
    if key is not None and found == json.loads(json.dumps(key)) and content.exists():
        folder = work / "finished"
        names = [p.name for p in folder.iterdir()] if folder.exists() else []
        files = paths.read_files(folder, (n for n in names if n.endswith(".json")))
        records = {name.removesuffix(".json"): _parsed(data) for name, data in files.items()}
        # A record cut short by the kill counts as none.
        finished = {name: r for name, r in records.items() if r is not None}
        if finished:
            logger.info("continuing an interrupted run: %d pieces are finished", len(finished))
        return finished
    if found is not None:
        logger.warning("%s held unfinished work of another kind: starting over", work)
    # The key goes first: if this is cut short, no record counts any more.
    (work / "key.json").unlink(missing_ok=True)
    if paths.is_remote(content):
        _remove(content)  # `work` too
    else:
        for child in work.iterdir():
            if child.name != "lock":
                child.rmtree() if child.is_dir() else child.unlink()
        content.mkdir(parents=True, exist_ok=True)
        (work / "finished").mkdir(parents=True, exist_ok=True)
    # Without a key too: in an object store this file is what makes `work` exist.
    write_text(work / "key.json", json.dumps(key))
    return {}


def _remove(folder: epath.Path) -> None:
    """Removes a folder, if it is there."""
    if paths.is_remote(folder):
        paths.remove_files(folder)
    else:
        folder.rmtree(missing_ok=True)


def _parsed(data: bytes | None) -> Any:
    try:
        return None if data is None else json.loads(data)
    except ValueError:
        return None


def _rename(staged: epath.Path, target: epath.Path, aside: epath.Path) -> None:
    """Gives finished work its name; what had it before is removed last."""
    if target.exists() and aside.exists():
        shutil.rmtree(aside)
    try:
        if target.exists():
            os.rename(target, aside)
        os.rename(staged, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
