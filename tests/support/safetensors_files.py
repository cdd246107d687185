"""Content of JSON and safetensors files, and comparison of tensors bit for bit."""

from __future__ import annotations

import json
from pathlib import Path


def read_json(path: Path):
    """Returns the content of a JSON file."""
    return json.loads(path.read_text())


def read_safetensors_header(file: Path) -> tuple[dict, int]:
    """Returns the header of a safetensors file, and the offset of its data."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), start


def assert_same_bits(a: dict, b: dict) -> None:
    """Asserts that two sets of tensors have equal names, dtypes, shapes and bits."""
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name
