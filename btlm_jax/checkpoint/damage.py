"""What is wrong with a checkpoint that cannot be read, or what a directory is that is none.

Orbax and TensorStore raise bare exceptions whose messages name their own classes; here they become
errors that name the file, what is wrong with it, and what to do.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from btlm_jax.checkpoint.orbax_metadata import ITEM, MARKER_FILE
from btlm_jax.data.token_shards import is_token_directory
from btlm_jax.utils import atomic, paths
from btlm_jax.utils.format import join_first

# Running out of memory on the host or a device must not be mistaken for a damaged file.
NOT_DAMAGE = (MemoryError, jax.errors.JaxRuntimeError)
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a directory that Orbax is still writing
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".npz")
# TensorStore's status codes of storage that cannot be reached now: the files may be whole.
_UNREACHABLE = re.compile(
    r"(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED"
    r"|CANCELLED):"
)
_OS_ERROR = re.compile(r"OS error (\d+)")
_FILE = re.compile(r'file "([^"]+)"')
_ERRNOS = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE)


class DamagedCheckpoint(ValueError):
    """The files are not a complete checkpoint of this package; an older checkpoint may be."""


def damaged_error(path: epath.Path, reason: object) -> DamagedCheckpoint:
    """Returns the error for a checkpoint whose files cannot be read."""
    first_line = (str(reason).splitlines() or [""])[0][:250]
    fix = "copy or convert it again"
    if earlier := _finished_steps(path):
        fix = f"copy it again, or use {earlier[-1]}"
    return DamagedCheckpoint(f"{path}: damaged checkpoint ({first_line}); {fix}")


def reading_error(path: epath.Path, error: BaseException, array: str = "") -> Exception:
    """Returns the error to raise for one of Orbax, TensorStore or the file system.

    Args:
      path: the checkpoint.
      error: what was raised while its files were read.
      array: the array that was read, if that is known.

    Returns:
      An OSError where the storage fails and the files may be whole; otherwise DamagedCheckpoint.
    """
    cause = _first_cause(error)
    if isinstance(cause, OSError) and cause.errno in _ERRNOS:
        return cause
    message = (str(cause).splitlines() or [type(cause).__name__])[0]
    found = _FILE.search(message)
    file = found[1] if found else os.fspath(path)
    number = _OS_ERROR.search(message)
    code = int(number[1]) if number else None
    if code in _ERRNOS:
        assert code is not None
        return OSError(code, os.strerror(code), file)
    if _UNREACHABLE.match(message):
        return ConnectionError(f"{path}: its storage cannot be read now ({message[:250]})")
    what = _describe_storage_error(message, file.removeprefix(f"{path}/"))
    return damaged_error(path, f"{array}: {what}" if array else what)


def _first_cause(error: BaseException) -> BaseException:
    """Returns the exception at the beginning of a chain of exceptions."""
    for _ in range(20):
        inner = error.__cause__ or error.__context__
        if isinstance(error, BaseExceptionGroup):
            inner = error.exceptions[0]
        if inner is None:
            break
        error = inner
    return error


def _describe_storage_error(message: str, file: str) -> str:
    """Returns in plain words what TensorStore says about a file."""
    if "is missing" in message or "NOT_FOUND" in message:
        return f"{file} is missing"
    if "mismatch" in message or "checksum" in message.lower():
        return f"{file} does not match its checksum"
    if re.search(r"size of \d+ bytes|Not enough data|End of data|remaining length", message):
        return f"{file} is truncated or has another size than its description says"
    if message.startswith(("DATA_LOSS", "OUT_OF_RANGE")) and _FILE.search(message):
        return f"{file} is damaged or truncated"
    return message


# What a directory is ------------------------------------------------------------------------------


def other_directory_error(directory: epath.Path) -> ValueError:
    """Returns the error for a path that exists and lacks Orbax's marker of a finished checkpoint.

    The message describes the path and names the one to pass.
    """
    if (directory / "config.json").exists():
        return ValueError(
            f"{directory} is a Hugging Face directory, expected an Orbax checkpoint: convert it "
            f"with `btlm convert {directory} DST`"
        )
    what = _describe_directory(directory)
    return DamagedCheckpoint(f"{directory} is not an Orbax checkpoint: {what}")


def require_finished_name(directory: epath.Path) -> None:
    """Raises DamagedCheckpoint for a directory that Orbax is writing or did not finish."""
    if _TEMPORARY in directory.name:
        finished = _finished_steps(directory)
        fix = f": use {finished[-1]}" if finished else ", expected a finished one"
        raise DamagedCheckpoint(
            f"{directory} is not an Orbax checkpoint: it is still being written, or a killed run "
            f"left it{fix}"
        )


def foreign_checkpoint_error(directory: epath.Path, marker: Mapping[str, Any]) -> ValueError:
    """Returns the error for an Orbax checkpoint of another program."""
    handlers = marker.get("item_handlers")
    items = f" with the items {join_first(handlers)}" if isinstance(handlers, Mapping) else ""
    return DamagedCheckpoint(
        f"{directory}: an Orbax checkpoint without BTLM metadata, of another program{items}; "
        "expected one made by btlm: export its weights to Hugging Face files there, then "
        "`btlm convert`"
    )


def _describe_directory(directory: epath.Path) -> str:
    if not directory.is_dir():
        inside = directory.parent
        return f"it is a file; pass the directory of a checkpoint{_if_checkpoint(inside)}"
    if paths.is_remote(directory) and atomic.leftovers(directory):
        return "it is unfinished; run the command that was writing it again"
    for outer in list(directory.parents)[:3]:
        if (outer / MARKER_FILE).exists():
            return f"it is a part of one; pass {outer}"
        if re.fullmatch(r"\..+\.partial", outer.name):
            return "it is unfinished work; run the command that was writing it again"
    names = sorted(p.name for p in directory.iterdir())
    if not names:
        return "it is empty; expected one made by btlm"
    if re.fullmatch(r"\..+\.partial", directory.name) and "key.json" in names:
        return "it is unfinished work; run the command that was writing it again"
    if "recipe.json" in names or "checkpoints" in names:
        return (
            "it is a run directory without a finished checkpoint; continue the run with "
            "`btlm train`, or pass a checkpoint"
        )
    if inside := _checkpoints_in(directory):
        return f"it is a directory of {len(inside)}; pass one of them, such as {inside[-1]}"
    if not paths.is_remote(directory) and is_token_directory(directory):
        return "it holds tokens of `btlm tokenize`; expected a checkpoint"
    if ITEM in names:
        earlier = _finished_steps(directory)
        fix = f"use {earlier[-1]}" if earlier else "copy it again, or run again what wrote it"
        return f"it lacks {MARKER_FILE}, so its writing or copying did not finish; {fix}"
    if files := [name for name in names if name.endswith(_WEIGHT_FILES)]:
        return (
            f"it holds {join_first(files, 3)} without config.json; add the model's config.json, "
            "then convert it with `btlm convert`"
        )
    return f"it holds {join_first(names)}; expected one made by btlm"


def _if_checkpoint(directory: epath.Path) -> str:
    known = (directory / MARKER_FILE).exists() or (directory / "config.json").exists()
    return f", {directory}" if known else ""


def _checkpoints_in(directory: epath.Path) -> list[epath.Path]:
    """Returns the finished checkpoints directly in a directory, steps in their order."""
    found = [p for p in directory.iterdir() if p.is_dir() and (p / MARKER_FILE).exists()]
    found = [p for p in found if _TEMPORARY not in p.name and not p.name.startswith(".")]
    return sorted(found, key=lambda p: (p.name.isdigit(), int(p.name) if p.name.isdigit() else 0,
                                        p.name))  # fmt: skip


def _finished_steps(directory: epath.Path) -> list[epath.Path]:
    """Returns the other finished checkpoints of the run that a directory belongs to."""
    if directory.parent.name != "checkpoints":
        return []
    found = _checkpoints_in(directory.parent)
    return [p for p in found if p.name.isdigit() and p != directory]


def missing_error(path: str | os.PathLike[str], directory: epath.Path) -> FileNotFoundError:
    """Returns the error for a checkpoint that does not exist.

    Args:
      path: as the user wrote it.
      directory: its location.
    """
    hint = ""
    if remains := join_first(atomic.leftovers(directory)):
        hint = f"; an interrupted run left {remains}: the same command continues it"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(path)) and not directory.parent.exists():
        hint = f"; if it is a Hub id, convert it first: `btlm convert {os.fspath(path)} DST`"
    return FileNotFoundError(f"{directory}: no such checkpoint{hint}")
