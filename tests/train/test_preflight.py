"""Runs that could not work are refused before the first step, and before anything is written."""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import pytest

from btlm_jax.train.loop import train
from btlm_jax.train.preflight import unused_settings
from btlm_jax.train.recipe_file import load_recipe
from support.runs import copy_run


@pytest.mark.parametrize(
    "overrides, error, message",
    [
        (["data.train=nowhere"], FileNotFoundError, "nowhere"),
        (["data.train="], ValueError, "btlm tokenize"),
        (["phases.0.batch_size=6"], ValueError, "found 6, expected a multiple of 8"),
        (["mesh.fsdp=3"], ValueError, "found 8"),
        (["model.fields.vocab_size=50"], ValueError, "61 tokens, the model has 50"),
        (["phases.0.length=9", "mesh.context=2", "mesh.fsdp=4"], ValueError,
         r"phases\.0\.length: found 9, expected a multiple of 4, twice mesh\.context"),
        (["run.wandb_project=x"], ValueError, "pip install wandb"),
        (["phases.0.length=4096", "phases.1.length=4096"], ValueError,
         "3000 tokens, expected at least 4097"),
        (["phases.0.length=512", "phases.1.length=512"], ValueError,
         r"data\.held_out: 1000 tokens are fewer than one"),
        (["model.fields.completep_base_layers=1"], ValueError,
         "^optimizer.decay: .*expected .c"),
        (["model.fields.resid_pdrop=0.1"], ValueError,
         r"found 0\.1, .*--set model\.fields\.resid_pdrop=0\.0"),
        (["run.sample_every=3", "run.prompt="], ValueError, r"run\.prompt: .*found no"),
        (["run.sample_every=3", "run.prompt=R", "model.fields.vocab_size=50"], ValueError,
         r"run\.prompt: found token 50, .*vocab_size 50"),
        (["run.sample_every=3", "model.fields.position_embedding_type=learned",
          "model.fields.n_positions=32"],
         ValueError, r"run\.prompt: found \d+ tokens, expected at most 0"),
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


def test_what_fails_while_the_run_is_prepared_leaves_no_directory(load_tiny, tmp_path, monkeypatch):
    """Loading the weights of model.checkpoint, a full disk, the steps to profile."""
    with pytest.raises(ValueError, match=r"profile: found 5:4"):
        train(load_tiny(), tmp_path / "run", (5, 4))
    assert list(tmp_path.iterdir()) == []


def test_more_than_the_memory_of_a_device_is_refused(load_tiny, tmp_path, monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 10_000})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(ValueError, match=r"of each device, which has 9\.8 KiB: .*mesh\.fsdp"):
        train(load_tiny(), tmp_path / "run")


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["data.held_out="], "run.eval_every does nothing without data.held_out"),
        (["run.prompt=Once"], "run.prompt does nothing without run.sample_every"),
        (["run.keep_every=5"], "only checkpoints at multiples of 15 are kept"),
        (["run.keep_every=5", "run.checkpoint_every=0"], "run.keep_every does nothing"),
        (["model.init_truncation=2.0", "model.preset=", "model.checkpoint=x"],
         "model.init_truncation does nothing with model.checkpoint"),
        (["optimizer.name=lion", "optimizer.eps=1e-6"], "optimizer.eps does nothing"),
        (["run.tokens_per_device=64", "phases.0.microbatch=8"],
         "run.tokens_per_device does nothing where every phase has a microbatch"),
        ([], None),
    ],
)  # fmt: skip
def test_settings_without_effect_are_named(load_tiny, overrides, sentence):
    settings = [o for o in overrides if o != "model.preset="]
    recipe = load_tiny(*(o for o in settings if not o.startswith("model.checkpoint")))
    if settings != overrides:
        model = dataclasses.replace(recipe.model, preset=None, checkpoint="x")
        recipe = dataclasses.replace(recipe, model=model)
    found = list(unused_settings(recipe))
    assert found == [] if sentence is None else any(sentence in f for f in found), found
