"""Recipes: the published run as published, and every invalid value refused."""

from __future__ import annotations

import pytest

from btlm_jax.train.recipe import Phase
from btlm_jax.train.recipe_file import load_recipe

B3 = load_recipe("btlm-3b-8k")


def test_the_published_run_has_its_published_phases_and_optimizer():
    assert B3.steps == 159_636
    assert {p.tokens_per_step for p in B3.phases} == {3_932_160}
    assert B3.tokens == pytest.approx(627.7e9, rel=1e-4)
    assert B3.phase_at(119_726).length == 2048
    assert B3.phase_at(119_727) == Phase(39_909, 480, 8192)
    with pytest.raises(ValueError, match="step: found 159636, the recipe has 159636 steps"):
        B3.phase_at(159_636)
    o = B3.optimizer
    assert (o.name, o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm) == (
        "adamw", 0.9, 0.95, 1e-8, 0.1, 1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.preset=btlm-3b", "did you mean btlm-3b-8k"),
        ("phases.0.steps=0", r"phases\.0\.steps: found 0, expected a positive int"),
        ("phases.0.microbatch=3", r"found 3, expected a divisor of batch_size = 8"),
        ("optimizer.z_loss=-1e-4", r"optimizer\.z_loss: found -0\.0001, expected a number >= 0"),
        ("optimizer.b2=1.0", r"optimizer\.b2: found 1\.0"),
        ("optimizer.muon_lr=0.02", r"optimizer\.muon_lr: found 0\.02, .* with name = 'muon' only"),
        ("model.init_truncation=0", r"model\.init_truncation: found 0\.0"),
        ("optimizer.peak_lr=-1", r"optimizer\.peak_lr: found -1\.0"),
        ("optimizer.warmup_tokens=1000000000", r"the run has 819200 tokens"),
        ("model.checkpoint=x", "found preset and checkpoint, expected exactly one"),
        ("run.log_every=0", r"run\.log_every"),
        ("run.seed=-1", r"run\.seed: found -1, expected an int from 0 to 2\*\*32 - 1"),
        ("run.seed=4294967296", r"run\.seed: found 4294967296"),
        ("run.checkpoint_every=-1", r"run\.checkpoint_every"),
        ("phases.0.length=-4", r"phases\.0\.length: found -4, expected a positive int"),
        ("phases.0.batch_size=0", r"phases\.0\.batch_size: found 0, expected a positive int"),
        ("phases=[]", "phases: found none"),
    ],
)
def test_invalid_values_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("tiny", [override])


def test_all_problems_are_listed_at_once():
    with pytest.raises(ValueError, match=r"(?s)optimizer\.peak_lr.*run\.log_every"):
        load_recipe("tiny", ["run.log_every=0", "optimizer.peak_lr=-1"])
