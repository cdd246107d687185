"""A recipe of 12 steps in two phases, and an uninterrupted run of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from btlm_jax.train import recipe_file
from btlm_jax.train.loop import train
from btlm_jax.train.recipe import Recipe
from support.runs import TINY_MODEL, predictable_tokens, write_recipe

RECIPE = (
    TINY_MODEL
    + """
[[phases]]
steps = 8
batch_size = 8
length = 8
[[phases]]
steps = 4
batch_size = 16
length = 16
microbatch = 8
[optimizer]
peak_lr = 1e-2
final_lr = 1e-3
warmup_tokens = 128
[data]
train = "{train}"
held_out = "{held}"
[run]
log_every = 1
checkpoint_every = 3
keep_last = 2
eval_every = 6
"""
)


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory):
    """The file of the recipe."""
    return write_recipe(tmp_path_factory.mktemp("data"), RECIPE, predictable_tokens(4000), 3000)


@pytest.fixture(scope="session")
def load_tiny(tiny_recipe) -> Callable[..., Recipe]:
    """Loads the recipe with overrides."""
    return lambda *overrides: recipe_file.load_recipe(tiny_recipe, overrides)


@pytest.fixture(scope="session")
def reference(load_tiny, tmp_path_factory):
    """An uninterrupted run on a mesh of 8 devices, not to be changed: (directory, result)."""
    run = tmp_path_factory.mktemp("reference") / "run"
    return run, train(load_tiny(), run)
