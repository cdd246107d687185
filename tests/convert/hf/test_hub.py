"""Downloads from the Hugging Face Hub, without the network."""

from __future__ import annotations

import errno
import logging
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from btlm_jax.checkpoint.assets import ASSET_NAMES
from btlm_jax.convert.hf import hub as hf_hub
from btlm_jax.convert.hf.source import open_hf
from support.hf_directories import (
    MAIN_FILES,
    SHARDS,
    TENSORS,
    open_error,
    write_sharded,
    write_single,
)

REPO = "cerebras/btlm-3b-8k-base"


class FakeHub:
    """Replaces the two functions of huggingface_hub that are called."""

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
    """Returns an error of the Hub, without the response object of its HTTP library."""
    cls = getattr(hub_errors, name)
    error = cls.__new__(cls)
    error.args = (f"{status} Client Error.\n\nRequest ID: 7\nmore",)
    return error


def test_only_needed_files_are_fetched(tmp_path, monkeypatch):
    wanted = [*SHARDS, MAIN_FILES[1], "config.json", "tokenizer.json"]
    listed = [*wanted, "pytorch_model.bin", "README.md"]
    hub = FakeHub(monkeypatch, listed, str(write_sharded(tmp_path)))
    monkeypatch.setenv("HF_TOKEN", "secret")
    opened = open_hf(REPO, revision="v1")
    assert set(opened.tensors) == set(TENSORS)
    assert opened.revision == tmp_path.name  # the Hub's cache names it by its commit
    (_, repo, listing), (_, _, download) = hub.calls
    assert repo == REPO and listing == {"revision": "v1", "token": "secret"}
    assert (download["revision"], download["token"]) == ("c0ffee", "secret")
    assert set(download["allow_patterns"]) == set(wanted)


def test_a_stored_token_is_not_sent(tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch, ["config.json", MAIN_FILES[0]], str(write_single(tmp_path)))
    open_hf(REPO)
    assert [kwargs["token"] for _, _, kwargs in hub.calls] == [False, False]


def test_config_and_preferred_weights_are_selected():
    def select(*listed):
        return hf_hub.select_files(listed, ("config.json", *ASSET_NAMES), MAIN_FILES)

    config = "config.json"
    assert select(config, "pytorch_model.bin", "training_args.bin") == [config, MAIN_FILES[2]]
    assert select(config, "pytorch_model.bin", MAIN_FILES[0]) == [config, MAIN_FILES[0]]
    assert select(config, "onnx/model.safetensors") == [config]
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    other = ("optimizer.bin", "pytorch_model/x.bin")
    assert select(config, *shards, MAIN_FILES[3], *other) == [config, MAIN_FILES[3], *shards]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Name or service not known"),
        RuntimeError("httpx: connect failed\nsecond line"),
        hub_errors.OfflineModeIsEnabled("offline mode is enabled"),
    ],
)
def test_an_unreachable_hub_is_reported(monkeypatch, error):
    FakeHub(monkeypatch, error, FileNotFoundError("not cached"))
    message = open_error(ConnectionError, REPO)
    assert REPO in message and "HF_HUB_OFFLINE" in message and "second line" not in message


def test_the_cached_copy_is_used_if_the_hub_cannot_be_reached(tmp_path, monkeypatch, caplog):
    hub = FakeHub(monkeypatch, ConnectionError("down"), str(write_single(tmp_path)))
    with caplog.at_level(logging.WARNING):
        assert open_hf(REPO).description == "safetensors"
    assert hub.calls[-1][2]["local_files_only"] is True
    assert "cached copy" in caplog.text


@pytest.mark.parametrize(
    ("name", "status", "kind", "message_part"),
    [
        ("RepositoryNotFoundError", 404, FileNotFoundError, "set HF_TOKEN"),
        ("GatedRepoError", 403, FileNotFoundError, "set HF_TOKEN"),
        ("RevisionNotFoundError", 404, FileNotFoundError, "no revision 'v9'"),
        ("HfHubHTTPError", 503, ConnectionError, "503 Client Error"),
    ],
)
def test_errors_of_the_hub_are_explained(monkeypatch, name, status, kind, message_part):
    hub = FakeHub(monkeypatch, http_error(name, status))
    message = open_error(kind, REPO, revision="v9")
    assert REPO in message and message_part in message
    assert len(hub.calls) == 1


def test_failed_downloads_are_reported(monkeypatch):
    hub = FakeHub(monkeypatch, ["config.json", MAIN_FILES[0]], TimeoutError("read timed out"))
    assert "TimeoutError: read timed out" in open_error(ConnectionError, REPO)
    hub.snapshot = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=r"No space left on device.*HF_HOME") as caught:
        open_hf(REPO)
    assert caught.value.errno == errno.ENOSPC


def test_repositories_without_config_or_weights_are_reported(monkeypatch):
    hub = FakeHub(monkeypatch, ["README.md", "config.json"])
    message = open_error(FileNotFoundError, REPO)
    assert "README.md" in message and REPO in message
    hub.listed = [MAIN_FILES[0]]
    assert "no config.json" in open_error(FileNotFoundError, REPO)
    assert all(call == "list" for call, _, _ in hub.calls)
