"""Directories that appear complete under their name, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax


@contextlib.contextmanager
def new_directory(
    path: str | Path, *, overwrite: bool, ours: Callable[[Path], bool]
) -> Iterator[Path]:
    """A context manager whose value is a directory to make and fill; it then takes its name.

    The work happens in a hidden sibling (same file system, so the final rename is atomic) that is
    removed if the block fails. A directory that has the name is replaced only at the end.

    Args:
      path: the final name.
      overwrite: replace what exists under the name.
      ours: whether an existing directory is of the kind about to be written; others are never
        replaced.

    Raises:
      FileExistsError: see `refuse_existing`.
      ValueError: several processes, which would each write here.
    """
    path = Path(path).resolve()
    refuse_existing(path, overwrite=overwrite, ours=ours)
    if jax.process_count() > 1:
        raise ValueError("writing a checkpoint from several processes is not supported yet")
    token = secrets.token_hex(4)
    stage = path.with_name(f".{path.name}.{token}.partial")
    stage.mkdir(parents=True)
    try:
        yield stage / path.name
        _rename(stage / path.name, path, aside=path.with_name(f".{path.name}.{token}.replaced"))
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def refuse_existing(path: str | Path, *, overwrite: bool, ours: Callable[[Path], bool]) -> None:
    """Refuses to write under a name that is taken, or to replace what we did not write.

    Raises:
      FileExistsError: `path` exists, and `overwrite` is not set or it is not `ours`.
    """
    path = Path(path)
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists: choose another name, or pass --overwrite")
    if not ours(path):
        raise FileExistsError(
            f"{path} exists and was not written by this command, so --overwrite does not replace "
            "it: choose another name"
        )


def leftovers(path: str | Path) -> list[Path]:
    """What killed runs left beside `path`: unfinished work, or what was being replaced."""
    path = Path(path).resolve()
    kinds = (f".{path.name}.*.partial", f".{path.name}.*.replaced")
    return sorted(p for kind in kinds for p in path.parent.glob(kind))


def _rename(staged: Path, path: Path, aside: Path) -> None:
    if not path.exists():
        os.rename(staged, path)
        return
    os.rename(path, aside)
    try:
        os.rename(staged, path)
    except BaseException:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside)
