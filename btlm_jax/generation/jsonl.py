"""Prompts and results as JSON lines: checked as a whole, written so that a killed run can go on.

In: {"prompt": str, ...} or {"input_ids": [int, ...], ...}, one a line. Out: the same lines with
`text`, `tokens`, `finish_reason`. Results are first kept in TARGET.partial, in the order in which
they come; TARGET appears when all are there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tokenizers import Tokenizer

from btlm_jax.checkpoint.metadata import CheckpointMetadata
from btlm_jax.generation import detokenize
from btlm_jax.generation.continuous_batching import GenerationResult
from btlm_jax.utils import atomic, paths

logger = logging.getLogger(__name__)

# How many bad lines are named.
_NAMED = 10


@dataclasses.dataclass(frozen=True)
class PromptLines:
    """The lines of a file.

    Attributes:
      objects: as they were read.
      ids: the prompt of each.
      names: FILE:LINE of each, from 1.
      sha256: of the file.
    """

    objects: list[dict[str, Any]]
    ids: list[list[int]]
    names: list[str]
    sha256: str


def read_prompt_lines(
    source: Path, tokenizer: Tokenizer, vocab_size: int, added: Sequence[str]
) -> PromptLines:
    """Reads and checks all lines.

    Args:
      added: what results will be called, which no line may have yet.

    Raises:
      FileNotFoundError: no such file.
      ValueError: an empty file, or lines without a prompt; it names them.
    """
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file, expected one of JSON lines")
    data = source.read_bytes()
    lines, found, bad = data.splitlines(), [], []
    names = [f"{source}:{n}" for n in range(1, len(lines) + 1)]
    for name, line in zip(names, lines, strict=True):
        try:
            found.append(_parsed(line, tokenizer, vocab_size, added))
        except ValueError as e:
            bad.append(f"{name}: {e}")
    if bad:
        more = f"\n... and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise ValueError("\n".join(bad[:_NAMED]) + more)
    if not found:
        raise ValueError(
            f'{source}: found no line, expected JSON lines such as {{"prompt": "..."}}'
        )
    objects, ids = ([x[i] for x in found] for i in range(2))
    return PromptLines(objects, ids, names, hashlib.sha256(data).hexdigest())


def _parsed(
    line: bytes, tokenizer: Tokenizer, vocab_size: int, added: Sequence[str]
) -> tuple[dict[str, Any], list[int]]:
    expected = 'expected {"prompt": "..."} or {"input_ids": [...]}'
    try:
        found = json.loads(line)
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except ValueError as e:
        raise ValueError(f"found no JSON ({e}), {expected}") from None
    if not isinstance(found, dict):
        raise ValueError(f"found {_shown(found)}, {expected}")
    given = {"prompt", "input_ids"} & found.keys()
    if len(given) != 1:
        what = "both prompt and input_ids" if given else f"fields {_shown(list(found))}"
        raise ValueError(f"found {what}, {expected}")
    if taken := [name for name in added if name in found]:
        raise ValueError(f"found a field {taken[0]!r}, which is what results are called: rename it")
    if "prompt" in given:
        prompt = found["prompt"]
        if not isinstance(prompt, str):
            raise ValueError(f"prompt: found {_shown(prompt)}, expected a string")
        ids = tokenizer.encode(prompt).ids
        if not ids:
            raise ValueError("prompt: found no text, expected at least one character")
        return found, ids
    ids = found["input_ids"]
    known = isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in ids)
    if not known or not ids:
        raise ValueError(
            f"input_ids: found {_shown(ids)}, expected integers from 0 to {vocab_size - 1}, one at "
            "least"
        )
    return found, ids


def _shown(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


@dataclasses.dataclass(frozen=True)
class ResultJournal:
    """Results that are kept while others are still to come.

    Attributes:
      known: of this run and those before, by number.
    """

    known: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    _file: BinaryIO | None = None  # else in memory only

    def add(self, number: int, fields: Mapping[str, Any]) -> None:
        """Keeps a result, or what it adds to its line."""
        if self._file is not None:
            self._file.write(_line([number, fields]))
            self._file.flush()
        self.known[number] = dict(fields)


@contextlib.contextmanager
def open_journal(
    target: Path, key: Mapping[str, Any], *, overwrite: bool
) -> Iterator[ResultJournal]:
    """A context manager that keeps results in TARGET.partial, and takes up those of a killed run.

    `finish` or `complete` ends it.

    Args:
      key: JSON-able; what decides about the results. Those of another one are not taken up.
      overwrite: replace the target, and drop results of another key.

    Raises:
      FileExistsError: the target exists, or another process is writing it.
      FileNotFoundError: there is no folder for it.
      ValueError: TARGET.partial holds results of another key, or is no such file.
    """
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists: choose another name, or pass --overwrite")
    if target.is_dir():
        raise FileExistsError(f"{target} is a directory: choose another name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: there is no folder {target.parent}: make it first")
    partial = _partial(target)
    with open(partial, "ab+") as file:
        atomic.lock_file(file, target)
        file.seek(0)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a kill may have cut the last line short
        header = json.dumps(key).encode() + b"\n"
        known = _taken_up(partial, whole, header, overwrite)
        file.truncate(len(whole) if known else 0)
        if known:
            logger.info("continuing an interrupted run: %d results are there", len(known))
        else:
            file.write(header)
        out = ResultJournal(known, file)
        try:
            yield out
        except BaseException:
            if not out.known:
                partial.unlink()
            else:
                logger.warning("unfinished: %d results are kept in %s; the same command continues "
                               "from there", len(out.known), partial)  # fmt: skip
            raise


def _taken_up(
    partial: Path, whole: bytes, header: bytes, overwrite: bool
) -> dict[int, dict[str, Any]]:
    first, *rest = whole.splitlines(keepends=True) or [header]
    known: dict[int, dict[str, Any]] = {}
    try:
        found = dict(json.loads(first))
        known = {int(n): dict(fields) for n, fields in map(json.loads, rest)}
    except (ValueError, TypeError):
        found = {"file": "no results of this command"}
    if first == header:
        return known
    if overwrite:
        logger.warning("%s held something else: starting over", partial)
        return {}
    key = json.loads(header)
    names = [k for k in {**found, **key} if found.get(k) != key.get(k)]
    shown = ", ".join(f"{k}: found {found.get(k)!r}, expected {key.get(k)!r}" for k in names)
    raise ValueError(
        f"{partial} holds {len(known)} results of another run ({shown}): run that one to its end, "
        "choose another name, or pass --overwrite to drop them"
    )


def write_results(
    target: Path, lines: PromptLines, known: Mapping[int, Mapping[str, Any]], copies: int
) -> None:
    """Writes all lines with their results, in their order, and removes what was kept."""
    rows = (
        lines.objects[i] | ({"index": n} if copies > 1 else {}) | dict(known[i * copies + n])
        for i in range(len(lines.objects))
        for n in range(copies)
    )
    finish_journal(target, b"".join(map(_line, rows)))


def finish_journal(target: Path, data: bytes) -> None:
    """Writes the target, and removes what `journal` kept."""
    atomic.write_bytes(paths.location(target), data)
    _partial(target).unlink()


def result_fields(
    line: Mapping[str, Any],
    ids: Sequence[int],
    result: GenerationResult,
    tokenizer: Tokenizer,
    logprobs: bool,
) -> dict[str, Any]:
    """What a result adds to its line."""
    tokens = result.tokens.tolist()
    found: dict[str, Any] = {"text": detokenize.detokenize_continuation(tokenizer, ids, tokens)}
    if "input_ids" in line:
        found["token_ids"] = tokens
    found |= {"tokens": len(tokens), "finish_reason": result.finish_reason}
    if logprobs:
        found["logprobs"] = [round(float(x), 4) for x in result.logprobs]
    return found


def result_field_names(*, logprobs: bool, copies: int) -> list[str]:
    """The fields that results may add to lines."""
    more = ["logprobs"] * logprobs + ["index"] * (copies > 1)
    return ["text", "token_ids", "tokens", "finish_reason", *more]


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def checkpoint_fingerprint(meta: CheckpointMetadata) -> str:
    """Tells a checkpoint from others: by its hashes, or its place if nobody recorded any."""
    arrays = {".".join(path): found for path, found in meta.sha256.items()} or str(meta.path)
    facts = json.dumps([arrays, dict(meta.asset_sha256)], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")
