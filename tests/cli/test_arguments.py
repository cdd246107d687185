"""Shared options: meshes, outputs that are checked before the work, and valid JSON."""

from __future__ import annotations

import json
import math

import pytest

from btlm_jax import BTLM, cli
from btlm_jax.cli.arguments import (
    mesh_from_overrides,
    translate_old_mesh_options,
    write_json,
)
from btlm_jax.mup_study import corpus
from btlm_jax.train.aot import topologies
from btlm_jax.train.bench import measure


@pytest.mark.parametrize(
    "command",
    [
        *(
            f"bench {what} --json DIR"
            for what in ("train", "loss", "attention", "decode", "prefill")
        ),
        "compile btlm-3b-8k --topology v5e:2x2 --json DIR",
        "coord-check TAKEN",
        "transfer TAKEN",
    ],
)
def test_outputs_are_checked_before_long_work(command, tmp_path, monkeypatch, capsys):
    def too_late(*args, **options):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(measure, "matmul_rate", too_late)
    monkeypatch.setattr(BTLM, "init", too_late)
    monkeypatch.setattr(topologies, "prepare_compiler", too_late)
    monkeypatch.setattr(corpus, "read_corpus", too_late)
    for name in ("coord_check.json", "transfer.png"):
        (tmp_path / "taken" / name).mkdir(parents=True)
    command = command.replace("DIR", str(tmp_path)).replace("TAKEN", str(tmp_path / "taken"))
    assert cli.main(command.split()) == 2
    assert "is a directory: choose another name" in capsys.readouterr().err


def test_json_has_null_for_numbers_that_are_not_finite(tmp_path):
    found = {"a": [math.nan, 1.5, (math.inf, 2)], "b": {"c": -math.inf, "d": True}, "e": "NaN"}
    write_json(None, found)
    write_json(tmp_path / "new" / "a.json", found)

    def refused(name: str):
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "new" / "a.json").read_text()
    assert json.loads(text, parse_constant=refused) == {
        "a": [None, 1.5, [None, 2]], "b": {"c": None, "d": True}, "e": "NaN"
    }  # fmt: skip


def test_a_mesh_is_described_by_overrides():
    assert mesh_from_overrides([]) is None and mesh_from_overrides(["mesh.data=1"]) is None
    mesh = mesh_from_overrides(["mesh.data=2", "mesh.tensor=2"])
    assert mesh.shape == {"data": 2, "fsdp": 1, "context": 1, "tensor": 2}
    assert mesh_from_overrides(["mesh.fsdp=-1"]).shape["fsdp"] == 8


@pytest.mark.parametrize(
    "override, message",
    [
        ("mesh.date=2", r"found 'mesh.date=2'.*did you mean mesh.data\?"),
        ("mesh.context=2", "expected KEY=N with KEY one of mesh.data, mesh.fsdp, mesh.tensor"),
        ("data=2", "found 'data=2'"),
        ("mesh.data", "found 'mesh.data'"),
        ("mesh.data=two", "--set mesh.data: found 'two', expected an integer"),
        ("mesh.data=16", "16 devices"),
    ],
)
def test_a_bad_mesh_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        mesh_from_overrides([override])


def test_old_mesh_options_work_with_a_note(capsys):
    argv = ["generate", "c", "--mesh.data", "4", "--prompt", "x", "--mesh.tensor=2"]
    assert translate_old_mesh_options(argv) == [
        "generate", "c", "--set", "mesh.data=4", "--prompt", "x", "--set", "mesh.tensor=2"
    ]  # fmt: skip
    notes = capsys.readouterr().err
    assert "note: write --set mesh.data=4 for --mesh.data" in notes and "mesh.tensor=2" in notes
