"""Conversions of hostile and damaged checkpoints are refused, or equal to their source."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

import btlm_jax as btlm
from btlm_jax.convert import convert, export, verify
from btlm_jax.convert.hf.source import open_hf
from support.hostile_files import (
    BIN,
    BINS,
    BTLM,
    BTLM_BIN,
    MASKS,
    MODEL,
    assert_equal_tensors,
    checkpoint_directory,
    mutated_bytes,
    read_everything,
    time_limit,
    zip_bytes,
)
from support.hostile_pickles import hostile_pickles

CONFIG = (BTLM_BIN / "single/config.json").read_bytes()


PLAIN = {n: x for n, x in BTLM.items() if n not in MASKS and n != "lm_head.weight"}


def conversion_error(files: Mapping[str, bytes]) -> str:
    """Returns the message with which a conversion is refused, which must leave no checkpoint."""
    message = convert_or_refuse(files)
    assert message is not None
    return message


def convert_or_refuse(files: Mapping[str, bytes]) -> str | None:
    """Converts and checks every tensor. Returns None, or the message of a refusal."""
    with checkpoint_directory(files) as path, time_limit(20):
        target = path.parent / "c"
        try:
            convert(path, target)
        except (ValueError, FileNotFoundError) as error:
            assert not target.exists()
            assert {p.name for p in path.parent.iterdir()} <= {"hf", ".c.partial"}
            with pytest.raises(FileNotFoundError, match="no such checkpoint"):
                btlm.load(target)
            return str(error)
        assert verify(target) and verify(path, target)
        export(target, path.parent / "back")
        source, back = open_hf(path), open_hf(path.parent / "back")
        actual = {n: back.read_tensor(n) for n in back.tensors}
        assert set(actual) - {"lm_head.weight"} == set(PLAIN)
        assert_equal_tensors(actual, {n: source.read_tensor(n) for n in actual})
        return None


def test_hostile_pickles_are_not_converted(tmp_path):
    config = (BTLM_BIN / "single/config.json").read_bytes()
    flag = tmp_path / "ran"
    hostile = hostile_pickles(flag)
    for name in ("os.system 2", "nested 4", "as hooks", "stack_global", "inst"):
        assert "refused" in conversion_error({"config.json": config, BIN: zip_bytes(hostile[name])})
    assert not flag.exists()


@given(data=st.data())
def test_mutated_files_are_refused_or_converted_exactly(data):
    form = data.draw(st.sampled_from(["btlm", "btlm sharded", "safetensors"]))
    if form == "safetensors":
        files = {"config.json": CONFIG, MODEL: save(PLAIN)}
        hot = (0, 8 + int.from_bytes(files[MODEL][:8], "little"))
        files[MODEL] = data.draw(mutated_bytes(files[MODEL], hot))
        convert_or_refuse(files)
        return
    files, expected = BINS[form]
    name = data.draw(st.sampled_from(sorted(n for n in files if n != "config.json")))
    hot = (files[name].index(b"PK\1\2"), len(files[name])) if name.endswith(".bin") else None
    changed = files | {name: data.draw(mutated_bytes(files[name], hot))}
    message = convert_or_refuse(changed)
    # The mask buffers are not converted, so damage there may pass.
    assert message is not None or set(read_everything(changed)[0]) >= set(expected) - set(MASKS)


VALUES = [
    None, True, False, "", "x", "gelu", "alibi", "learned", "jais", [], [1], {}, {"type": "linear"},
    {"type": "linear", "factor": 2.0}, {"type": [], "factor": 2}, -1, 0, 1, 2, 3, 7, 8, 11, 12, 1.5,
    -0.0, 1e-320, 1e308, math.inf, math.nan, 2**31, 2**63, 10**30, 10**300, 10**400,
]  # fmt: skip


KEYS = [
    *json.loads(CONFIG), "alibi_scaling", "layer_norm_epsilon", "initializer_range", "rotary_dim",
    "tie_word_embeddings", "scale_attn_weights", "resid_pdrop", "pad_token_id", "width_scale",
    "output_logits_scale", "embeddings_scale", "scale_qk_dot_by_d", "quantization_config",
    "is_encoder_decoder", "something",
]  # fmt: skip


@given(data=st.data())
def test_any_config_is_refused_or_converted_exactly(data):
    config = json.loads(CONFIG)
    for _ in range(data.draw(st.integers(1, 2))):
        key, value = data.draw(st.sampled_from(KEYS)), data.draw(st.sampled_from(VALUES))
        config[key] = value
    files = BINS["btlm"][0] | {"config.json": json.dumps(config).encode()}
    convert_or_refuse(files)


@pytest.mark.parametrize("key", ["layer_norm_epsilon", "resid_pdrop", "mup_width_scale"])
def test_config_numbers_beyond_floats_are_refused(key):
    config = json.dumps(json.loads(CONFIG) | {key: 10**400})
    assert key in conversion_error(BINS["btlm"][0] | {"config.json": config.encode()})


def test_a_config_with_too_many_layers_is_refused_briefly():
    config = json.dumps(json.loads(CONFIG) | {"n_layer": 10_000})
    message = conversion_error(BINS["btlm"][0] | {"config.json": config.encode()})
    assert "n_layer" in message and len(message) < 100_000


def test_missing_and_foreign_shards_are_refused():
    files = BINS["btlm sharded"][0]
    first, second = sorted(n for n in files if n.endswith(".bin"))
    assert second in conversion_error({n: x for n, x in files.items() if n != second})
    assert "disagree" in conversion_error(files | {second: files[first]})
    other = json.loads(files["pytorch_model.bin.index.json"])
    other["weight_map"]["transformer.wte.weight"] = "../hf/" + first
    lying = {"pytorch_model.bin.index.json": json.dumps(other).encode()}
    assert "plain names" in conversion_error(files | lying)


def test_a_repaired_file_is_converted(tmp_path):
    """Despite the leftovers of the refused conversion."""
    files, path = BINS["btlm"][0], tmp_path / "hf"
    shutil.copytree(BTLM_BIN / "single", path)
    raw = bytearray(files[BIN])
    raw[raw.index(BTLM["transformer.h.1.mlp.c_fc.weight"].tobytes())] ^= 1
    (path / BIN).write_bytes(raw)
    with pytest.raises(ValueError, match="checksum mismatch"):
        convert(path, tmp_path / "c")
    (path / BIN).write_bytes(files[BIN])
    convert(path, tmp_path / "c")
    assert verify(tmp_path / "c", BTLM_BIN / "single")
    assert sorted(os.listdir(tmp_path)) == ["c", "hf"]


def test_wrong_shapes_and_dtypes_are_refused():
    name = "transformer.h.1.mlp.c_fc.weight"
    for tensor in (PLAIN[name].T.copy(), PLAIN[name][:-1], PLAIN[name].astype(np.float64)):
        files = {"config.json": CONFIG, MODEL: save(PLAIN | {name: tensor})}
        message = conversion_error(files)
        assert f"{name}: found" in message and "unexpected" not in message
    assert convert_or_refuse({"config.json": CONFIG, MODEL: save(PLAIN)}) is None
