"""Files that a checkpoint carries: every use warns about those that are not as recorded."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import btlm_jax as btlm
from btlm_jax import cli
from btlm_jax.checkpoint import assets, metadata
from btlm_jax.convert import auto


@pytest.fixture(scope="module")
def original(of_bytes, tmp_path_factory):
    """A checkpoint that records all kinds of files."""
    model, params, tokenizer = of_bytes
    home = tmp_path_factory.mktemp("assets")
    tokenizer.save(str(home / "tokenizer.json"))
    (home / "tokenizer_config.json").write_text("{}")
    (home / "generation_config.json").write_text("{}")
    (home / "modeling_btlm.py").write_text("")
    btlm.save(home / "c", model.config, params, assets=list(home.iterdir()))
    return home / "c"


@pytest.fixture
def notices(monkeypatch):
    """The warnings about carried files, also repeated ones."""
    given: list[str] = []
    monkeypatch.setattr(assets, "warn_once", given.append)
    return given


def _fails(*argv):
    """Runs a command that reads the checkpoint and then finds something else to refuse."""
    assert cli.main([*map(str, argv)]) != 0


def _pipeline_of_integers(checkpoint):
    with pytest.raises(ValueError, match="dtype"):
        btlm.pipeline(checkpoint, dtype="int8")


USES = {
    "load": lambda c: btlm.load(c),
    "load unstacked": lambda c: btlm.load(c, unstacked=True),
    "pipeline": _pipeline_of_integers,
    "training from it": auto.read_any_tokenizer,
    "generate": lambda c: _fails("generate", c, "--prompt", ""),
    "perplexity": lambda c: _fails("eval", "perplexity", c, "--text", "missing.txt"),
    "by position": lambda c: _fails("eval", "loss-by-position", c, "--text", "missing.txt"),
    "retrieval": lambda c: _fails("eval", "retrieval", c, "--lengths", "1"),
    "tokenize": lambda c: _fails("tokenize", "missing.txt", "--target", c / "t", "--tokenizer", c),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_every_use_warns_about_a_tokenizer_that_is_not_as_recorded(
    use, original, notices, tmp_path
):
    USES[use](original)
    assert not notices
    changed = shutil.copytree(original, tmp_path / "c")
    with (changed / "tokenizer/tokenizer.json").open("a") as file:
        file.write("\n")
    (changed / "tokenizer/tokenizer_config.json").unlink()
    (changed / "tokenizer/modeling_btlm.py").write_text("# never run")
    USES[use](changed)
    assert len(notices) == len({*notices}) == 2
    changes = " ".join(notices)
    assert "c: tokenizer/tokenizer.json has changed since the checkpoint was made" in changes
    assert "c: tokenizer/tokenizer_config.json is missing since" in changes
    assert "other tokens than those that the model was trained on" in changes


def test_changed_generation_defaults_are_warned_about_when_they_are_read(
    original, notices, tmp_path
):
    changed = shutil.copytree(original, tmp_path / "c")
    (changed / "tokenizer/generation_config.json").write_text('{"eos_token_id": 7}')
    btlm.load(changed)
    assert len(notices) == 1 and "generation_config.json has changed" in notices[0]
    assert "the defaults of generation" in notices[0]


def test_info_names_what_is_not_as_recorded(original, capsys, tmp_path):
    assert cli.main(["info", str(original)]) == 0
    assert "not as recorded" not in capsys.readouterr().out
    changed = shutil.copytree(original, tmp_path / "c")
    (changed / "tokenizer/tokenizer.json").unlink()
    (changed / "tokenizer/modeling_btlm.py").write_text("# changed")
    assert cli.main(["info", str(changed)]) == 0
    said = capsys.readouterr().out
    assert "not as recorded" in said
    assert "modeling_btlm.py (changed), tokenizer.json (missing)" in said


def test_a_checkpoint_without_a_record_or_files_is_no_reason_to_warn(of_bytes, notices, tmp_path):
    model, params, _ = of_bytes
    btlm.save(tmp_path / "c", model.config, params)
    btlm.load(tmp_path / "c")
    assert not notices and assets.changed_assets(metadata.read_metadata(tmp_path / "c")) == {}


def test_a_tokenizer_with_tokens_beyond_the_embedding_is_warned_about(of_bytes, caplog, tmp_path):
    model, params, tokenizer = of_bytes
    larger = type(tokenizer).from_str(tokenizer.to_str())
    larger.add_special_tokens([f"[PAD{i}]" for i in range(4)])
    larger.save(str(tmp_path / "tokenizer.json"))
    btlm.save(tmp_path / "c", model.config, params, assets=[tmp_path / "tokenizer.json"])
    assets.load_checkpoint_tokenizer(metadata.read_metadata(tmp_path / "c"))
    said = [r.getMessage() for r in caplog.records if "no embedding" in r.getMessage()]
    assert len(said) == 1 and "[PAD" in said[0]
    assert np.asarray(params["wte"]).shape[0] == 258
