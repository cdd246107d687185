"""What subcommands share: outputs that are tried before the work, and JSON that is JSON."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from btlm_jax import BTLM, cli
from btlm_jax.cli.arguments import check_output, write_json
from btlm_jax.mup_study import corpus
from btlm_jax.train.aot import topologies
from btlm_jax.train.bench import measure


def test_an_output_is_checked_and_nothing_is_made(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    for good in (None, file, tmp_path / "a.json", tmp_path / "deep" / "er" / "a.json"):
        check_output(good)
    check_output(tmp_path / "a.PNG", ".png")
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(ValueError, match=r"a\.pdf: found the suffix '\.pdf', expected '\.png'"):
        check_output(tmp_path / "a.pdf", ".png")
    with pytest.raises(FileExistsError, match="is a directory: choose another name"):
        check_output(tmp_path)
    with pytest.raises(FileExistsError, match="file is a file, expected a folder"):
        check_output(file / "deep" / "a.json")
    monkeypatch.chdir(tmp_path)
    check_output(Path("a.json"))
    asked = []
    # Root may write anywhere.
    monkeypatch.setattr(os, "access", lambda place, _: bool(asked.append(place)))
    with pytest.raises(PermissionError, match="may not be written to"):
        check_output(tmp_path / "deep" / "a.json")
    assert asked == [tmp_path]


@pytest.mark.parametrize(
    "command",
    [
        *(
            f"bench {what} --json DIR"
            for what in ("train", "loss", "attention", "decode", "prefill")
        ),
        "compile btlm-3b-8k --topology v5e:2x2 --json DIR",
        "compile btlm-3b-8k --table DIR",
        "coord-check TAKEN",
        "transfer TAKEN",
    ],
)
def test_long_work_tries_its_outputs_first(command, tmp_path, monkeypatch, capsys):
    def too_late(*args, **options):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(measure, "matmul_rate", too_late)
    monkeypatch.setattr(BTLM, "init", too_late)
    monkeypatch.setattr(topologies, "prepare", too_late)
    monkeypatch.setattr(corpus, "read", too_late)
    for name in ("coord_check.json", "transfer.png"):
        (tmp_path / "taken" / name).mkdir(parents=True)
    command = command.replace("DIR", str(tmp_path)).replace("TAKEN", str(tmp_path / "taken"))
    assert cli.main(command.split()) == 2
    assert "is a directory: choose another name" in capsys.readouterr().err


def test_json_has_null_for_what_is_not_finite(tmp_path):
    found = {"a": [math.nan, 1.5, (math.inf, 2)], "b": {"c": -math.inf, "d": True}, "e": "NaN"}
    write_json(None, found)
    write_json(tmp_path / "new" / "a.json", found)

    def refused(name: str):
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "new" / "a.json").read_text()
    assert json.loads(text, parse_constant=refused) == {
        "a": [None, 1.5, [None, 2]], "b": {"c": None, "d": True}, "e": "NaN"
    }  # fmt: skip
