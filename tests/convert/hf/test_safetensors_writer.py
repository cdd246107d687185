"""Safetensors files are planned, and written in any order."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from btlm_jax.convert.hf.safetensors_writer import SafetensorsFile, TensorSpec, plan_shards
from support.safetensors_files import assert_same_bits, read_safetensors_header

DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]


TENSORS = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 9), max_size=3)), min_size=1
)


@given(TENSORS, st.integers(1, 3000))
def test_shards_are_as_full_as_possible_and_aligned(drawn, max_bytes):
    """Every tensor occurs once, and the next one would not have fit; wider dtypes come first."""
    tensors = [TensorSpec(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(drawn)]
    shards = plan_shards(tensors, max_bytes)
    position = {t.name: i for i, t in enumerate(tensors)}
    assert [t for s in shards for t in sorted(s, key=lambda t: position[t.name])] == tensors
    sizes = [sum(t.nbytes for t in shard) for shard in shards]
    for i, shard in enumerate(shards):
        assert sizes[i] <= max_bytes or len(shard) == 1
        widths = [t.dtype.itemsize for t in shard]
        assert widths == sorted(widths, reverse=True)
        if i + 1 < len(shards):
            first = min(shards[i + 1], key=lambda t: position[t.name])
            assert sizes[i] + first.nbytes > max_bytes


def test_tensors_are_written_in_any_order_and_by_several_runs(tmp_path):
    """The file is valid only once finished, and keeps the tensors of an interrupted run."""
    arrays = {"a": np.arange(5, dtype=np.float32), "b": np.array([[1.5, -0.0]], np.float16)}
    tensors = [TensorSpec(n, x.dtype, x.shape) for n, x in arrays.items()]
    path = tmp_path / "x.safetensors"
    file = SafetensorsFile(path, tensors, "1")
    blocks = [arrays["b"].reshape(-1)]
    sha256 = {"b": file.write("b", blocks).sha256}
    file = SafetensorsFile(path, tensors, "1")  # another run
    a = arrays["a"]
    sha256["a"] = file.write("a", [a[:2], a[2:]]).sha256
    with pytest.raises(Exception, match=r"(?i)header"):
        load_file(path)
    file.finish(sha256)
    assert_same_bits(load_file(path), arrays)
    assert json.loads(read_safetensors_header(path)[0]["__metadata__"]["sha256"]) == sha256
