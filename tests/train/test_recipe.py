"""Recipes: the published run as published, and every way to get one wrong."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from btlm_jax import BTLM, AlibiScaling, BTLMConfig, make_mesh
from btlm_jax.model import weights
from btlm_jax.model.params import flatten_tree
from btlm_jax.train import recipe, recipe_file
from btlm_jax.train.recipe import ModelSettings, OptimizerSettings, Phase, Recipe
from btlm_jax.train.recipe_build import (
    build_config,
    build_model,
    build_optimizer,
    build_param_groups,
    build_schedule,
    with_microbatches,
)

B3 = recipe_file.load_recipe("btlm-3b-8k")


def test_the_published_run():
    assert B3.steps == 159_636
    assert {p.tokens_per_step for p in B3.phases} == {3_932_160}
    assert B3.tokens == pytest.approx(627.7e9, rel=1e-4)
    assert B3.phase_at(119_726)[1].length == 2048
    assert B3.phase_at(119_727) == (119_727, Phase(39_909, 480, 8192))
    assert build_config(B3) == BTLMConfig.preset("btlm-3b-8k")
    o = B3.optimizer
    assert (o.name, o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm) == (
        "adamw", 0.9, 0.95, 1e-8, 0.1, 1.0,
    )  # fmt: skip


def test_the_published_schedule():
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
def test_schedules(schedule, middle):
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


@pytest.mark.parametrize("name", recipe_file.recipe_names())
def test_ours_load_and_come_back(name):
    r = recipe_file.load_recipe(name)
    assert recipe_file.parse_recipe(json.loads(json.dumps(recipe_file.recipe_to_dict(r)))) == r
    if r.model.checkpoint is None:
        build_config(r)


def test_ladder_trains_on_20_tokens_per_parameter():
    for name in ("btlm-40m", "btlm-130m", "btlm-450m", "btlm-1.7b"):
        r = recipe_file.load_recipe(name)
        assert r.tokens / weights.count_parameters(build_config(r)) == pytest.approx(
            20, rel=0.02
        ), name
        assert r.optimizer.peak_lr == B3.optimizer.peak_lr  # that is what muP is for


def test_position_interpolation_scales_the_checkpoints_slopes(monkeypatch):
    base = BTLMConfig.preset("btlm-3b-8k")
    monkeypatch.setattr(recipe.auto, "read_any_config", {"btlm-3b": base}.get)
    config = build_config(recipe_file.load_recipe("position-interpolation"))
    assert config.alibi_scaling == AlibiScaling(factor=4.0) and config.n_positions == 32768
    assert dataclasses.replace(config, alibi_scaling=None, n_positions=8192) == base


def test_the_model_is_computed_as_run_says():
    r = recipe_file.load_recipe("tiny")
    assert build_model(r) == BTLM(build_config(r))  # "auto" leaves it to the model
    asked = ["run.attention=xla", "run.remat=full", "run.compute_dtype=bfloat16",
             "model.fields.n_layer=2"]  # fmt: skip
    model = build_model(recipe_file.load_recipe("tiny", asked))
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
def test_microbatches_for_a_mesh(limit, mesh, micro):
    """The largest divisor of 48 sequences that the limit and the mesh allow."""
    phases = ["phases.0.batch_size=48", "phases.0.length=32"]
    r = recipe_file.load_recipe("tiny", [*phases, f"run.tokens_per_device={limit}"])
    mesh = make_mesh(**mesh)
    assert with_microbatches(r, mesh).phases == (
        dataclasses.replace(r.phases[0], microbatch=micro),
    )
    named = recipe_file.load_recipe(
        "tiny", [*phases, "phases.0.microbatch=8", "run.tokens_per_device=1"]
    )
    assert with_microbatches(named, mesh) == named  # what the recipe says is not changed


def test_no_microbatch_is_small_enough():
    r = recipe_file.load_recipe("tiny", ["phases.0.length=32", "run.tokens_per_device=15"])
    said = r"run\.tokens_per_device: found 15, a sequence of phases\.0 has 16 on each device"
    with pytest.raises(ValueError, match=said):
        with_microbatches(r, make_mesh(fsdp=4, context=2))


def updates(*overrides):
    """The change of each group's weights in the first steps of an optimizer from a recipe."""
    small = ["model.fields.n_layer=1", "model.fields.n_embd=32", "model.fields.n_head=2"]
    r = recipe_file.load_recipe("tiny", [*small, "optimizer.weight_decay=0",
                              "optimizer.clip_norm=0",
                              "optimizer.warmup_tokens=0", *overrides])  # fmt: skip
    model = BTLM(build_config(r))
    params = model.init(jax.random.key(0))
    tx = build_optimizer(r, model.config)
    state = tx.init(params)
    for sign in (1.0, 1.0, -0.5):  # tells b2 = 0.99 from 0.95 in Lion, which takes the sign
        change, state = tx.update(jax.tree.map(lambda p, s=sign: s * p, params), state, params)
    return {k: np.asarray(v) for k, v in flatten_tree(change).items()}


def test_each_optimizer_keeps_its_own_betas():
    for name, b2, wrong in (("adamw", 0.95, 0.99), ("lion", 0.99, 0.95)):
        default = updates(f"optimizer.name={name}")
        said = updates(f"optimizer.name={name}", "optimizer.b1=0.9", f"optimizer.b2={b2}")
        other = updates(f"optimizer.name={name}", f"optimizer.b2={wrong}")
        assert all(np.array_equal(default[k], said[k]) for k in said)
        assert not all(np.array_equal(default[k], other[k]) for k in said)


def test_muon_has_rates_of_its_own():
    kernel, embedding = ("blocks", "attn", "c_attn", "kernel"), ("wte",)
    base = updates("optimizer.name=muon")
    twice = updates("optimizer.name=muon", "optimizer.muon_lr=12e-3")  # 2 * peak_lr
    np.testing.assert_allclose(twice[kernel], 2 * base[kernel], rtol=1e-6)
    np.testing.assert_array_equal(twice[embedding], base[embedding])
    rms = updates("optimizer.name=muon", "optimizer.muon_rms=0.2")
    # 0.2 * peak_lr / sqrt(m), less the part of the schedule that three steps have gone.
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
def test_groups_are_those_of_the_optimizer(overrides, hidden_lr):
    r = recipe_file.load_recipe("tiny", overrides)
    hidden, embedding, vector = build_param_groups(r, build_config(r))
    assert hidden.lr == pytest.approx(hidden_lr)
    assert embedding.lr == vector.lr == 6e-3


def test_overrides():
    r = recipe_file.load_recipe(
        "tiny",
        ["run.seed=3", "model.fields.n_layer=2", "phases.0.steps=50", "data.train=some/dir",
         "optimizer.name=lion", "optimizer.peak_lr=1", "phases.0.microbatch=4"],
    )  # fmt: skip
    assert (r.run.seed, build_config(r).n_layer, r.steps) == (3, 2, 50)
    assert (r.data.train, r.optimizer.name, r.optimizer.peak_lr) == ("some/dir", "lion", 1.0)
    assert r.phases[0].microbatch == 4


@pytest.mark.parametrize(
    "override, said",
    [
        ("optimizer.peek_lr=1", r"optimizer\.peek_lr: unknown key; did you mean peak_lr\?"),
        ("optimizer.peak_lr=1", r"optimizer: unknown key; did you mean optimizer\?"),
        ("model.preset=btlm-3b", "did you mean btlm-3b-8k"),
        ("phases.0.steps=many", r"phases\.0\.steps: found 'many', expected int"),
        ("phases.0.steps=0", r"phases\.0\.steps: found 0, expected a positive int"),
        ("phases.3.steps=1", "there are phases 0 to 0"),
        ("run.seed=true", r"run\.seed: found True, expected int"),
        ("run.seed=1.5", r"run\.seed: found 1\.5, expected int"),
        ("optimizer.name=sgd", "found 'sgd', expected one of adamw, lion, muon"),
        ("phases.0.microbatch=3", r"found 3, expected a divisor of batch_size = 8"),
        ("optimizer.z_loss=-1e-4", r"optimizer\.z_loss: found -0\.0001, expected a number >= 0"),
        ("optimizer.b2=1.0", r"optimizer\.b2: found 1\.0"),
        ("optimizer.muon_lr=0.02", r"optimizer\.muon_lr: found 0\.02, .* with name = 'muon' only"),
        ("model.init_truncation=0", r"model\.init_truncation: found 0\.0"),
        ("optimizer.peak_lr=-1", r"optimizer\.peak_lr: found -1\.0"),
        ("optimizer.warmup_tokens=1000000000", r"the run has 819200 tokens"),
        ("model.checkpoint=x", "found preset and checkpoint, expected exactly one"),
        ("run.log_every=0", r"run\.log_every"),
        ("run.checkpoint_every=-1", r"run\.checkpoint_every"),
        ("data.weights=3", r"data\.weights: found 3, expected Mapping"),
        ("nonsense", r"expected section\.key=value"),
        ("run.seed.x=1", r"run\.seed: found \{'x': 1\}, expected int"),
        ("phases=1", r"phases: found 1, expected a list of tables"),
    ],
)
def test_bad_values(override, said):
    with pytest.raises(ValueError, match=said):
        recipe_file.load_recipe("tiny", [override])


def test_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^model\.checkpoint: no directory .*btlm-3b"):
        build_config(recipe_file.load_recipe("finetune"))


def test_bad_model_fields():
    with pytest.raises(ValueError, match=r"model\.fields\.n_layers: unknown field; did you mean"):
        build_config(recipe_file.load_recipe("tiny", ["model.fields.n_layers=2"]))
    with pytest.raises(ValueError, match="n_head"):
        build_config(recipe_file.load_recipe("tiny", ["model.fields.n_head=7"]))


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_completep(name):
    """Set in the model's fields; the optimizer reads it there, and wants a decay that fits."""
    asked = ["model.fields.completep_base_layers=1", f"optimizer.name={name}"]
    r = recipe_file.load_recipe("tiny", asked)
    config = build_config(r)
    assert config.residual_scale == 0.25
    with pytest.raises(ValueError, match=r'^optimizer\.decay: found "original" with CompleteP,'):
        build_optimizer(r, config)
    build_optimizer(recipe_file.load_recipe("tiny", [*asked, "optimizer.decay=coupled"]), config)
    with pytest.raises(ValueError, match=r"completep_alpha: found 0\.5, expected 1\.0 without"):
        build_config(recipe_file.load_recipe("tiny", ["model.fields.completep_alpha=0.5"]))


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such recipe; ours are btlm-1\.7b, .*tiny"):
        recipe_file.load_recipe("huge")
    (tmp_path / "r.toml").write_text("model = [")
    with pytest.raises(ValueError, match=r"r\.toml: not valid TOML"):
        recipe_file.load_recipe(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text("[model]\npreset = 'tiny'\n")
    with pytest.raises(ValueError, match="phases: missing"):
        recipe_file.load_recipe(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text("[model]\npreset = 'tiny'\n[phases]\nsteps = 1\n")
    with pytest.raises(ValueError, match=r"phases: found .*, expected a list of tables"):
        recipe_file.load_recipe(tmp_path / "r.toml")
