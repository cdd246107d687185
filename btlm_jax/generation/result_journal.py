"""A journal of results, so that a killed run can be resumed.

While a command runs, its results are appended to TARGET.partial, in the order in which they are
finished. The file's first line is a key that identifies the run; every other line is
[number, fields, checksum]. TARGET appears once all results are there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from btlm_jax.checkpoint.metadata import CheckpointMetadata
from btlm_jax.utils import atomic, paths
from btlm_jax.utils.format import join_first
from btlm_jax.utils.local_paths import local_path

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ResultJournal:
    """The results that a run has finished so far.

    Attributes:
      results: results by number, of this run and of the interrupted runs that it resumes.
    """

    results: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    _file: BinaryIO | None = None  # None keeps the results in memory only

    def add(self, number: int, fields: Mapping[str, Any]) -> None:
        """Records a result."""
        if self._file is not None:
            self._file.write(encode_line([number, fields, _checksum(number, fields)]))
            self._file.flush()
        self.results[number] = dict(fields)


@contextlib.contextmanager
def open_journal(
    target: Path, key: Mapping[str, Any], *, overwrite: bool
) -> Iterator[ResultJournal]:
    """Yields the journal of `target`, with the results of an interrupted run that had the same key.

    Call `finish_journal` at the end of the block.

    Args:
      target: the file that the results are for.
      key: JSON-serializable; everything that determines the results.
      overwrite: replace the target, and drop the results of a run with another key.

    Raises:
      FileExistsError: the target exists, or another process is writing it.
      FileNotFoundError: the target's folder does not exist.
      ValueError: TARGET.partial holds the results of a run with another key, or is not a journal.
    """
    target = local_path(target, "target")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists: choose another name, or pass overwrite=True")
    if target.is_dir():
        raise FileExistsError(f"{target} is a directory: choose another name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: there is no folder {target.parent}: create it first")
    partial = _partial_path(target)
    with open(partial, "ab+") as file:
        atomic.lock_file(file, target)
        file.seek(0)
        data = file.read()
        complete_lines = data[: data.rfind(b"\n") + 1]  # a kill may have cut the last line short
        header = json.dumps(key).encode() + b"\n"
        results = _resume(partial, complete_lines, header, overwrite)
        file.truncate(len(complete_lines) if results else 0)
        if results:
            logger.info("continuing an interrupted run: %d results are finished", len(results))
        else:
            file.write(header)
        journal = ResultJournal(results, file)
        try:
            yield journal
        except BaseException:
            if not journal.results:
                partial.unlink()
            else:
                logger.warning("unfinished: %d results are kept in %s; the same command continues "
                               "from there", len(journal.results), partial)  # fmt: skip
            raise


def finish_journal(target: Path, data: bytes) -> None:
    """Writes the target and removes its journal."""
    target = local_path(target, "target")
    atomic.write_bytes(paths.location(target), data)
    _partial_path(target).unlink()


def checkpoint_fingerprint(meta: CheckpointMetadata) -> str:
    """Returns a hash of a checkpoint's checksums, or of its path if it has none."""
    arrays = {".".join(path): sha256 for path, sha256 in meta.sha256.items()} or str(meta.path)
    text = json.dumps([arrays, dict(meta.asset_sha256)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def encode_line(value: Any) -> bytes:
    """Returns a value as one line of JSON."""
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _resume(
    partial: Path, complete_lines: bytes, header: bytes, overwrite: bool
) -> dict[int, dict[str, Any]]:
    """Returns the results of an interrupted run, after checking that its key is this run's."""
    first, *rest = complete_lines.splitlines(keepends=True) or [header]
    results: dict[int, dict[str, Any]] = {}
    damaged = []
    for line_number, line in enumerate(rest, start=2):
        try:
            number, fields, checksum = json.loads(line)
            if checksum != _checksum(number, fields):
                raise ValueError("the line was changed")
            results[number] = fields
        except (ValueError, TypeError, RecursionError):
            damaged.append(line_number)
    if first == header:
        if damaged:
            logger.warning(
                "%s: damaged lines (%s); their results are computed again",
                partial, join_first(damaged),
            )  # fmt: skip
        return results
    if overwrite:
        logger.warning("%s belonged to another run: starting over", partial)
        return {}
    key = json.loads(header)
    try:
        other_key = dict(json.loads(first))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(
            f"{partial}: its first line, which says whose results it holds, is damaged: choose "
            f"another name, or pass overwrite=True to drop its {len(results)} results"
        ) from None
    names = [name for name in {**other_key, **key} if other_key.get(name) != key.get(name)]
    differences = join_first(
        [f"{x}: found {other_key.get(x)!r}, expected {key.get(x)!r}" for x in names], most=2
    )
    raise ValueError(
        f"{partial} holds {len(results)} results of another run ({differences}): run that one to "
        "its end, choose another name, or pass overwrite=True to drop them"
    )


def _checksum(number: int, fields: Mapping[str, Any]) -> str:
    """Returns a hash of a result, which tells whether its line still is what was written."""
    return hashlib.blake2b(json.dumps([number, fields]).encode(), digest_size=8).hexdigest()


def _partial_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")
