"""Directories that appear complete under their name or not at all, however the writer ends.

A local directory is filled in a hidden sibling, `.NAME.partial`, on the same file system, and one
atomic rename gives it its name. Work that has a `key` can be resumed: every finished piece leaves a
record, and the next run with the same key receives these records. Object stores cannot rename, so
there the directory is filled in place, and the caller writes last the metadata that makes it
loadable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import jax
from etils import epath

from btlm_jax.utils import paths
from btlm_jax.utils.format import format_bytes

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StagedDirectory:
    """A directory that is being filled.

    Attributes:
      content: the directory to fill.
      finished: records of the finished pieces by name, from this run and from an interrupted one.
    """

    content: epath.Path
    finished: dict[str, Any]
    _records: epath.Path

    def record(self, name: str, value: Mapping[str, Any]) -> None:
        """Records that a piece is finished. Call it once the data is on disk; thread-safe."""
        text = json.dumps(value)
        record = {"sha256": _sha256(text), "record": text}
        write_text(self._records / f"{name}.json", json.dumps(record))
        self.finished[name] = dict(value)


@contextlib.contextmanager
def new_directory(
    path: str | os.PathLike[str],
    *,
    overwrite: bool,
    ours: Callable[[epath.Path], bool],
    key: Mapping[str, Any] | None = None,
) -> Iterator[StagedDirectory]:
    """Creates a directory that gets its name, `path`, when the `with` block ends without an error.

    An existing directory of that name stays in place until then.

    Args:
      path: the final name.
      overwrite: whether to replace an existing directory of that name.
      ours: returns whether an existing directory is of the kind about to be written; no other
        directory is ever replaced.
      key: JSON-able facts that identify the work. With a key, a block that fails or is killed
        leaves its finished pieces to the next run with the same key; without one, nothing.

    Yields:
      The directory to fill.

    Raises:
      FileExistsError: see `refuse_existing`; or another process is writing there.
      ValueError: several processes would each write here; or `overwrite` in an object store.
      OSError: the disk is full (the message says what was kept and how to continue) or fails.
    """
    # `process_count` starts JAX's backends, which a converter beside a training run on a TPU host
    # must not do, so it is called only where there can be several processes.
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        raise ValueError("writing a checkpoint from several processes is not supported yet")
    target = paths.location(path)
    remote = paths.is_remote(target)
    if not remote:
        target = epath.Path(os.path.realpath(target))  # a symbolic link stays a link
    refuse_existing(target, overwrite=overwrite, ours=ours)
    if remote:
        work, content = target / ".partial", target
    else:
        work = target.parent / f".{target.name}.partial"
        content = work / target.name
    with _explain_full_disk(path, resumable=key is not None), _lock_directory(work, target):
        stage = StagedDirectory(content, _resume_or_clear(work, content, key), work / "finished")
        complete = False
        try:
            yield stage
            if not remote:
                refuse_existing(target, overwrite=overwrite, ours=ours)  # it may have appeared
                _rename(content, target, backup=target.parent / f".{target.name}.replaced")
            complete = True
        finally:
            # A ValueError before the first finished piece refuses the input.
            refused = isinstance(sys.exception(), ValueError) and not stage.finished
            if complete or key is None or refused:
                if not complete and remote:
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
    """Refuses to write under a name that is taken, or to replace a directory of another kind.

    Raises:
      FileExistsError: `path` exists, and `overwrite` is not set or it is not `ours`.
      ValueError: `overwrite` in an object store, which cannot replace a directory atomically.
    """
    target = paths.location(path)
    if paths.is_remote(target):
        if overwrite:
            raise ValueError(
                f"{target}: an object store cannot replace a checkpoint atomically: choose another "
                "name, or delete it first"
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
        remains = ", ".join(map(str, leftovers(target)))
        hint = f" (a killed run left {remains}, which that removes)" if remains else ""
        raise FileExistsError(f"{target} exists: choose another name, or pass overwrite=True{hint}")
    if not ours(target):
        raise FileExistsError(
            f"{target} exists and was not written by this command, so overwriting does not replace "
            "it: choose another name"
        )


def require_space(path: str | os.PathLike[str], nbytes: int) -> None:
    """Raises OSError if the disk that holds a local `path` has less than `nbytes` free."""
    folder = paths.location(path)
    if paths.is_remote(folder):
        return
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(
            errno.ENOSPC,
            f"no space for {path}: {format_bytes(nbytes)} are to be written, "
            f"{format_bytes(free)} are free; free space or choose another disk",
        )


def leftovers(path: str | os.PathLike[str]) -> list[epath.Path]:
    """Returns the directories that killed runs left for `path`: unfinished and replaced ones."""
    target = paths.location(path)
    if paths.is_remote(target):
        return [p for p in (target / ".partial",) if p.exists()]
    target = epath.Path(os.path.realpath(target))
    names = (f".{target.name}.partial", f".{target.name}.replaced")
    return [p for name in names if (p := target.parent / name).exists()]


def make_directory(path: epath.Path) -> None:
    """Creates a local directory and its parents if they do not exist.

    Object stores have no directories, and fsspec might create a bucket instead.
    """
    if not paths.is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a small text file in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a small file that is complete or absent, even after a power failure."""
    if paths.is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(f"{path.name}.new")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.rename(temporary, path)
    except IsADirectoryError as e:  # the error would name the temporary file
        temporary.unlink()
        raise IsADirectoryError(e.errno, e.strerror, os.fspath(path)) from None


def lock_file(file: IO[Any], target: Any) -> None:
    """Locks an open file against other processes until it is closed or its process ends.

    On a file system without locks it only warns.

    Args:
      file: the lock.
      target: what it protects, for the message.

    Raises:
      FileExistsError: another process holds the lock.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileExistsError(
            f"{target} is being written by another process: wait for it, or choose another name"
        ) from None
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        logger.warning(
            "%s: its file system has no locks (%s), so that a second process that writes there "
            "would not be refused: start only one", target, e.strerror,
        )  # fmt: skip


@contextlib.contextmanager
def _explain_full_disk(path: str | os.PathLike[str], *, resumable: bool) -> Iterator[None]:
    """Turns ENOSPC into an error that says what was kept and how to continue."""
    try:
        yield
    except OSError as e:
        if e.errno != errno.ENOSPC or "free space" in str(e):  # `require_space` has explained it
            raise
        advice = (
            "the finished pieces are kept: free space, then run the same command again"
            if resumable
            else "nothing of it is kept: free space or choose another disk, then write it again"
        )
        raise OSError(errno.ENOSPC, f"no space left while writing {path}; {advice}") from e


@contextlib.contextmanager
def _lock_directory(work: epath.Path, target: epath.Path) -> Iterator[None]:
    """Creates the working directory and locks it while this process uses it.

    Object stores have neither directories nor locks.
    """
    make_directory(work)
    if paths.is_remote(work):
        yield
        return
    with open(work / "lock", "w") as file:
        lock_file(file, target)
        yield


def _resume_or_clear(
    work: epath.Path, content: epath.Path, key: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Prepares the working directories and returns the records of an interrupted run with `key`."""
    paths.forget_listings(work)
    stored_key = _parse_json(paths.read_files(work, ["key.json"])["key.json"])
    if key is not None and stored_key == json.loads(json.dumps(key)) and content.exists():
        folder = work / "finished"
        names = [p.name for p in folder.iterdir()] if folder.exists() else []
        files = paths.read_files(folder, (n for n in names if n.endswith(".json")))
        records = {name.removesuffix(".json"): _parse_record(data) for name, data in files.items()}
        # A record that a kill cut short, or that was damaged later, does not count.
        finished = {name: r for name, r in records.items() if r is not None}
        if damaged := len(records) - len(finished):
            logger.warning("%s: %d damaged records; their pieces are written again", work, damaged)
        if finished:
            logger.info("continuing an interrupted run: %d pieces are finished", len(finished))
        return finished
    if stored_key is not None:
        logger.warning("%s held unfinished work of another kind: starting over", work)
    elif key is not None and any(work.glob("finished/*.json")):
        logger.warning("%s: key.json is missing or damaged, so its pieces cannot be used: "
                       "starting over", work)  # fmt: skip
    # The key is deleted first, so that no record counts if the clearing is cut short.
    (work / "key.json").unlink(missing_ok=True)
    if paths.is_remote(content):
        _remove(content)  # `work` included
    else:
        for child in work.iterdir():
            if child.name != "lock":
                child.rmtree() if child.is_dir() else child.unlink()
        content.mkdir(parents=True, exist_ok=True)
        (work / "finished").mkdir(parents=True, exist_ok=True)
    # Written even without a key: in an object store, `work` exists because this file does.
    write_text(work / "key.json", json.dumps(key))
    return {}


def _remove(folder: epath.Path) -> None:
    """Removes a directory, local or remote, if it exists."""
    if paths.is_remote(folder):
        paths.remove_files(folder)
    else:
        folder.rmtree(missing_ok=True)


def _parse_json(data: bytes | None) -> Any:
    """Returns the value of a JSON file; None if the file is missing or damaged."""
    try:
        return None if data is None else json.loads(data)
    except ValueError:
        return None


def _parse_record(data: bytes | None) -> dict[str, Any] | None:
    """Returns the record in a file of `StagedDirectory.record`; None if it is damaged."""
    value = _parse_json(data)
    text = value.get("record") if isinstance(value, dict) else None
    if not isinstance(text, str) or value.get("sha256") != _sha256(text):
        return None
    return json.loads(text)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _rename(staged: epath.Path, target: epath.Path, backup: epath.Path) -> None:
    """Renames the staged directory into place, then deletes the one that it replaced.

    Args:
      staged: the complete directory.
      target: its final name.
      backup: the name of an existing `target` in the meantime.
    """
    if target.exists() and backup.exists():
        shutil.rmtree(backup)
    try:
        if target.exists():
            os.rename(target, backup)
        os.rename(staged, target)
    except BaseException:
        if backup.exists() and not target.exists():
            os.rename(backup, target)
        raise
    shutil.rmtree(backup, ignore_errors=True)
