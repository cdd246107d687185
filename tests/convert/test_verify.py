"""`verify` finds checkpoints equal in every format, and one changed bit in any of them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

import btlm_jax as btlm
from btlm_jax import BTLMConfig
from btlm_jax.checkpoint import metadata
from btlm_jax.convert import convert, export, verify
from btlm_jax.convert.hf import source as hf_source
from support.checkpoint_forms import (
    BTLM_BIN,
    FORMS,
    NAME,
    UNTIED,
    differences,
    write_by_orbax,
    write_tensors,
)


def test_equal_checkpoints_are_equal_in_every_pair_of_formats(forms):
    """The digest depends on the weights, not on the format."""
    assert set(forms) == set(FORMS)
    assert (
        metadata.read_metadata(forms["ocdbt"]).ocdbt
        and not metadata.read_metadata(forms["orbax's own"]).ocdbt
    )
    digests = set()
    for a in FORMS:
        for b in FORMS:
            result = verify(forms[a], forms[b])
            assert result, (a, b, str(result))
            assert result.tensors == 31
            digests.add((result.digest, result.nbytes))
    assert len(digests) == 1


def test_conversion_reports_have_the_same_digest(forms, tmp_path):
    reports = [convert(forms["sharded bin"], tmp_path / "c")]
    reports += [convert(forms["safetensors"], tmp_path / "d")]
    reports += [export(tmp_path / "c", tmp_path / "e", max_shard_bytes=9000)]
    reports += [export(forms["ocdbt"], tmp_path / "f")]
    results = [verify(x) for x in (tmp_path / "c", tmp_path / "e", tmp_path / "f")]
    results += [verify(forms["bin"], forms["orbax"])]
    assert len({x.digest for x in (*reports, *results)}) == 1
    assert {x.nbytes for x in results} == {reports[0].nbytes}
    assert results[0].digest in str(results[0])


def test_one_changed_bit_is_found_in_every_pair_of_formats(forms, tmp_path):
    tensors = load_file(forms["safetensors"] / "model.safetensors")
    changed = tensors[NAME].copy()
    changed.view(np.uint16)[2, 3] ^= 1
    difference = abs(np.subtract(changed[2, 3], tensors[NAME][2, 3], dtype=np.float64))
    hf = tmp_path / "hf"
    hf.mkdir()
    shutil.copy(BTLM_BIN / "single/config.json", hf)
    save_file(tensors | {NAME: changed}, hf / "model.safetensors")
    convert(hf, tmp_path / "c")
    export(tmp_path / "c", tmp_path / "e")
    config = metadata.read_metadata(tmp_path / "c").config
    write_by_orbax(tmp_path / "t", config, load_file(hf / "model.safetensors"))
    message = f"1 of {changed.size:,} elements differ, max |difference| {difference:.6g}"
    for b in (hf, tmp_path / "c", tmp_path / "e", tmp_path / "t"):
        for a in FORMS:
            assert differences(forms[a], b) == {NAME: message} == differences(b, forms[a]), (a, b)
        assert verify(forms["orbax"], b, atol=float(difference))
        assert not verify(forms["orbax"], b, atol=float(difference) * 0.999)
    assert verify(hf, tmp_path / "c").digest != verify(forms["bin"], forms["bin"]).digest


def test_checkpoints_without_hashes_are_refused_alone(forms):
    for name in ("safetensors", "bin", "sharded bin", "ocdbt", "orbax's own"):
        with pytest.raises(ValueError, match=r"records no SHA-256.*compare it with another") as e:
            verify(forms[name])
        assert f"`btlm verify {forms[name]} OTHER`" in str(e.value)


def test_hashes_recorded_by_training_are_checked(forms, tmp_path):
    """By `verify` and by an export."""
    meta = metadata.read_metadata(forms["orbax"])
    tensors = load_file(forms["safetensors"] / "model.safetensors")
    path = write_by_orbax(tmp_path / "t", meta.config, tensors, dict(meta.sha256))
    assert verify(path).digest == verify(forms["orbax"]).digest
    tensors[NAME] = tensors[NAME] + tensors[NAME]
    path = write_by_orbax(tmp_path / "u", meta.config, tensors, dict(meta.sha256))
    assert list(differences(path)) == [NAME] and "recorded" in differences(path)[NAME]
    with pytest.raises(ValueError, match=f"{NAME}: its bytes do not match the recorded SHA-256"):
        export(path, tmp_path / "e")


def test_missing_sources_are_reported(tmp_path, monkeypatch, forms):
    """Paths, URLs, and a name that could be a path or a Hub id."""
    for first, second in ((tmp_path / "x", forms["bin"]), (forms["bin"], str(tmp_path / "x"))):
        with pytest.raises(FileNotFoundError, match=str(tmp_path / "x")):
            verify(first, second)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        verify("file:///nowhere/at/all")
    fetched = []

    def fetch(repo_id, *args):
        fetched.append(repo_id)
        raise FileNotFoundError(f"no directory and no model on the Hub is named {repo_id!r}")

    monkeypatch.setattr(hf_source, "fetch_from_hub", fetch)
    for a, b in (("runs/checkpoint", None), (forms["orbax"], "runs/checkpoint")):
        with pytest.raises(
            FileNotFoundError, match="no model on the Hub is named 'runs/checkpoint'"
        ):
            verify(a, b)
    assert fetched == ["runs/checkpoint"] * 2


def test_the_structure_is_read_only_without_a_second_checkpoint(forms, monkeypatch):
    def read(*_):
        raise AssertionError("read")

    monkeypatch.setattr(metadata, "structure_sha256", read)
    assert verify(forms["orbax"], forms["export"])
    with pytest.raises(AssertionError, match="read"):
        verify(forms["orbax"])


def test_directories_without_a_checkpoint_are_refused(tmp_path, forms):
    with pytest.raises(ValueError, match="not an Orbax checkpoint"):
        verify(tmp_path)
    ocp.save(tmp_path / "foreign", {"x": np.zeros(3)})
    with pytest.raises(ValueError, match="without BTLM metadata"):
        verify(forms["bin"], tmp_path / "foreign")


def test_a_budget_below_one_thread_is_refused(forms):
    with pytest.raises(ValueError, match="max_memory: found 1000 B, expected at least"):
        verify(forms["orbax"], forms["bin"], max_memory=1000)
    assert verify(forms["orbax"], forms["bin"], max_memory=(10 * 16) << 20)  # one thread
    assert verify(forms["orbax"], max_memory=80 << 20)


def test_relative_paths_are_accepted(forms, monkeypatch):
    monkeypatch.chdir(forms["orbax"].parent)
    assert verify("orbax") and verify("export", "./orbax") and verify(Path("safetensors"), "ocdbt")


def test_verifying_writes_nothing(forms):
    before = {p: p.stat().st_mtime_ns for f in forms.values() for p in [f, *f.rglob("*")]}
    verify(forms["orbax"])
    verify(forms["ocdbt"], forms["export"])
    verify(forms["bin"], forms["orbax's own"])
    assert before == {p: p.stat().st_mtime_ns for f in forms.values() for p in [f, *f.rglob("*")]}


def test_a_checkpoint_saved_from_a_mesh_is_bitwise_equal(forms, tmp_path):
    model, params = btlm.load(
        forms["orbax"], mesh=btlm.make_mesh(fsdp=2, devices=jax.devices()[:2])
    )
    btlm.save(tmp_path / "c", model.config, params)
    assert verify(tmp_path / "c", forms["bin"])
    assert verify(tmp_path / "c").digest == verify(forms["orbax"]).digest
    assert dataclasses.replace(model.config, alibi_slopes=None) == BTLMConfig.from_hf(
        json.loads((BTLM_BIN / "single/config.json").read_text())
    )


def test_the_command_reports_equal_checkpoints(run_verify, forms):
    digest = verify(forms["bin"], forms["bin"]).digest
    nbytes = metadata.read_metadata(forms["orbax"]).nbytes
    expected = f"31 tensors, {nbytes:,} bytes: no difference\nsha256 of the tensors' sha256: "
    for argv in (["orbax"], ["export"], ["bin", "orbax"], ["ocdbt", "sharded export"]):
        code, out, _ = run_verify(*(forms[name] for name in argv))
        assert code == 0 and out == f"{expected}{digest}\n"
    assert run_verify(forms["bin"], forms["orbax"], "--logits", "--max-memory", "160MiB")[0] == 0


def test_the_command_prints_a_table_of_differences(run_verify, tmp_path):
    tensors = UNTIED.weights
    a = write_tensors(tmp_path / "a", UNTIED, tensors)
    tensors[NAME][0, 0] += 1
    b = write_tensors(tmp_path / "b", UNTIED, tensors, eos_token_id=3)
    code, out, _ = run_verify(a, b)
    lines = out.splitlines()
    assert code == 1 and lines[0] == "2 differences in 32 tensors:" and len(lines) == 3
    width = len(NAME)
    assert lines[1].startswith("config eos_token_id".ljust(width) + "  ") and " and 3" in lines[1]
    assert lines[2].startswith(f"{NAME}  1 of {tensors[NAME].size:,} elements differ, max")
    code, out, _ = run_verify(a, b, "--atol", "2")
    assert code == 1 and out.splitlines()[0] == "1 difference in 32 tensors:"


def test_the_command_reports_errors(run_verify, forms, tmp_path):
    arguments_by_message = {
        "records no SHA-256": [forms["bin"]],
        "no directory": [tmp_path / "x"],
        "not an Orbax checkpoint": [tmp_path],
        "--max-memory": [forms["orbax"], "--max-memory", "1kB"],
    }
    for message, argv in arguments_by_message.items():
        code, out, err = run_verify(*argv)
        assert code == 2 and message in err and not out, message
    code, out, err = run_verify()
    assert code == 2 and "required" in (out + err).lower()
    assert os.listdir(tmp_path) == []
