"""Text files as inputs: JSON lines, plain text or Parquet; compressed, or standard input."""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import importlib
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from btlm_jax.utils.local_paths import absolute_name, local_name

STDIN = "-"
KINDS = (".jsonl", ".txt", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
OnError = Literal["raise", "skip"]

READ_BYTES = 1 << 20


class TextFile(NamedTuple):
    """An input file. `path` is None for standard input, whose size is 0."""

    name: str
    path: Path | None
    kind: str  # one of KINDS
    compression: str  # one of COMPRESSIONS, or ""
    size: int = 0  # bytes
    mtime_ns: int = 0

    @property
    def identity(self) -> tuple[str, str, int, int]:
        """The facts that change when the file changes."""
        return self.name, self.kind, self.size, self.mtime_ns

    def check_unchanged(self) -> None:
        """Raises ValueError if the file has changed since it was found."""
        if self.path is None:
            return
        status = self.path.stat()
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise ValueError(
                f"{self.name}: it changed while it was read ({self.size:,} bytes, now "
                f"{status.st_size:,}): run the command again when it is complete"
            )


def expand_inputs(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    stdin_format: str = "jsonl",
    on_error: OnError = "raise",
    kind: str | None = None,
    target: str | os.PathLike[str] | None = None,
    argument: str = "inputs",
) -> list[TextFile]:
    """Expands names and globs to files, in order; the files of a glob are sorted by name.

    Args:
      inputs: names, globs (`**` descends), "-" for standard input.
      stdin_format: "jsonl" or "txt".
      on_error: "raise" refuses empty files here, before any work.
      kind: ".jsonl" or ".txt": the kind of standard input, and of files whose suffix is unknown.
      target: the directory to write; its files are of an earlier run, and no text to read.
      argument: the name of the argument with the inputs, for messages.

    Raises:
      FileNotFoundError: a missing file, or a glob without matches.
      PermissionError: a file that may not be read.
      ValueError: no inputs, a URL, a directory or a pipe, an unknown kind, an empty file, a file in
        the target, or a file given twice.
    """
    patterns = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    names: list[str] = []
    for name in [local_name(pattern, argument) for pattern in patterns]:
        if name == STDIN or os.path.exists(name):
            names.append(name)
            continue
        is_glob = glob.has_magic(name)
        matches = sorted(glob.glob(name, recursive=True)) if is_glob else []
        if not matches:
            problem = "no file matches" if is_glob else "no such file"
            expected = kind or ", ".join(KINDS)
            raise FileNotFoundError(f"{name}: {problem}; expected {expected} or '-'")
        for match in matches:
            absolute_name(match, argument)  # refuses names that are not UTF-8
        names += matches
    if not names:
        raise ValueError("inputs: found none, expected files, globs or '-'")
    files = [_describe(name, stdin_format, kind) for name in names]
    seen: set[str] = set()
    for file in files:
        real = STDIN if file.path is None else os.path.realpath(file.path)
        if real in seen:
            raise ValueError(f"{file.name} is given twice, which would duplicate its text")
        seen.add(real)
        if target is not None and real.startswith(os.path.join(os.path.realpath(target), "")):
            raise ValueError(
                f"{file.name} lies in {os.fspath(target)}, the directory to write: name the inputs "
                "without it, or write elsewhere"
            )
        if file.path is not None and not file.size and on_error == "raise":
            raise ValueError(f"{file.name} is empty: remove it, or pass on_error='skip'")
    return files


def kind_and_compression(name: str) -> tuple[str, str]:
    """Returns the suffix of a file's kind, and that of its compression or ""."""
    stem, suffix = os.path.splitext(os.path.basename(name))
    if suffix in COMPRESSIONS:
        return os.path.splitext(stem)[1], suffix
    return suffix, ""


def _describe(name: str, stdin_format: str, expected_kind: str | None) -> TextFile:
    if name == STDIN:
        return TextFile(name, None, expected_kind or f".{stdin_format}", "")
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"{name} is a directory: name its files, such as '{name}/*.jsonl'")
    kind, compression = kind_and_compression(name)
    if expected_kind is not None and kind not in KINDS:
        kind = expected_kind
    if expected_kind not in (None, kind):
        raise ValueError(f"{name}: found a file of kind {kind!r}, expected {expected_kind!r}")
    if kind not in KINDS or (kind == ".parquet" and compression):
        raise ValueError(
            f"{name}: found a file of kind {path.suffix or 'without suffix'!r}, expected "
            f"{', '.join(KINDS)}; .jsonl and .txt also with {', '.join(COMPRESSIONS)}"
        )
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(
            f"{name}: found a pipe or a device, expected a file: pass it as standard input, "
            f"{STDIN!r}"
        )
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{name}: no permission to read it: chmod +r gives it")
    return TextFile(name, path, kind, compression, status.st_size, status.st_mtime_ns)


@contextlib.contextmanager
def open_decompressed(file: TextFile) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Opens a file: (decompressed stream, function that returns the bytes of the file read so far).

    Raises:
      ValueError: the file is damaged or truncated, or a package to decompress it is missing.
    """
    if file.path is None:
        yield sys.stdin.buffer, lambda: 0
        return
    with open(file.path, "rb", buffering=READ_BYTES) as raw:
        stream: Any = raw
        errors: Any = (EOFError,)
        if file.compression == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
            errors += (gzip.BadGzipFile, zlib.error)
        elif file.compression == ".xz":
            stream = lzma.LZMAFile(raw)  # noqa: SIM115 (closes with `raw`)
            errors += (lzma.LZMAError,)
        elif file.compression == ".bz2":
            stream = bz2.BZ2File(raw)
            errors += (OSError,)
        elif file.compression == ".zst":
            zstd = _zstd(file)
            # Windows as large as `zstd --long=31` makes.
            options = {zstd.DecompressionParameter.window_log_max: 31}
            stream = zstd.ZstdFile(raw, options=options)
            errors += (zstd.ZstdError,)
        try:
            yield stream, raw.tell
        except errors as e:
            raise damaged_file(file, e) from e


def damaged_file(file: TextFile, error: Exception) -> ValueError:
    """Returns the error to raise for a file whose content cannot be decoded."""
    return ValueError(f"{file.name}: damaged or truncated ({error}); fetch it again")


def import_reader(module: str, file: TextFile) -> Any:
    """Imports an optional module that reads a kind of file.

    Raises:
      ValueError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        package = module if module.startswith("backports.") else module.partition(".")[0]
        raise ValueError(
            f"{file.name}: {file.compression or file.kind} files need the package {package}: "
            "pip install 'btlm-jax[data]'"
        ) from e


def _zstd(file: TextFile) -> Any:
    """Returns the module that decompresses zstd: of the standard library from Python 3.14."""
    return import_reader(
        "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", file
    )
