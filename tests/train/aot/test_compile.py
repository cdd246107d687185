"""Steps compiled ahead of time: here for virtual CPU devices, slowly for real TPU topologies."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from btlm_jax import cli
from btlm_jax.model import weights
from btlm_jax.perf import accounting
from btlm_jax.train.aot import compile, compile_report, executables, lowering, topologies
from btlm_jax.train.aot.compile import DoesNotFit, compile_decoding, compile_phase
from btlm_jax.train.recipe_build import build_config, build_model, build_optimizer
from btlm_jax.train.recipe_file import load_recipe
from btlm_jax.train.step import abstract_state, init_state, make_step

TOPOLOGY = topologies.parse_topology("v5e:2x4")  # eight devices, as there are CPUs here
SMALL = ("phases.0.batch_size=16", "phases.0.length=32", "phases.0.microbatch=8")


@pytest.fixture(autouse=True)
def cpus_for_chips(monkeypatch):
    monkeypatch.setattr(compile, "topology_devices", lambda topology: jax.devices())
    monkeypatch.setattr(topologies, "prepare_compiler", lambda: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny recipe's step, compiled and saved; its recipe, report and file."""
    file = tmp_path_factory.mktemp("compiled") / "step"
    recipe = load_recipe("tiny", [*SMALL, "mesh.tensor=2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile, "topology_devices", lambda topology: jax.devices())
        return recipe, compile_phase(recipe, 0, TOPOLOGY, file), file


def state_and_tokens(recipe):
    mesh = lowering.mesh_of(recipe, jax.devices())
    model = build_model(recipe)
    tx = build_optimizer(recipe, model.config)
    state = init_state(model.init(jax.random.key(0), mesh=mesh), tx)
    draw = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 8, 33))
    place = jax.NamedSharding(mesh, jax.P(None, ("data", "fsdp"), None))
    return model, tx, state, jax.device_put(draw.astype(np.int32), place)


def test_abstract_state_is_that_of_a_run():
    recipe = load_recipe("tiny", ["mesh.tensor=2"])
    model, tx, state, _ = state_and_tokens(recipe)
    mesh = lowering.mesh_of(recipe, jax.devices())

    described = abstract_state(model, tx, mesh)
    assert jax.tree.structure(state) == jax.tree.structure(described)
    for have, want in zip(jax.tree.leaves(state), jax.tree.leaves(described), strict=True):
        assert (have.shape, have.dtype) == (want.shape, want.dtype)
        assert have.sharding.is_equivalent_to(want.sharding, have.ndim)


def test_report(saved):
    recipe, r, _ = saved
    assert json.loads(json.dumps(r)) == r
    config = build_config(recipe)
    assert (r["devices"], r["mesh"]["fsdp"], r["mesh"]["tensor"]) == (8, 4, 2)
    m = r["memory"]
    _, _, state, tokens = state_and_tokens(recipe)
    held = [sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(t))
            for t in (state.params, state[1:], tokens)]  # fmt: skip
    assert [m["parameters"], m["optimizer"], m["inputs"]] == held
    assert m["parameters"] == pytest.approx(4 * weights.count_parameters(config) / 8, rel=0.2)
    assert m["peak"] == m["parameters"] + m["optimizer"] + m["inputs"] + m["rest"]
    assert m["available"] == int(15.75 * 2**30)
    flops = accounting.flops_per_token(config, 32)
    share = 16 * 32 / 8
    assert r["flops"]["model_causal"] == share * flops.training_causal
    assert r["work"]["flops"] == pytest.approx(share * flops.training_causal)
    received = sum(c["received"] for c in r["collectives"])
    assert r["work"]["ici"] == received > 0 and r["work"]["dcn"] == 0
    # Weights in fp32 here, gathered for both passes of both microbatches, each half of them.
    gathered = next(c["received"] for c in r["collectives"] if c["kind"] == "all-gather")
    assert gathered > 2 * 4 * weights.count_parameters(config) / 2 * 3 / 4
    b = r["bound"]
    assert b["seconds"] == max(b["compute"], b["hbm"], b["ici"], b["dcn"]) == b[b["limit"]]
    assert r["tokens_per_second_per_device"] == share / b["seconds"]
    assert r["mfu"] == pytest.approx(share * flops.training_full / b["seconds"] / 197e12)
    text = "\n".join(compile_report.format_compile_report(r))
    assert "v5e:2x4, 8 devices (fsdp 4 x tensor 2): phase 0: 16 sequences of 32 in micro" in text
    assert "optimizer state" in text and "all-gather (ICI)" in text and "MFU" in text


def test_saved_program_runs_elsewhere(saved):
    """Loaded from its file, it takes the step that `btlm train` would take."""
    recipe, report, file = saved
    program, notes = executables.load_executable(file)
    assert notes["report"] == report and notes["recipe"]["phases"][0]["microbatch"] == 8
    model, tx, state, tokens = state_and_tokens(recipe)
    want_state, want = make_step(model, tx)(jax.tree.map(lambda x: x.copy(), state), tokens)
    have_state, have = program(state, tokens)
    assert float(have["loss"]) == pytest.approx(float(want["loss"]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(have_state), jax.tree.leaves(want_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_saved_programs_are_checked(saved, tmp_path):
    _, _, file = saved
    with pytest.raises(FileExistsError, match="exists: choose another name"):
        executables.require_new_file(file)
    with pytest.raises(ValueError, match="compiled for devices = 8, found 4 here"):
        executables.load_executable(file, jax.devices()[:4])
    (tmp_path / "other").write_text("no")
    with pytest.raises(ValueError, match="not written by `btlm compile --save`"):
        executables.load_executable(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        executables.load_executable(tmp_path / "none")
    cut = tmp_path / "cut"
    cut.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="or damaged"):
        executables.read_executable_metadata(cut)


def test_decoding():
    recipe = load_recipe("tiny", ["mesh.tensor=2"])
    r = compile_decoding(recipe, TOPOLOGY, batch_size=8, capacity=64)
    config = build_config(recipe)
    cache = 8 * 64 * accounting.kv_bytes_per_token(config, 4)  # fp32 on CPUs
    assert r["memory"]["inputs"] == pytest.approx(cache / 8, rel=0.05)
    assert r["memory"]["optimizer"] == 0
    assert r["tokens_per_second_per_device"] == 1 / r["bound"]["seconds"]
    assert "8 sequences against 64 slots" in compile_report.format_compile_report(r)[0]
    assert "ms per token" in compile_report.format_compile_report(r)[-1]
    with pytest.raises(ValueError, match="--capacity: found 0"):
        compile_decoding(recipe, TOPOLOGY, batch_size=8, capacity=0)


@pytest.mark.parametrize(
    "text",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (23.77G) exceeds available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 23.77G of 15.75G hbm. Exceeded hbm capacity by 8.02G.",
    ],
)
def test_what_is_missing(text, monkeypatch):
    """The refusal names it, and what should fit: here 24 sequences per device do not."""

    class Program:
        def compile(self):
            raise jax.errors.JaxRuntimeError(text)

    lowered = lowering.Lowered(Program(), lowering.Parts(1, 1, 1), None, None)
    monkeypatch.setattr(compile, "train_step", lambda *_: lowered._replace(
        model=build_model(recipe)
    ))  # fmt: skip
    recipe = load_recipe("btlm-3b-8k", ["phases.1.batch_size=192", "run.tokens_per_device=0"])
    with pytest.raises(DoesNotFit) as error:
        compile_phase(recipe, 1, TOPOLOGY)
    assert error.value.needed == 23.77 * 2**30
    said = str(error.value)
    assert "v5e:2x4, phase 1: does not fit: 23.8 GiB per device are needed, 15.8 GiB" in said
    assert "8.0 GiB are missing; by estimate it fits with --set phases.1.microbatch=" in said


def test_what_compiles_and_does_not_fit(monkeypatch):
    """As on GPUs, for which XLA compiles anything."""
    small = topologies.parse_topology("v5e:2x4")
    rates = small.chip.per_device(small.shape)._replace(memory=100_000)
    monkeypatch.setattr(type(small.chip), "per_device", lambda *_: rates)
    with pytest.raises(DoesNotFit, match=r"97\.7 KiB are there, .* are missing; by estimate"):
        compile_phase(load_recipe("tiny", SMALL), 0, small)


def test_other_errors_of_the_compiler():
    error = compile._explained(RuntimeError("INTERNAL: something odd\nand more"))
    assert not isinstance(error, DoesNotFit)
    assert str(error) == "XLA cannot compile this: INTERNAL: something odd"


def test_what_does_not_divide():
    recipe = load_recipe("tiny", ["phases.0.batch_size=12"])
    with pytest.raises(ValueError, match="batch size 12 does not divide"):
        compile_phase(recipe, 0, TOPOLOGY)
    with pytest.raises(ValueError, match="--phase: found 1, the recipe has phases 0 to 0"):
        compile_phase(recipe, 1, TOPOLOGY)


def test_command(capsys, tmp_path):
    file = tmp_path / "new" / "report.json"
    sets = [x for s in SMALL for x in ("--set", s)]
    base = ["compile", "tiny", "--topology", "v5e:2x4", *sets]
    assert cli.main([*base, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("v5e:2x4, 8 devices (fsdp 8): phase 0")
    (report,) = json.loads(file.read_text())
    assert report["topology"] == "v5e:2x4" and report["memory"]["peak"] > 0
    assert cli.main(["compile", "tiny", "--topology", "v5f:2x4"]) == 2
    assert "did you mean v5e:2x4?" in capsys.readouterr().err
    assert cli.main(["compile", "btlm-3b-8k", "--save", str(tmp_path / "x")]) == 2
    assert "name its --phase" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (("--decode", "--fit"), "--decode: found --fit, which is of training"),
        (("--decode", "--phase", "0"), "--decode: found --phase, which is of training"),
        (("--batch-size", "8"), "--batch-size is of --decode; training's sizes are the recipe's"),
        (("--capacity", "8"), "--capacity is of --decode"),
        (("--decode", "--capacity", "0"), "--capacity: found 0, expected a positive int"),
    ],
)
def test_options_that_do_not_go_together(options, message, capsys):
    assert cli.main(["compile", "tiny", "--topology", "v5e:2x4", *options]) == 2
    assert message in capsys.readouterr().err


FOR_V5E = """
from btlm_jax.train import compile, recipe_file, topologies
topologies.prepare_compiler()
recipe = recipe_file.load_recipe(
    "btlm-3b-8k", ["model.fields.n_layer=8", "mesh.fsdp=1", "mesh.tensor=4"]
)
topology = topologies.parse_topology("v5e:2x2")
r = compile.compile_decoding(recipe, topology, batch_size=4, capacity=8192)
print(r["memory"]["inputs"], r["memory"]["rest"])
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_decoding_does_not_copy_its_cache():
    """Heads of 80 fill 128 lanes, 0.6 of the cache more; a copy of it would take 1.6 more."""
    out = subprocess.run(
        [sys.executable, "-c", FOR_V5E], check=True, capture_output=True, text=True
    ).stdout
    cache, rest = map(int, out.split())
    assert cache == pytest.approx(2 * 8 * 4 * 8192 * 2560 * 2 / 4, rel=0.01)
    assert rest < cache


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_3b_in_int4_decodes_in_3_gb(tmp_path):
    """One v5e chip, 2,048 slots: the model card's claim, with 10^9 bytes to the GB."""
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "btlm_jax.cli", "compile", "btlm-3b-8k", "--decode"]
    command += ["--topology", "v5e:1x1", "--set", "mesh.fsdp=1", "--batch-size", "1"]
    command += ["--capacity", "2048", "--quantize", "int4", "--json", str(file)]
    subprocess.run(command, check=True)
    (r,) = json.loads(file.read_text())
    assert r["memory"]["parameters"] == pytest.approx(1.49e9, rel=0.02)
    assert r["memory"]["peak"] <= 3.0e9


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", ["v5e:4x4", "v4:2x2x2"])
def test_two_layers_of_3b_for_real_topologies(name, tmp_path):
    """In a process of its own: what settles how libtpu loads must come before JAX starts.

    Of the two layers and the embedding's 0.29 B parameters each device holds p, m, v in 12 bytes,
    and XLA needs the gathered embedding and its gradient besides.
    """
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "btlm_jax.cli", "compile", "btlm-3b-8k", "--phase", "1"]
    command += ["--topology", name, "--set", "model.fields.n_layer=2", "--json", str(file)]
    command += ["--set", f"phases.1.batch_size={16 if name == 'v5e:4x4' else 8}"]
    subprocess.run(command, check=True)
    (r,) = json.loads(file.read_text())
    config = build_config(load_recipe("btlm-3b-8k", ["model.fields.n_layer=2"]))
    state = r["memory"]["parameters"] + r["memory"]["optimizer"]
    assert state == pytest.approx(12 * weights.count_parameters(config) / r["devices"], rel=0.02)
    assert state < r["memory"]["peak"] < 6 * 2**30
    assert r["unknown_loops"] == 0
    # Gathered in bf16 for both passes, over all devices.
    gathered = next(c for c in r["collectives"] if c["kind"] == "all-gather")
    assert gathered["bytes"] == pytest.approx(4 * weights.count_parameters(config), rel=0.35)
    assert 0.1 < r["mfu_causal"] <= 1.0
