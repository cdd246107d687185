"""Small Hugging Face directories of several forms, and the errors with which they are refused."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from btlm_jax.convert.hf.source import open_hf
from btlm_jax.convert.hf.weight_files import WEIGHT_FORMS

MAIN_FILES = [form.main for form in WEIGHT_FORMS]

TENSORS = {
    "wte.weight": np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16),
    "ln.bias": np.linspace(0, 1, 5, dtype=np.float32),
    "half": np.ones((2, 1), np.float16),
    "mask": np.array([True, False]),
    "scalar": np.array(3, np.int64),
    "empty": np.zeros((0, 2), np.float32),
}


SHARDS = {
    "model-00001-of-00002.safetensors": ["wte.weight", "ln.bias"],
    "model-00002-of-00002.safetensors": ["half", "mask", "scalar", "empty"],
}


def write_config(path: Path, **config) -> Path:
    """Creates a directory with a config.json only."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "btlm", **config}))
    return path


def write_single(path: Path) -> Path:
    """Writes `TENSORS` as one safetensors file."""
    save_file(TENSORS, write_config(path) / "model.safetensors")
    return path


def write_index(path: Path, weight_map: object) -> None:
    """Writes an index over safetensors files."""
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (path / "model.safetensors.index.json").write_text(index)


def write_sharded(path: Path) -> Path:
    """Writes `TENSORS` as two safetensors files with an index."""
    write_config(path)
    for shard, names in SHARDS.items():
        save_file({n: TENSORS[n] for n in names}, path / shard)
    write_index(path, {n: shard for shard, names in SHARDS.items() for n in names})
    return path


def write_raw_safetensors(path: Path, header: bytes, data: bytes = b"") -> None:
    """Writes a directory with a safetensors file of this header, valid or not."""
    file = write_config(path) / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


def open_error(error: type[Exception], source, **kwargs) -> str:
    """Returns the message with which a source is refused: one line that names the fix."""
    with pytest.raises(error) as caught:
        open_hf(source, **kwargs)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    message = str(caught.value)
    assert "Fix: " in message and "\n" not in message
    return message
