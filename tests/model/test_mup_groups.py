"""The groups of muP: multipliers, learning rates and decays, against the original."""

from __future__ import annotations

import dataclasses
import json

import pytest

from btlm_jax import BTLMConfig
from btlm_jax.model import mup, weights
from btlm_jax.model.params import flatten_tree
from support.optimizer_steps import (
    MAKES,
    SMALL,
)

B3 = BTLMConfig.preset("btlm-3b-8k")


def test_released_model_has_160_scaled_layer_weights():
    scales = flatten_tree(mup.multipliers(B3))
    per_layer = [scales[leaf.weight.path] for leaf in weights.disk_leaves(B3)]
    assert per_layer.count(0.1) == 160
    assert per_layer.count(1.0) == len(per_layer) - 160


@pytest.mark.parametrize(
    "optimizer, expected", [("adam", 0.1), ("lion", 0.1), ("muon", 1.0), ("muon_rms", 0.1**0.5)]
)
def test_multipliers_by_optimizer(optimizer, expected):
    """Matrices get 1/m, 1 or 1/sqrt(m), as the coordinate checks require; the rest is Adam's."""
    scales = flatten_tree(mup.multipliers(SMALL, optimizer))
    for w in weights.weight_table(SMALL):
        target = 1.0 if w.role != "hidden" else expected if w.stacked else 0.1
        assert scales[w.path] == target, w.name


@pytest.mark.parametrize(
    "decay, variant", [("original", "decoupled_wd_true"), ("coupled", "decoupled_wd_false")]
)
def test_groups_are_those_of_the_original(case, decay, variant):
    """Names, learning rates and decays equal those that `get_mup_param_groups` printed."""
    golden = json.loads(str(case["groups_json"]))
    groups = mup.param_groups(case.config, golden["lr"], golden["weight_decay"], decay)
    assert len(groups) == len(golden[variant]) == 3
    for ours, theirs in zip(groups, golden[variant], strict=True):
        assert sorted(ours.params) == sorted(theirs["params"])
        assert ours.lr == pytest.approx(theirs["lr"], rel=1e-12)
        assert ours.weight_decay == pytest.approx(theirs["weight_decay"], rel=1e-12)
    assert sum(g.count for g in groups) == weights.count_parameters(case.config)


def test_groups_are_formatted_as_a_table():
    original = mup.format_groups(mup.param_groups(B3, 0.012, 0.1)).splitlines()
    assert original == [
        "group      arrays     parameters          lr  weight decay   per step",
        "hidden        160  2,516,418,560      0.0012           0.1    0.00012",
        "embedding       1    128,657,920       0.012           0.1     0.0012",
        "vector        290      1,179,264       0.012             0          0",
    ]
    coupled = mup.format_groups(mup.param_groups(B3, 0.012, 0.1, "coupled")).splitlines()
    assert coupled[1].split() == ["hidden", "160", "2,516,418,560", "0.0012", "1", "0.0012"]


def test_muon_groups_leave_the_head_to_adam():
    """Matrices keep their learning rate at every width; an untied head has Adam's."""
    groups = mup.param_groups(SMALL, 0.01, 0.1, optimizer="muon")
    rates = {name: g.lr for g in groups for name in g.params}
    assert rates["transformer.h.1.mlp.c_fc.weight"] == 0.01
    assert rates["lm_head.weight"] == pytest.approx(0.001)


def test_invalid_arguments_are_refused():
    names = r"decay: found 'decoupled', expected one of \('original', 'coupled', 'independent'\)"
    for make in MAKES:
        with pytest.raises(ValueError, match=names):
            make(1e-2, SMALL, decay="decoupled")
    with pytest.raises(ValueError, match=names):
        mup.param_groups(SMALL, 1e-2, 0.1, "decoupled")
    with pytest.raises(
        ValueError, match=r"optimizer: found 'sgd', expected one of \('adam', 'lion'"
    ):
        mup.scale_by_mup(SMALL, "sgd")
    deep = dataclasses.replace(SMALL, completep_base_layers=2)
    for make in MAKES:
        with pytest.raises(ValueError, match='"original" with CompleteP, expected "coupled", its'):
            make(1e-2, deep)


def test_completep_at_alpha_one_keeps_the_learning_rates():
    deep = dataclasses.replace(B3, completep_base_layers=2)
    assert mup.multipliers(deep) == mup.multipliers(B3)
    groups = mup.param_groups(deep, 0.012, 0.1, "coupled")
    assert groups == mup.param_groups(B3, 0.012, 0.1, "coupled")
