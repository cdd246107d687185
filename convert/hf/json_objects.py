"""JSON objects of a Hugging Face directory, parsed strictly."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from btlm_jax.convert.hf.advice import REDOWNLOAD
from btlm_jax.convert.hf.foreign_files import describe_foreign_bytes
from btlm_jax.utils.format import join_first
from btlm_jax.utils.json_files import json_type


def read_json_object(file: Path) -> dict:
    """Reads a JSON file that holds an object.

    Raises:
      ValueError: the file holds no JSON object, or one in which a key occurs twice; the message
        names the file and the position.
    """
    data = file.read_bytes()
    if wrong := describe_foreign_bytes(data):
        raise ValueError(f"{file} {wrong}")
    return parse_json_object(data, str(file))


def parse_json_object(data: bytes, file: str) -> dict:
    """Parses a JSON object.

    Args:
      data: the text.
      file: where it is from, for messages.

    Raises:
      ValueError: as `read_json_object`.
    """
    try:
        value = json.loads(data, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}: invalid JSON at line {error.lineno}, column {error.colno}: {error.msg}. "
            f"{REDOWNLOAD}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text at byte {error.start}. {REDOWNLOAD}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}. {REDOWNLOAD}") from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{file}: holds a JSON {json_type(value)}, expected an object. {REDOWNLOAD}"
        )
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Builds a JSON object; raises if a key occurs twice, which would hide one of two tensors."""
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        duplicates = sorted(key for key, count in counts.items() if count > 1)
        raise ValueError(f"occurs twice in one JSON object: {join_first(duplicates)}")
    return result
