"""The files of `btlm generate --input`: prompts as JSON lines in, the same lines with results out.

An input line is {"prompt": str, ...} or {"input_ids": [int, ...], ...}. All lines are checked
before anything is computed. The output has the same lines with the added fields `text`, `tokens`
and `finish_reason` (and `token_ids`, `logprobs` and `index` where they apply).
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from btlm_jax.data.tokenizer import encode_prompt
from btlm_jax.generation.detokenize import detokenize_continuation
from btlm_jax.generation.request_handle import GenerationResult
from btlm_jax.generation.result_journal import encode_line, finish_journal
from btlm_jax.utils.format import format_bytes, list_first
from btlm_jax.utils.local_paths import local_path

_MAX_FILE_BYTES = 128 << 20  # with tokens, 14 bytes of memory for each
# At most this many bad lines are listed.
_MAX_LISTED = 10


@dataclasses.dataclass(frozen=True)
class PromptLines:
    """The checked lines of an input file.

    Attributes:
      objects: the parsed JSON objects.
      ids: the token ids of each prompt.
      names: "FILE:LINE" for each line, counted from 1.
      sha256: checksum of the file.
    """

    objects: list[dict[str, Any]]
    ids: list[list[int]]
    names: list[str]
    sha256: str


def read_prompt_lines(
    source: Path, tokenizer: Tokenizer, vocab_size: int, result_names: Sequence[str]
) -> PromptLines:
    """Reads and checks all lines.

    Args:
      source: the input file.
      tokenizer: encodes the text prompts.
      vocab_size: upper bound of the ids, exclusive.
      result_names: field names of the results, which no input line may use.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: an empty file, one of more than 128 MiB, or bad lines; the message lists them.
    """
    source = local_path(source, "source")
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file, expected a file of JSON lines")
    if (size := source.stat().st_size) > _MAX_FILE_BYTES:
        raise ValueError(
            f"{source}: found {format_bytes(size)}, expected at most "
            f"{format_bytes(_MAX_FILE_BYTES)}, which are held in memory: divide it into several "
            "files (split --line-bytes=100M)"
        )
    data = source.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{source}: found UTF-16, expected UTF-8: convert it, as with iconv")
    lines, objects, prompt_ids, errors = data.splitlines(), [], [], []
    names = [f"{source}:{n}" for n in range(1, len(lines) + 1)]
    for name, line in zip(names, lines, strict=True):
        try:
            fields = _parse_line(line, result_names)
            prompt_ids.append(_encode_prompt(fields, tokenizer, vocab_size))
            objects.append(fields)
        except ValueError as e:
            errors.append(f"{name}: {e}")
    if errors:
        raise ValueError(f"{source}: lines that cannot be used:{list_first(errors, _MAX_LISTED)}")
    if not objects:
        raise ValueError(
            f'{source}: found no line, expected JSON lines such as {{"prompt": "..."}}'
        )
    return PromptLines(objects, prompt_ids, names, hashlib.sha256(data).hexdigest())


def _parse_line(line: bytes, result_names: Sequence[str]) -> dict[str, Any]:
    expected = 'expected {"prompt": "..."} or {"input_ids": [...]}'
    try:
        fields = json.loads(line)
        json.dumps(fields, ensure_ascii=False).encode()  # fails for an unpaired surrogate
    except ValueError as e:
        raise ValueError(f"found no JSON ({e}), {expected}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"found {_shortened(fields)}, {expected}")
    prompt_names = {"prompt", "input_ids"} & fields.keys()
    if len(prompt_names) != 1:
        problem = f"fields {_shortened(list(fields))}"
        if prompt_names:
            problem = "both prompt and input_ids"
        raise ValueError(f"found {problem}, {expected}")
    if taken := [name for name in result_names if name in fields]:
        raise ValueError(f"found a field {taken[0]!r}, the name of a result field: rename it")
    return fields


def _encode_prompt(fields: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    if "prompt" in fields:
        prompt = fields["prompt"]
        if not isinstance(prompt, str):
            raise ValueError(f"prompt: found {_shortened(prompt)}, expected a string")
        try:
            return encode_prompt(tokenizer, prompt)
        except ValueError as e:
            raise ValueError(f"prompt: {e}") from None
    ids = fields["input_ids"]
    valid = isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in ids)
    if not valid or not ids:
        raise ValueError(
            f"input_ids: found {_shortened(ids)}, expected at least one integer, each from 0 to "
            f"{vocab_size - 1}"
        )
    return ids


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def result_field_names(*, logprobs: bool, num_return_sequences: int) -> list[str]:
    """Returns the names of the fields that results may add to lines."""
    optional = ["logprobs"] * logprobs + ["index"] * (num_return_sequences > 1)
    return ["text", "token_ids", "tokens", "finish_reason", *optional]


def result_fields(
    line: Mapping[str, Any],
    ids: Sequence[int],
    result: GenerationResult,
    tokenizer: Tokenizer,
    logprobs: bool,
) -> dict[str, Any]:
    """Returns the fields that a result adds to its line.

    Args:
      line: the input line.
      ids: its prompt.
      result: the continuation.
      tokenizer: decodes it.
      logprobs: add the log-probability of every new token.
    """
    tokens = result.tokens.tolist()
    fields: dict[str, Any] = {"text": detokenize_continuation(tokenizer, ids, tokens)}
    if "input_ids" in line:
        fields["token_ids"] = tokens
    fields |= {"tokens": len(tokens), "finish_reason": result.finish_reason}
    if logprobs:
        fields["logprobs"] = [round(float(x), 4) for x in result.logprobs]
    return fields


def write_results(
    target: Path,
    lines: PromptLines,
    results: Mapping[int, Mapping[str, Any]],
    num_return_sequences: int,
) -> None:
    """Writes all lines with their results, in the order of the input, and removes the journal.

    Args:
      target: the output file.
      lines: the input.
      results: `result_fields` by line index * num_return_sequences + sequence index.
      num_return_sequences: continuations per line; if several, each has an `index`.
    """
    n = num_return_sequences
    output = (
        fields | ({"index": j} if n > 1 else {}) | dict(results[i * n + j])
        for i, fields in enumerate(lines.objects)
        for j in range(n)
    )
    finish_journal(target, b"".join(map(encode_line, output)))
