"""Recipe files: TOML, overrides, and errors that name the nearest valid key."""

from __future__ import annotations

import json

import pytest

from btlm_jax.train.recipe_build import build_config
from btlm_jax.train.recipe_file import load_recipe, parse_recipe, recipe_names, recipe_to_dict


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_of_the_package_survive_a_round_trip(name):
    r = load_recipe(name)
    assert parse_recipe(json.loads(json.dumps(recipe_to_dict(r)))) == r
    if r.model.checkpoint is None:
        build_config(r)


def test_overrides_replace_single_values():
    r = load_recipe(
        "tiny",
        ["run.seed=3", "model.fields.n_layer=2", "phases.0.steps=50", "data.train=some/dir",
         "optimizer.name=lion", "optimizer.peak_lr=1", "phases.0.microbatch=4"],
    )  # fmt: skip
    assert (r.run.seed, build_config(r).n_layer, r.steps) == (3, 2, 50)
    assert (r.data.train, r.optimizer.name, r.optimizer.peak_lr) == ("some/dir", "lion", 1.0)
    assert r.phases[0].microbatch == 4


@pytest.mark.parametrize(
    "override, message",
    [
        ("optimizer.peek_lr=1", r"optimizer\.peek_lr: unknown key; did you mean peak_lr\?"),
        ("optimiser.peak_lr=1", r"optimiser: unknown key; did you mean optimizer\?"),
        ("phases.0.steps=many", r"phases\.0\.steps: found 'many', expected int"),
        ("phases.3.steps=1", "there are phases 0 to 0"),
        ("run.seed=true", r"run\.seed: found True, expected int"),
        ("run.seed=1.5", r"run\.seed: found 1\.5, expected int"),
        ("optimizer.name=sgd", "found 'sgd', expected one of adamw, lion, muon"),
        ("data.weights=3", r"data\.weights: found 3, expected Mapping"),
        ("nonsense", r"expected section\.key=value"),
        ("run.seed.x=1", r"run\.seed: found \{'x': 1\}, expected int"),
        ("phases=1", r"phases: found 1, expected a list of tables"),
    ],
)
def test_invalid_overrides_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("tiny", [override])


def test_files_that_are_not_recipes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected one of btlm-1\.7b, .*tiny"):
        load_recipe("huge")
    (tmp_path / "r.toml").write_text("model = [")
    with pytest.raises(ValueError, match=r"r\.toml: not valid TOML"):
        load_recipe(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text("[model]\npreset = 'tiny'\n")
    with pytest.raises(ValueError, match="phases: missing"):
        load_recipe(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text("[model]\npreset = 'tiny'\n[phases]\nsteps = 1\n")
    with pytest.raises(ValueError, match=r"phases: found .*, expected a list of tables"):
        load_recipe(tmp_path / "r.toml")
