"""Damaged checkpoints, and directories that are none: each error names the file and the fix."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from orbax.checkpoint import v1 as ocp

import btlm_jax as btlm
from btlm_jax.checkpoint import checkpoint, damage, metadata

MARKER = metadata.MARKER_FILE
ARRAY = "state/blocks.0.mlp.c_fc2.kernel"


@contextlib.contextmanager
def changed(path: Path, content: bytes | None):
    """Replaces a file by other content, or removes a file or directory with None, for a while."""
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    try:
        if content is not None:
            path.write_bytes(content)
        yield
    finally:
        path.unlink(missing_ok=True)
        aside.rename(path)


# (file, its new content or how to change it, what the error says)
DAMAGE = [
    (MARKER, None, f"lacks {MARKER}"),
    (MARKER, b"", f"{MARKER} is empty"),
    (MARKER, b'{"a": ', f"{MARKER} is damaged, not JSON"),
    (MARKER, b"\0" * 99, f"{MARKER} holds nothing but blanks or zero bytes"),
    (MARKER, b"\xff\xfe", f"{MARKER} is damaged, not JSON"),
    (MARKER, b"[]", f"{MARKER} holds no JSON object"),
    (MARKER, b"{}", "without BTLM metadata, of another program"),
    ("state/_METADATA", None, "state/_METADATA is missing"),
    ("state/_METADATA", b"", "state/_METADATA is empty"),
    ("state/_METADATA", b"{", "state/_METADATA is damaged, not JSON"),
    ("state/_METADATA", b"null", "state/_METADATA holds no JSON object"),
    ("state/_METADATA", b"{}", "state/_METADATA is no list of arrays"),
    ("state", None, "state/_METADATA is missing"),
    (ARRAY, None, f"{ARRAY}/zarr.json is missing"),
    (f"{ARRAY}/zarr.json", None, f"{ARRAY}/zarr.json is missing"),
    (f"{ARRAY}/zarr.json", b"", f"{ARRAY}/zarr.json is empty"),
    (f"{ARRAY}/zarr.json", b"\0\0", f"{ARRAY}/zarr.json holds nothing but zero bytes"),
    (f"{ARRAY}/zarr.json", b"{}", f"{ARRAY}/zarr.json is damaged"),
    (f"{ARRAY}/zarr.json", {"data_type": "huge"}, "unknown data_type 'huge'"),
    (f"{ARRAY}/zarr.json", {"data_type": "int32"}, "found dtype int32, expected float32"),
    (f"{ARRAY}/zarr.json", {"shape": [3, 5]}, "found shape (3, 5), expected (64, 170)"),
    (f"{ARRAY}/c/0/0", None, f"{ARRAY}/c/0/0 is missing"),
    (f"{ARRAY}/c/0/0", b"", f"{ARRAY}/c/0/0 is truncated"),
    (f"{ARRAY}/c/0/0", b"\0" * 43540, f"{ARRAY}/c/0/0 does not match its checksum"),
]


def test_every_damage_names_the_file_and_what_is_wrong(bytes_checkpoint):
    for name, content, said in DAMAGE:
        file = bytes_checkpoint / name
        if isinstance(content, dict):
            content = json.dumps(json.loads(file.read_text()) | content).encode()
        with changed(file, content), pytest.raises(ValueError) as stacked:
            btlm.load(bytes_checkpoint)
        with changed(file, content), pytest.raises(ValueError) as unstacked:
            btlm.load(bytes_checkpoint, unstacked=True)
        for message in (str(stacked.value), str(unstacked.value)):
            assert str(bytes_checkpoint) in message and said in message, (name, said, message)
            assert len(message) - len(str(bytes_checkpoint)) < 250 and "Handler" not in message


def test_checkpoints_of_orbax_own_layout_name_their_damaged_files(bytes_checkpoint, tmp_path):
    arrays, custom = ocp.load(bytes_checkpoint), ocp.metadata(bytes_checkpoint).custom_metadata
    place = tmp_path / "c"
    ocp.save(place, arrays, custom_metadata=custom)
    data = max((place / "state/d").iterdir(), key=lambda p: p.stat().st_size)
    for file, content, said in (
        (place / "state/manifest.ocdbt", b"", "state/manifest.ocdbt is damaged"),
        (place / "state/manifest.ocdbt", None, "zarr.json is missing and"),
        (data, data.read_bytes()[:500], f"state/d/{data.name} is damaged"),
        (data, None, f"state/d/{data.name} is missing"),
    ):
        with changed(file, content), pytest.raises(damage.DamagedCheckpoint) as error:
            btlm.load(place)
        assert said in str(error.value) and len(str(error.value)) < 400


def test_a_directory_that_is_no_checkpoint_is_named_for_what_it_is(bytes_checkpoint, tmp_path):
    def directory(name: str, *files: str) -> Path:
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("{}")
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        return tmp_path / name

    steps = tmp_path / "run" / "checkpoints"
    steps.mkdir(parents=True)
    for name in ("9", "10", "11.orbax-checkpoint-tmp-1"):
        shutil.copytree(bytes_checkpoint, steps / name)
    shutil.copytree(bytes_checkpoint, steps / "12")
    (steps / "12" / MARKER).unlink()
    tokens = directory("tokens", "manifest.json")
    (tokens / "manifest.json").write_text('{"kind": "btlm-jax tokens"}')
    ocp.save(tmp_path / "foreign", {"x": np.zeros(3)})
    for path, said in (
        (directory("empty"), "it is empty"),
        (directory("hf", "config.json"), "btlm convert"),
        (directory("torch", "pytorch_model.bin"), "pytorch_model.bin without config.json"),
        (directory("other", *"abcdefgh"), "it holds a, b, c, d, e and 3 more"),
        (directory(".x.partial", "key.json"), "unfinished work; run the command"),
        (directory(".x.partial") / "key.json", "it is a file"),
        (directory("new", "recipe.json"), "a run directory without a finished checkpoint"),
        (tokens, "it holds tokens"),
        (bytes_checkpoint / "state", f"it is a part of one; pass {bytes_checkpoint}"),
        (bytes_checkpoint / MARKER, f"pass the directory of a checkpoint, {bytes_checkpoint}"),
        (bytes_checkpoint.parent, f"such as {bytes_checkpoint}"),
        (steps, f"such as {steps / '10'}"),
        (steps / "11.orbax-checkpoint-tmp-1", f"still being written, .*use {steps / '10'}"),
        (steps / "12", f"lacks {MARKER}.*use {steps / '10'}"),
        (steps.parent, f"12 is not an Orbax checkpoint.*use {steps / '10'}"),
        (tmp_path / "foreign", "of another program with the items state"),
    ):
        with pytest.raises(ValueError, match=said):
            metadata.read_metadata(path)


def test_a_missing_checkpoint_that_looks_like_a_hub_id_is_to_be_converted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="`btlm convert cerebras/btlm-3b-8k-base DST`"):
        metadata.read_metadata("cerebras/btlm-3b-8k-base")
    with pytest.raises(FileNotFoundError) as error:
        metadata.read_metadata(tmp_path / "nothing")
    assert "convert" not in str(error.value)


def test_storage_that_fails_is_not_reported_as_damage(bytes_checkpoint, monkeypatch):
    """Otherwise a run would set a whole checkpoint aside."""
    path = epath.Path(os.fspath(bytes_checkpoint))
    denied = 'PERMISSION_DENIED: opening local file "/a/b": [OS error 13: EACCES Permission denied]'
    error = damage.reading_error(path, ValueError(denied))
    assert isinstance(error, PermissionError) and error.filename == "/a/b"
    error = damage.reading_error(path, ValueError("UNAVAILABLE: Connection reset"))
    assert isinstance(error, ConnectionError) and "cannot be read now" in str(error)

    def fail(*args, **kwargs):
        try:
            raise OSError(errno.EIO, "Input/output error", "/a/b")
        except OSError:
            raise KeyError("incompatible handler: <class 'PyTreeHandler'>")  # noqa: B904 (as Orbax raises it, which has no cause but a context)

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", fail)
    with pytest.raises(OSError, match="Input/output error"):
        btlm.load(bytes_checkpoint)
