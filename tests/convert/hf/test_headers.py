"""Damaged configurations, indices and headers are refused with their names."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import save_file

from support.hf_directories import (
    MAIN_FILES,
    SHARDS,
    TENSORS,
    open_error,
    write_config,
    write_index,
    write_raw_safetensors,
    write_sharded,
    write_single,
)


@pytest.mark.parametrize(
    ("content", "message_part"),
    [
        (b'{"a": 1,\n "b": }', "line 2, column 7"),
        (b"", "line 1, column 1"),
        (b'{"a": "\xff"}', "not UTF-8 text at byte 7"),
        (b"[1]", "holds a JSON array"),
        (b'{"a": 1, "a": 2}', "twice in one JSON object: a"),
        (b"[" * 100_000, "recursion"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "4300"),
    ],
)
def test_a_broken_config_is_refused_with_the_position(tmp_path, content, message_part):
    (write_single(tmp_path) / "config.json").write_bytes(content)
    message = open_error(ValueError, tmp_path)
    assert str(tmp_path / "config.json") in message and message_part in message


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", ".", "", "a\\b", "C:x", None, 3])
def test_an_index_that_leaves_its_directory_is_refused(tmp_path, name):
    write_sharded(tmp_path)
    write_index(tmp_path, {"ln.bias": "model-00001-of-00002.safetensors", "half": name})
    message = open_error(ValueError, tmp_path)
    assert "index.json" in message and repr(name) in message


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_weight_map_is_refused(tmp_path, weight_map):
    write_index(write_config(tmp_path), weight_map)
    assert "'weight_map'" in open_error(ValueError, tmp_path)


def test_a_broken_index_is_refused(tmp_path):
    (write_config(tmp_path) / MAIN_FILES[1]).write_text("{")
    assert f"{MAIN_FILES[1]}: invalid JSON" in open_error(ValueError, tmp_path)
    (tmp_path / MAIN_FILES[1]).write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert "twice in one JSON object: a" in open_error(ValueError, tmp_path)


def test_all_missing_shards_are_listed(tmp_path):
    write_sharded(tmp_path)
    for shard in SHARDS:
        (tmp_path / shard).unlink()
    message = open_error(FileNotFoundError, tmp_path)
    assert "2 shard(s)" in message and all(shard in message for shard in SHARDS)


def test_all_disagreements_of_index_and_shards_are_listed(tmp_path):
    write_sharded(tmp_path)
    first, second = SHARDS
    save_file({n: TENSORS[n] for n in [*SHARDS[second], "ln.bias"]}, tmp_path / second)
    write_index(
        tmp_path,
        {"ln.bias": first, "half": first, "mask": second, "scalar": second, "ghost": second},
    )
    message = open_error(ValueError, tmp_path)
    for message_part in (
        f"'half' is not in {first}",
        f"'ghost' is not in {second}",
        f"'wte.weight' is in {first} but not in the index",
        f"'empty' is in {second} but not in the index",
        f"'ln.bias' is in 2 shards: {first}, {second}",
    ):
        assert message_part in message


def test_truncated_safetensors_are_refused(tmp_path):
    file = write_single(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    for length in (0, 5, 40, len(content) - 1):
        file.write_bytes(content[:length])
        message = open_error(ValueError, tmp_path)
        damage = "truncated or corrupt" if length else "is empty (0 bytes)"
        assert str(file) in message and damage in message


def test_a_git_lfs_pointer_is_recognized(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (write_config(tmp_path) / "model.safetensors").write_bytes(pointer)
    assert "git lfs pull" in open_error(ValueError, tmp_path)


def test_unsupported_dtypes_are_listed(tmp_path):
    header = {
        "a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]},
        "b": {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [2, 3]},
    }
    write_raw_safetensors(tmp_path, json.dumps(header).encode(), bytes(3))
    message = open_error(ValueError, tmp_path)
    assert "'a': F8_E4M3" in message and "'b': F8_E5M2" in message and "BF16" in message


def test_unknown_dtypes_are_refused(tmp_path):
    header = b'{"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 2]}}'
    write_raw_safetensors(tmp_path, header, bytes(2))
    assert "F99" in open_error(ValueError, tmp_path)


def test_a_header_with_a_tensor_twice_is_refused(tmp_path):
    entry = b'"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}'
    write_raw_safetensors(tmp_path, b"{%b, %b}" % (entry, entry), bytes(2))
    assert "twice in one JSON object: a" in open_error(ValueError, tmp_path)


def test_a_file_without_tensors_is_refused(tmp_path):
    write_raw_safetensors(tmp_path, b"{}")
    assert "holds no tensors" in open_error(ValueError, tmp_path)
