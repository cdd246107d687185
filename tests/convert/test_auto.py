"""Sources of either format are recognized and give the same model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from btlm_jax.convert import auto, convert
from btlm_jax.convert.hf import source as hf_source
from btlm_jax.model.params import flatten_tree
from support import golden


def test_hugging_face_sources_are_recognized(tmp_path, monkeypatch):
    hf = golden.write_hf(tmp_path / "hf", golden.load("b_sp_alibi"))
    convert(hf, tmp_path / "orbax")
    monkeypatch.chdir(tmp_path)
    for source in (hf, str(hf), f"{hf}/", f"file://{hf}", "hf", Path("hf")):
        assert auto.is_huggingface(source), source
    for source in (tmp_path / "orbax", f"file://{tmp_path}/orbax", "orbax", tmp_path):
        assert not auto.is_huggingface(source), source
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name
    )  # as if gcsfs were installed
    assert not auto.is_huggingface("gs://bucket/hf")
    # A name without a file can only be on the Hub; a file is a checkpoint of neither format.
    assert auto.is_huggingface("org/name") and auto.is_huggingface(tmp_path / "nowhere")
    assert not auto.is_huggingface(hf / "config.json")
    with pytest.raises(ValueError, match="s3://"):
        auto.is_huggingface("s3://bucket/hf")


def test_both_formats_give_the_same_model(tmp_path, monkeypatch):
    """Including slopes that bf16 has rounded: 0.83984375 instead of 0.84089..."""
    case = golden.load("g_bf16")
    hf = golden.write_hf(tmp_path / "hf", case)
    convert(hf, tmp_path / "orbax")
    monkeypatch.setattr(hf_source, "fetch_from_hub", lambda name, *_: {"org/name": hf}[name])
    for source in (hf, tmp_path / "orbax", "org/name"):
        assert auto.read_any_config(source) == case.config
        model, params = auto.load_any_checkpoint(source, dtype=jnp.float32)
        assert model.config == case.config
        loaded, expected = flatten_tree(params), flatten_tree(case.params)
        assert loaded.keys() == expected.keys()
        for path, x in loaded.items():
            assert x.dtype == jnp.float32
            np.testing.assert_array_equal(x, expected[path])
    with pytest.raises(FileNotFoundError, match="no directory"):
        auto.read_any_config(tmp_path / "nowhere")
