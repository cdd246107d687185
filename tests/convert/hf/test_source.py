"""Opening of Hugging Face directories with every form of weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from btlm_jax.convert.hf.source import open_hf
from support import golden
from support.hf_directories import (
    MAIN_FILES,
    TENSORS,
    open_error,
    write_config,
    write_sharded,
    write_single,
)

TORCH_BIN = golden.GOLDEN / "torch_bin"
EXPECTED = dict(np.load(TORCH_BIN / "state_dict.npz"))


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


@pytest.mark.parametrize(
    ("write", "description"),
    [(write_single, "safetensors"), (write_sharded, "safetensors, 2 shards")],
)
def test_safetensors_are_opened_and_read(tmp_path, write, description):
    source = open_hf(write(tmp_path))
    assert source.directory == tmp_path
    assert source.config == {"model_type": "btlm"}
    assert source.description == description
    assert set(source.tensors) == set(TENSORS)
    for name, expected in TENSORS.items():
        info = source.tensors[name]
        assert (info.name, info.shape, info.dtype) == (name, expected.shape, expected.dtype)
        array = source.read_tensor(name)
        assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, expected)
    assert open_hf(str(tmp_path)) == source


def test_torch_files_are_opened_and_read(tmp_path):
    shutil.copy(TORCH_BIN / "state_dict.bin", write_config(tmp_path / "one") / "pytorch_model.bin")
    shutil.copytree(TORCH_BIN / "sharded", tmp_path / "two")
    write_config(tmp_path / "two")
    for name, description in [("one", "torch .bin"), ("two", "torch .bin, 2 shards")]:
        source = open_hf(tmp_path / name)
        assert source.description == description
        assert set(source.tensors) == set(EXPECTED)
        for tensor, expected in EXPECTED.items():
            array = source.read_tensor(tensor)
            assert array.dtype == source.tensors[tensor].dtype
            assert array.shape == source.tensors[tensor].shape
            np.testing.assert_array_equal(bits(array), expected)


def test_symlinks_as_in_the_hub_cache_are_followed(tmp_path):
    blobs = write_sharded(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    np.testing.assert_array_equal(open_hf(snapshot).read_tensor("ln.bias"), TENSORS["ln.bias"])


def test_the_files_that_transformers_prefers_are_read_and_the_others_are_named(
    tmp_path, package_log
):
    write_config(tmp_path)
    for file in (TORCH_BIN / "sharded").iterdir():
        shutil.copy(file, tmp_path)
    assert open_hf(tmp_path).description == "torch .bin, 2 shards"
    assert "ignores" not in package_log.text
    shutil.copy(TORCH_BIN / "state_dict.bin", tmp_path / "pytorch_model.bin")
    assert open_hf(tmp_path).description == "torch .bin"
    assert "ignores pytorch_model-00001-of-00002.bin" in package_log.text
    write_sharded(tmp_path)
    assert open_hf(tmp_path).description == "safetensors, 2 shards"
    write_single(tmp_path)
    assert open_hf(tmp_path).description == "safetensors"
    # The shards of an older generation are gone, and only their index is left.
    for file in tmp_path.glob("model-*"):
        file.unlink()
    package_log.clear()
    assert open_hf(tmp_path).description == "safetensors"
    assert "ignores model.safetensors.index.json" in package_log.text


def test_weights_that_transformers_would_not_find_are_named_with_the_fix(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "not its index model.safetensors.index.json" in open_error(FileNotFoundError, tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    message = open_error(FileNotFoundError, tmp_path)
    assert "nor model-00001-of-00002.safetensors" in message
    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "model.fp16.safetensors")
    assert "a variant of the weights only" in open_error(FileNotFoundError, tmp_path)
    (tmp_path / "model.safetensors").symlink_to("../blobs/0")
    message = open_error(FileNotFoundError, tmp_path)
    assert "is a link to ../blobs/0, which does not exist" in message


def test_a_directory_with_both_formats_is_refused(tmp_path):
    write_single(tmp_path)
    (tmp_path / "_CHECKPOINT_METADATA").write_text("{}")
    message = open_error(ValueError, tmp_path)
    assert "both an Orbax checkpoint" in message and "model.safetensors" in message


@pytest.mark.parametrize(
    ("name", "message_part"),
    [
        ("adapter_config.json", "a PEFT adapter of org/base, not a model. Fix: merge it first"),
        ("global_step10", "DeepSpeed ZeRO"),
        ("__0_0.distcp", "FSDP"),
        ("x.Q4_K_M.gguf", "GGUF"),
        ("consolidated.00.pth", "Meta's"),
        ("flax_model.msgpack", "Flax"),
        ("tf_model.h5", "TensorFlow"),
        ("model.onnx", "ONNX"),
        ("_CHECKPOINT_METADATA", "an Orbax checkpoint"),
        ("epoch=1.ckpt", "PyTorch checkpoint under a name"),
    ],
)
def test_checkpoints_of_other_programs_are_recognized(tmp_path, name, message_part):
    (tmp_path / name).write_text('{"base_model_name_or_path": "org/base"}')
    assert message_part in open_error(FileNotFoundError, tmp_path)
    assert message_part in open_error(FileNotFoundError, write_config(tmp_path))


def test_a_directory_of_orbax_checkpoints_and_one_of_tokens_are_recognized(tmp_path):
    for step in ("4", "8"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
        (tmp_path / "checkpoints" / step / "_CHECKPOINT_METADATA").write_text("{}")
    message = open_error(FileNotFoundError, tmp_path / "checkpoints")
    assert "holds Orbax checkpoints (4, 8). Fix: those that btlm made are used" in message
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/manifest.json").write_text('{"kind": "btlm-jax tokens"}')
    assert "holds tokens of `btlm tokenize`" in open_error(FileNotFoundError, tmp_path / "tokens")


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    file = write_single(tmp_path) / "model.safetensors"

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("btlm_jax.convert.hf.source.read_safetensors_header", refuse)
    assert f"no permission to read {file}" in open_error(PermissionError, tmp_path)


def test_assets_are_the_known_files_that_exist(tmp_path):
    write_single(tmp_path)
    for name in ("merges.txt", "tokenizer.json", "README.md"):
        (tmp_path / name).write_text("x")
    assert open_hf(tmp_path).assets == (tmp_path / "tokenizer.json", tmp_path / "merges.txt")


def test_opening_reads_no_tensor_data(tmp_path, monkeypatch):
    write_sharded(tmp_path)
    opened = open_hf(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.unlink()
    np.testing.assert_array_equal(opened.read_tensor("ln.bias"), TENSORS["ln.bias"])
    with pytest.raises(FileNotFoundError):
        opened.read_tensor("half")
    with pytest.raises(KeyError, match="no tensor 'nope'"):
        opened.read_tensor("nope")


def test_a_file_that_changed_after_opening_is_refused(tmp_path):
    opened = open_hf(write_single(tmp_path))
    save_file({**TENSORS, "half": np.ones((7,), np.float16)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has changed since it was opened"):
        opened.read_tensor("half")
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model\.safetensors has changed"):
        opened.read_tensor("half")


def test_sources_without_a_directory_are_refused(tmp_path):
    absent = tmp_path / "no" / "such"
    message = open_error(FileNotFoundError, absent)
    assert str(absent) in message and '"cerebras/btlm-3b-8k-base"' in message
    # A Path is never a Hub id.
    assert "no directory" in open_error(FileNotFoundError, Path("org/name"))
    for text in ("word", "a/b/c", "../x", "a..b/c", "a/.hidden", "a b/c", "a/b-", "/a"):
        assert "no directory" in open_error(FileNotFoundError, text)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert f"Fix: pass {tmp_path}" in open_error(FileNotFoundError, file)


def test_a_revision_of_a_directory_is_refused(tmp_path):
    assert "revision='main'" in open_error(ValueError, write_single(tmp_path), revision="main")


def test_missing_config_and_weights_are_reported(tmp_path):
    assert "it is empty" in open_error(FileNotFoundError, tmp_path)
    (tmp_path / "notes.txt").write_text("")
    message = open_error(FileNotFoundError, tmp_path)
    assert "config.json is missing" in message and "notes.txt" in message
    message = open_error(FileNotFoundError, write_config(tmp_path))
    assert "it holds config.json, notes.txt" in message and ", ".join(MAIN_FILES) in message


def test_errors_of_torch_files_name_the_file(tmp_path):
    shutil.copy(TORCH_BIN / "nested.bin", write_config(tmp_path) / "pytorch_model.bin")
    message = open_error(ValueError, tmp_path)
    assert str(tmp_path / "pytorch_model.bin") in message and "'state_dict'" in message
