"""Opening Hugging Face checkpoints: every form of weights, every error, and the Hub without one."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import errors as hub_errors
from safetensors.numpy import save_file

from btlm_jax.checkpoint.assets import ASSET_NAMES
from btlm_jax.convert.hf import hub as hf_hub
from btlm_jax.convert.hf.source import WEIGHT_FORMS, TensorInfo, open_hf

GOLDEN = Path(__file__).parents[2] / "golden" / "torch_bin"
EXPECTED = dict(np.load(GOLDEN / "state_dict.npz"))
MAINS = [form.main for form in WEIGHT_FORMS]

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


def directory(path: Path, **config) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "btlm", **config}))
    return path


def single(path: Path) -> Path:
    save_file(TENSORS, directory(path) / "model.safetensors")
    return path


def write_index(path: Path, weight_map: object) -> None:
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (path / "model.safetensors.index.json").write_text(index)


def sharded(path: Path) -> Path:
    directory(path)
    for shard, names in SHARDS.items():
        save_file({n: TENSORS[n] for n in names}, path / shard)
    write_index(path, {n: shard for shard, names in SHARDS.items() for n in names})
    return path


def write_raw(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def message_of(error: type[Exception], source, **kwargs) -> str:
    with pytest.raises(error) as caught:
        open_hf(source, **kwargs)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    message = str(caught.value)
    assert "Fix: " in message and "\n" not in message
    return message


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


# Each form of weights.


@pytest.mark.parametrize(
    ("make", "description"), [(single, "safetensors"), (sharded, "safetensors, 2 shards")]
)
def test_safetensors(tmp_path, make, description):
    source = open_hf(make(tmp_path))
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


def test_torch_bin_single_and_sharded(tmp_path):
    shutil.copy(GOLDEN / "state_dict.bin", directory(tmp_path / "one") / "pytorch_model.bin")
    shutil.copytree(GOLDEN / "sharded", tmp_path / "two")
    directory(tmp_path / "two")
    for name, description in [("one", "torch .bin"), ("two", "torch .bin, 2 shards")]:
        source = open_hf(tmp_path / name)
        assert source.description == description
        assert set(source.tensors) == set(EXPECTED)
        for tensor, expected in EXPECTED.items():
            array = source.read_tensor(tensor)
            assert array.dtype == source.tensors[tensor].dtype
            assert array.shape == source.tensors[tensor].shape
            np.testing.assert_array_equal(bits(array), expected)


def test_symlinks_as_in_the_hub_cache(tmp_path):
    blobs = sharded(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    np.testing.assert_array_equal(open_hf(snapshot).read_tensor("ln.bias"), TENSORS["ln.bias"])


def test_order_of_preference(tmp_path):
    directory(tmp_path)
    shutil.copy(GOLDEN / "state_dict.bin", tmp_path / "pytorch_model.bin")
    assert open_hf(tmp_path).description == "torch .bin"
    for file in (GOLDEN / "sharded").iterdir():
        shutil.copy(file, tmp_path)
    assert open_hf(tmp_path).description == "torch .bin, 2 shards"
    single(tmp_path)
    assert open_hf(tmp_path).description == "safetensors"
    sharded(tmp_path)
    assert open_hf(tmp_path).description == "safetensors, 2 shards"


def test_assets_are_those_present(tmp_path):
    single(tmp_path)
    for name in ("merges.txt", "tokenizer.json", "README.md"):
        (tmp_path / name).write_text("x")
    assert open_hf(tmp_path).assets == (tmp_path / "tokenizer.json", tmp_path / "merges.txt")


def test_opening_reads_no_tensor_data(tmp_path, monkeypatch):
    sharded(tmp_path)
    opened = open_hf(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.unlink()
    np.testing.assert_array_equal(opened.read_tensor("ln.bias"), TENSORS["ln.bias"])
    with pytest.raises(FileNotFoundError):
        opened.read_tensor("half")
    with pytest.raises(KeyError, match="no tensor 'nope'"):
        opened.read_tensor("nope")


def test_a_file_changed_after_opening(tmp_path):
    opened = open_hf(single(tmp_path))
    save_file({**TENSORS, "half": np.ones((7,), np.float16)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has changed since it was opened"):
        opened.read_tensor("half")
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model\.safetensors has changed"):
        opened.read_tensor("half")


# Directories.


def test_sources_that_are_no_directory(tmp_path):
    absent = tmp_path / "no" / "such"
    message = message_of(FileNotFoundError, absent)
    assert str(absent) in message and '"cerebras/btlm-3b-8k-base"' in message
    # A Path is never taken for a Hub id.
    assert "no directory" in message_of(FileNotFoundError, Path("org/name"))
    for text in ("word", "a/b/c", "../x", "a..b/c", "a/.hidden", "a b/c", "a/b-", "/a"):
        assert "no directory" in message_of(FileNotFoundError, text)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert f"Fix: pass {tmp_path}" in message_of(FileNotFoundError, file)


def test_revision_with_a_directory(tmp_path):
    assert "revision='main'" in message_of(ValueError, single(tmp_path), revision="main")


def test_missing_config_and_weights(tmp_path):
    assert "it is empty" in message_of(FileNotFoundError, tmp_path)
    (tmp_path / "notes.txt").write_text("")
    message = message_of(FileNotFoundError, tmp_path)
    assert "config.json is missing" in message and "notes.txt" in message
    message = message_of(FileNotFoundError, directory(tmp_path))
    assert "it holds config.json, notes.txt" in message and ", ".join(MAINS) in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1,\n "b": }', "line 2, column 7"),
        (b"", "line 1, column 1"),
        (b'{"a": "\xff"}', "not UTF-8 text at byte 7"),
        (b"[1]", "holds a JSON list"),
        (b'{"a": 1, "a": 2}', "twice in one JSON object: a"),
        (b"[" * 100_000, "recursion"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "4300"),
    ],
)
def test_broken_config(tmp_path, content, said):
    (single(tmp_path) / "config.json").write_bytes(content)
    message = message_of(ValueError, tmp_path)
    assert str(tmp_path / "config.json") in message and said in message


# Index files.


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", ".", "", "a\\b", "C:x", None, 3])
def test_index_that_leads_out_of_the_directory(tmp_path, name):
    sharded(tmp_path)
    write_index(tmp_path, {"ln.bias": "model-00001-of-00002.safetensors", "half": name})
    message = message_of(ValueError, tmp_path)
    assert "index.json" in message and repr(name) in message


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_index_without_weight_map(tmp_path, weight_map):
    write_index(directory(tmp_path), weight_map)
    assert "'weight_map'" in message_of(ValueError, tmp_path)


def test_broken_index(tmp_path):
    (directory(tmp_path) / MAINS[0]).write_text("{")
    assert f"{MAINS[0]}: invalid JSON" in message_of(ValueError, tmp_path)
    (tmp_path / MAINS[0]).write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert "twice in one JSON object: a" in message_of(ValueError, tmp_path)


def test_all_missing_shards_are_listed(tmp_path):
    sharded(tmp_path)
    for shard in SHARDS:
        (tmp_path / shard).unlink()
    message = message_of(FileNotFoundError, tmp_path)
    assert "2 shard(s)" in message and all(shard in message for shard in SHARDS)


def test_all_disagreements_of_index_and_shards_are_listed(tmp_path):
    sharded(tmp_path)
    first, second = SHARDS
    save_file({n: TENSORS[n] for n in [*SHARDS[second], "ln.bias"]}, tmp_path / second)
    write_index(
        tmp_path,
        {"ln.bias": first, "half": first, "mask": second, "scalar": second, "ghost": second},
    )
    message = message_of(ValueError, tmp_path)
    for said in (
        f"'half' is not in {first}",
        f"'ghost' is not in {second}",
        f"'wte.weight' is in {first} but not in the index",
        f"'empty' is in {second} but not in the index",
        f"'ln.bias' is in 2 shards: {first}, {second}",
    ):
        assert said in message


# Damaged weight files.


def test_truncated_safetensors(tmp_path):
    file = single(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 5, 40, len(whole) - 1):
        file.write_bytes(whole[:length])
        message = message_of(ValueError, tmp_path)
        assert str(file) in message and "truncated or corrupt" in message


def test_git_lfs_pointer(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (directory(tmp_path) / "model.safetensors").write_bytes(pointer)
    assert "git lfs pull" in message_of(ValueError, tmp_path)


def test_unsupported_dtypes_are_listed(tmp_path):
    header = {
        "a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]},
        "b": {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [2, 3]},
    }
    write_raw(directory(tmp_path) / "model.safetensors", json.dumps(header).encode(), bytes(3))
    message = message_of(ValueError, tmp_path)
    assert "'a': F8_E4M3" in message and "'b': F8_E5M2" in message and "BF16" in message


def test_unknown_dtype(tmp_path):
    header = b'{"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 2]}}'
    write_raw(directory(tmp_path) / "model.safetensors", header, bytes(2))
    assert "F99" in message_of(ValueError, tmp_path)


def test_a_tensor_twice_in_one_header(tmp_path):
    entry = b'"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}'
    write_raw(directory(tmp_path) / "model.safetensors", b"{%b, %b}" % (entry, entry), bytes(2))
    assert "twice in one JSON object: a" in message_of(ValueError, tmp_path)


def test_no_tensors(tmp_path):
    write_raw(directory(tmp_path) / "model.safetensors", b"{}")
    assert "holds no tensors" in message_of(ValueError, tmp_path)


def test_torch_errors_name_the_file(tmp_path):
    shutil.copy(GOLDEN / "nested.bin", directory(tmp_path) / "pytorch_model.bin")
    message = message_of(ValueError, tmp_path)
    assert str(tmp_path / "pytorch_model.bin") in message and "'state_dict'" in message


# The Hub, without the network.

REPO = "cerebras/btlm-3b-8k-base"


class FakeHub:
    """Stands in for the two huggingface_hub functions that are used."""

    def __init__(self, monkeypatch, listed=None, snapshot=None):
        self.listed, self.snapshot, self.calls = listed, snapshot, []
        monkeypatch.setattr(huggingface_hub, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.delenv("HF_TOKEN", raising=False)

    def answer(self, value):
        if isinstance(value, Exception):
            raise value
        return value

    def model_info(self, repo_id, **kwargs):
        self.calls.append(("list", repo_id, kwargs))
        siblings = [SimpleNamespace(rfilename=name) for name in self.answer(self.listed)]
        return SimpleNamespace(sha="c0ffee", siblings=siblings)

    def snapshot_download(self, repo_id, **kwargs):
        self.calls.append(("download", repo_id, kwargs))
        return self.answer(self.snapshot)


def http_error(name: str, status: int) -> Exception:
    """A Hub error, made without its HTTP library's response object."""
    cls = getattr(hub_errors, name)
    error = cls.__new__(cls)
    error.args = (f"{status} Client Error.\n\nRequest ID: 7\nmore",)
    return error


def test_hub_fetches_only_what_is_needed(tmp_path, monkeypatch):
    listed = [*SHARDS, MAINS[0], "config.json", "tokenizer.json", "pytorch_model.bin", "README.md"]
    hub = FakeHub(monkeypatch, listed, str(sharded(tmp_path)))
    monkeypatch.setenv("HF_TOKEN", "secret")
    opened = open_hf(REPO, revision="v1")
    assert set(opened.tensors) == set(TENSORS)
    assert opened.revision == tmp_path.name  # the Hub's cache names it by its commit
    (_, repo, asked), (_, _, got) = hub.calls
    assert repo == REPO and asked == {"revision": "v1", "token": "secret"}
    assert (got["revision"], got["token"]) == ("c0ffee", "secret")
    assert set(got["allow_patterns"]) == {"config.json", "tokenizer.json", MAINS[0], *SHARDS}


def test_hub_sends_no_stored_token(tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch, ["config.json", MAINS[1]], str(single(tmp_path)))
    open_hf(REPO)
    assert [kwargs["token"] for _, _, kwargs in hub.calls] == [False, False]


def test_select_files():
    def chosen(*listed):
        return hf_hub.select_files(listed, ("config.json", *ASSET_NAMES), MAINS)

    config = "config.json"
    assert chosen(config, "pytorch_model.bin", "training_args.bin") == [config, MAINS[3]]
    assert chosen(config, "pytorch_model.bin", MAINS[1]) == [config, MAINS[1]]
    assert chosen(config, "onnx/model.safetensors") == [config]
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    other = ("optimizer.bin", "pytorch_model/x.bin")
    assert chosen(config, *shards, MAINS[2], *other) == [config, MAINS[2], *shards]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Name or service not known"),
        RuntimeError("httpx: connect failed\nsecond line"),
        hub_errors.OfflineModeIsEnabled("offline mode is enabled"),
    ],
)
def test_hub_unreachable(monkeypatch, error):
    FakeHub(monkeypatch, error, FileNotFoundError("not cached"))
    message = message_of(ConnectionError, REPO)
    assert REPO in message and "HF_HUB_OFFLINE" in message and "second line" not in message


def test_hub_unreachable_but_cached(tmp_path, monkeypatch, caplog):
    hub = FakeHub(monkeypatch, ConnectionError("down"), str(single(tmp_path)))
    with caplog.at_level(logging.WARNING):
        assert open_hf(REPO).description == "safetensors"
    assert hub.calls[-1][2]["local_files_only"] is True
    assert "cached copy" in caplog.text


@pytest.mark.parametrize(
    ("name", "status", "kind", "said"),
    [
        ("RepositoryNotFoundError", 404, FileNotFoundError, "set HF_TOKEN"),
        ("GatedRepoError", 403, FileNotFoundError, "set HF_TOKEN"),
        ("RevisionNotFoundError", 404, FileNotFoundError, "no revision 'v9'"),
        ("HfHubHTTPError", 503, ConnectionError, "503 Client Error"),
    ],
)
def test_hub_answers_with_an_error(monkeypatch, name, status, kind, said):
    hub = FakeHub(monkeypatch, http_error(name, status))
    message = message_of(kind, REPO, revision="v9")
    assert REPO in message and said in message
    assert len(hub.calls) == 1


def test_hub_download_fails(monkeypatch):
    hub = FakeHub(monkeypatch, ["config.json", MAINS[1]], TimeoutError("read timed out"))
    assert "TimeoutError: read timed out" in message_of(ConnectionError, REPO)
    hub.snapshot = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=r"No space left on device.*HF_HOME") as caught:
        open_hf(REPO)
    assert caught.value.errno == errno.ENOSPC


def test_hub_repository_without_weights(monkeypatch):
    hub = FakeHub(monkeypatch, ["README.md", "config.json"])
    message = message_of(FileNotFoundError, REPO)
    assert "README.md" in message and REPO in message
    hub.listed = [MAINS[1]]
    assert "no config.json" in message_of(FileNotFoundError, REPO)
    assert all(call == "list" for call, _, _ in hub.calls)


def test_tensor_info_is_exported():
    info = TensorInfo("a", (1,), np.dtype(np.float32), Path("f"))
    assert (info.name, info.shape, info.dtype, info.file) == ("a", (1,), np.float32, Path("f"))
