"""Runs that could not work are refused before the first step, and before anything is written."""

from __future__ import annotations

import json

import pytest

from btlm_jax.train.loop import train
from btlm_jax.train.recipe_file import load_recipe
from support.runs import copy_run


@pytest.mark.parametrize(
    "overrides, error, message",
    [
        (["data.train=nowhere"], FileNotFoundError, "nowhere"),
        (["data.train="], ValueError, "btlm tokenize"),
        (["phases.0.batch_size=6"], ValueError, "found 6, expected a multiple of 8"),
        (["mesh.fsdp=3"], ValueError, "found 8"),
        (["model.fields.vocab_size=50"], ValueError, "61 tokens, the model 50"),
        (["phases.0.length=9", "mesh.context=2", "mesh.fsdp=4"], ValueError,
         r"phases\.0\.length: found 9, expected a multiple of 4, twice mesh\.context"),
        (["run.wandb_project=x"], ValueError, "pip install wandb"),
        (["phases.0.length=4096", "phases.1.length=4096"], ValueError,
         "3000 tokens, expected at least 4097"),
        (["phases.0.length=512", "phases.1.length=512"], ValueError,
         r"data\.held_out: 1000 tokens are fewer than one"),
        (["model.fields.completep_base_layers=1"], ValueError,
         "^optimizer.decay: .*expected .c"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(load_tiny, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        train(load_tiny(*overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tokens_of_another_tokenizer_are_refused(tiny_recipe, reference, tmp_path):
    """Even one with the same tokens in another order, which the loss would not show at once."""
    run = copy_run(reference[0], tmp_path / "run")
    path = run / "tokenizer/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["0"], vocab["1"] = vocab["1"], vocab["0"]
    path.write_text(json.dumps(tokenizer))
    file = tmp_path / "other.toml"
    text = tiny_recipe.read_text()
    file.write_text(f'[model]\ncheckpoint = "{run}"\n{text[text.index("[[phases]]") :]}')
    with pytest.raises(ValueError, match=r"another tokenizer than that of .*--tokenizer .*run"):
        train(load_recipe(file), tmp_path / "next")
