"""What is built from a recipe: configuration, microbatches, schedule and optimizer."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from btlm_jax import BTLM, AlibiScaling, BTLMConfig, make_mesh
from btlm_jax.model import weights
from btlm_jax.model.params import flatten_tree
from btlm_jax.train import recipe_build
from btlm_jax.train.recipe import ModelSettings, OptimizerSettings, Phase, Recipe
from btlm_jax.train.recipe_build import (
    build_config,
    build_model,
    build_optimizer,
    build_param_groups,
    build_schedule,
    with_microbatches,
)
from btlm_jax.train.recipe_file import load_recipe

B3 = load_recipe("btlm-3b-8k")


def test_the_published_run_trains_the_published_model():
    assert build_config(B3) == BTLMConfig.preset("btlm-3b-8k")


def test_the_published_schedule_is_linear_to_both_sides_of_its_peak():
    """Linear from 0 to 0.012 in 95 steps, then linear to 1.02e-4 at the last: against float64."""
    steps = np.array([0, 1, 50, 94, 95, 96, 1000, 119_726, 119_727, 150_000, 159_635])
    got = jax.jit(jax.vmap(build_schedule(B3)))(steps)
    warm = 0.012 * steps / 95
    decay = 0.012 + (1.02e-4 - 0.012) * (steps - 95) / (159_635 - 95)
    # fp32 counts tokens to 1 in 16 million, where a step is 1 in 160,000.
    np.testing.assert_allclose(got, np.where(steps < 95, warm, decay), rtol=1e-3, atol=1e-9)
    assert float(got[4]) == pytest.approx(0.012, rel=1e-6)
    assert float(got[-1]) == pytest.approx(1.02e-4, rel=1e-5)


@pytest.mark.parametrize("schedule, middle", [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_schedules_follow_tokens_across_a_batch_ramp(schedule, middle):
    r = Recipe(
        model=ModelSettings(preset="tiny"),
        phases=(Phase(11, 2, 8), Phase(10, 4, 8)),  # a batch ramp: tokens count, not steps
        optimizer=OptimizerSettings(peak_lr=1.0, final_lr=0.0, schedule=schedule),
    )
    tokens = np.concatenate([np.arange(11) * 16, 176 + np.arange(10) * 32])
    rates = np.array([float(build_schedule(r)(s)) for s in range(21)])
    done = tokens / tokens[-1]
    expected = {
        "linear": 1 - done,
        "cosine": 0.5 * (1 + np.cos(np.pi * done)),
        "constant": np.ones(21),
    }[schedule]
    np.testing.assert_allclose(rates, expected, atol=1e-6)
    assert np.interp(0.5, done, rates) == pytest.approx(middle, abs=0.05)


def test_the_ladder_trains_on_20_tokens_per_parameter():
    for name in ("btlm-40m", "btlm-130m", "btlm-450m", "btlm-1.7b"):
        r = load_recipe(name)
        assert r.tokens / weights.count_parameters(build_config(r)) == pytest.approx(
            20, rel=0.02
        ), name
        assert r.optimizer.peak_lr == B3.optimizer.peak_lr  # the purpose of muP


def test_position_interpolation_scales_the_slopes_of_the_checkpoint(monkeypatch):
    base = BTLMConfig.preset("btlm-3b-8k")
    monkeypatch.setattr(recipe_build.auto, "read_any_config", {"btlm-3b": base}.get)
    config = build_config(load_recipe("position-interpolation"))
    assert config.alibi_scaling == AlibiScaling(factor=4.0) and config.n_positions == 32768
    assert dataclasses.replace(config, alibi_scaling=None, n_positions=8192) == base


def test_the_model_computes_as_the_run_settings_say():
    r = load_recipe("tiny")
    assert build_model(r) == BTLM(build_config(r))  # "auto" lets the model choose
    overrides = ["run.attention=xla", "run.remat=full", "run.compute_dtype=bfloat16",
             "model.fields.n_layer=2"]  # fmt: skip
    model = build_model(load_recipe("tiny", overrides))
    assert (model.attention_implementation, model.remat) == ("xla", "full")
    assert (model.compute_dtype, model.config.n_layer) == ("bfloat16", 2)


@pytest.mark.parametrize(
    "limit, mesh, micro",
    [
        (0, dict(fsdp=8), 48),  # no limit
        (100, dict(fsdp=8), 24),  # 3 sequences of 32 on each of 8 devices
        (64, dict(data=2, fsdp=4), 16),
        (100, dict(fsdp=4, tensor=2), 12),
        (64, dict(fsdp=4, context=2), 16),  # each holds half of 4 sequences
        (16, dict(fsdp=4, context=2), 4),
    ],
)
def test_the_microbatch_is_the_largest_that_limit_and_mesh_allow(limit, mesh, micro):
    """A divisor of 48 sequences."""
    phases = ["phases.0.batch_size=48", "phases.0.length=32"]
    r = load_recipe("tiny", [*phases, f"run.tokens_per_device={limit}"])
    mesh = make_mesh(**mesh)
    assert with_microbatches(r, mesh).phases == (
        dataclasses.replace(r.phases[0], microbatch=micro),
    )
    named = load_recipe("tiny", [*phases, "phases.0.microbatch=8", "run.tokens_per_device=1"])
    assert with_microbatches(named, mesh) == named  # a named microbatch is not changed


def test_a_limit_below_one_sequence_is_refused():
    r = load_recipe("tiny", ["phases.0.length=32", "run.tokens_per_device=15"])
    message = r"run\.tokens_per_device: found 15, a sequence of phases\.0 has 16 on each device"
    with pytest.raises(ValueError, match=message):
        with_microbatches(r, make_mesh(fsdp=4, context=2))


def updates(*overrides):
    """Returns the update of the third step of a recipe's optimizer, by path of the weight."""
    small = ["model.fields.n_layer=1", "model.fields.n_embd=32", "model.fields.n_head=2"]
    small += [f"optimizer.{name}=0" for name in ("weight_decay", "clip_norm", "warmup_tokens")]
    r = load_recipe("tiny", [*small, *overrides])
    model = BTLM(build_config(r))
    params = model.init(jax.random.key(0))
    tx = build_optimizer(r, model.config)
    state = tx.init(params)
    for sign in (1.0, 1.0, -0.5):  # shows a wrong b2 even in Lion, which takes the sign
        change, state = tx.update(jax.tree.map(lambda p, s=sign: s * p, params), state, params)
    return {k: np.asarray(v) for k, v in flatten_tree(change).items()}


def test_each_optimizer_has_its_own_default_betas():
    for name, b2, wrong in (("adamw", 0.95, 0.99), ("lion", 0.99, 0.95)):
        default = updates(f"optimizer.name={name}")
        explicit = updates(f"optimizer.name={name}", "optimizer.b1=0.9", f"optimizer.b2={b2}")
        other = updates(f"optimizer.name={name}", f"optimizer.b2={wrong}")
        assert all(np.array_equal(default[k], explicit[k]) for k in explicit)
        assert not all(np.array_equal(default[k], other[k]) for k in explicit)


def test_muon_has_its_own_rate_and_scale():
    kernel, embedding = ("blocks", "attn", "c_attn", "kernel"), ("wte",)
    base = updates("optimizer.name=muon")
    twice = updates("optimizer.name=muon", "optimizer.muon_lr=12e-3")  # 2 * peak_lr
    np.testing.assert_allclose(twice[kernel], 2 * base[kernel], rtol=1e-6)
    np.testing.assert_array_equal(twice[embedding], base[embedding])
    rms = updates("optimizer.name=muon", "optimizer.muon_rms=0.2")
    # 0.2 * peak_lr / sqrt(m), less the decay of the schedule in three steps.
    expected = 0.2 * 6e-3 / np.sqrt(4)  # m = 4: tiny is four times as wide as its base
    assert np.sqrt(np.mean(rms[kernel] ** 2)) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(
    "overrides, hidden_lr",
    [
        ((), 6e-3 / 4),  # m = 4
        (("optimizer.name=lion",), 6e-3 / 4),
        (("optimizer.name=muon",), 6e-3),
        (("optimizer.name=muon", "optimizer.muon_lr=12e-3"), 12e-3),
        (("optimizer.name=muon", "optimizer.muon_rms=0.2"), 6e-3 / np.sqrt(4)),
    ],
)
def test_param_groups_have_the_rates_of_the_optimizer(overrides, hidden_lr):
    r = load_recipe("tiny", overrides)
    hidden, embedding, vector = build_param_groups(r, build_config(r))
    assert hidden.lr == pytest.approx(hidden_lr)
    assert embedding.lr == vector.lr == 6e-3


def test_a_missing_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^model\.checkpoint: no directory .*btlm-3b"):
        build_config(load_recipe("finetune"))


def test_unknown_and_invalid_model_fields_are_refused():
    with pytest.raises(ValueError, match=r"model\.fields\.n_layers: unknown field; did you mean"):
        build_config(load_recipe("tiny", ["model.fields.n_layers=2"]))
    with pytest.raises(ValueError, match="n_head"):
        build_config(load_recipe("tiny", ["model.fields.n_head=7"]))


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_completep_needs_a_decay_that_fits(name):
    """It is set in the model's fields, where the optimizer reads it."""
    overrides = ["model.fields.completep_base_layers=1", f"optimizer.name={name}"]
    r = load_recipe("tiny", overrides)
    config = build_config(r)
    assert config.residual_scale == 0.25
    with pytest.raises(ValueError, match=r'^optimizer\.decay: found "original" with CompleteP,'):
        build_optimizer(r, config)
    build_optimizer(load_recipe("tiny", [*overrides, "optimizer.decay=coupled"]), config)
    with pytest.raises(ValueError, match=r"completep_alpha: found 0\.5, expected 1\.0 without"):
        build_config(load_recipe("tiny", ["model.fields.completep_alpha=0.5"]))
