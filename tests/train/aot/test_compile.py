"""Ahead-of-time compiled steps: for virtual CPU devices, and in slow tests for TPU topologies."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys

import jax
import numpy as np
import pytest

from btlm_jax import cli
from btlm_jax.cli.compile_command import Compile
from btlm_jax.model import weights
from btlm_jax.perf import accounting
from btlm_jax.train.aot import compile, compile_report, executables, lowering, topologies
from btlm_jax.train.aot.compile import DoesNotFit, compile_decoding, compile_phase
from btlm_jax.train.recipe_build import build_config, build_mesh, build_model, build_optimizer
from btlm_jax.train.recipe_file import load_recipe
from btlm_jax.train.step import abstract_state, init_state, make_step

TOPOLOGY = topologies.parse_topology("v5e:2x4")  # eight devices, like the virtual CPU devices
SMALL = ("phases.0.batch_size=16", "phases.0.length=32", "phases.0.microbatch=8")


@pytest.fixture(autouse=True)
def cpus_for_chips(monkeypatch):
    monkeypatch.setattr(compile, "topology_devices", lambda topology: jax.devices())
    monkeypatch.setattr(topologies, "prepare_compiler", lambda: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns (recipe, report, file) of a tiny recipe's compiled step."""
    file = tmp_path_factory.mktemp("compiled") / "step"
    # A learning rate that no other run has keeps the program out of the compile cache: XLA's CPU
    # backend cannot serialize a program that it has loaded itself.
    unique_rate = f"optimizer.peak_lr={random.uniform(0.005, 0.007)}"
    recipe = load_recipe("tiny", [*SMALL, "mesh.tensor=2", unique_rate])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile, "topology_devices", lambda topology: jax.devices())
        return recipe, compile_phase(recipe, 0, TOPOLOGY, file), file


def state_and_tokens(recipe):
    mesh = build_mesh(recipe, jax.devices())
    model = build_model(recipe)
    tx = build_optimizer(recipe, model.config)
    state = init_state(model.init(jax.random.key(0), mesh=mesh), tx)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 8, 33))
    batch_sharding = jax.NamedSharding(mesh, jax.P(None, ("data", "fsdp"), None))
    return model, tx, state, jax.device_put(tokens.astype(np.int32), batch_sharding)


def test_abstract_state_equals_the_state_of_a_run():
    recipe = load_recipe("tiny", ["mesh.tensor=2"])
    model, tx, state, _ = state_and_tokens(recipe)
    mesh = build_mesh(recipe, jax.devices())

    abstract = abstract_state(model, tx, mesh)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for array, struct in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (array.shape, array.dtype) == (struct.shape, struct.dtype)
        assert array.sharding.is_equivalent_to(struct.sharding, array.ndim)


def test_a_report_accounts_for_memory_network_and_flops(saved):
    recipe, report, _ = saved
    assert json.loads(json.dumps(report)) == report
    config = build_config(recipe)
    assert (report["devices"], report["mesh"]["fsdp"], report["mesh"]["tensor"]) == (8, 4, 2)
    memory = report["memory"]
    _, _, state, tokens = state_and_tokens(recipe)
    shard_bytes = [
        sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
        for tree in (state.params, state[1:], tokens)
    ]
    assert [memory["parameters"], memory["optimizer"], memory["inputs"]] == shard_bytes
    assert memory["parameters"] == pytest.approx(4 * weights.count_parameters(config) / 8, rel=0.2)
    assert memory["peak"] == sum(shard_bytes) + memory["rest"]
    assert memory["available"] == int(15.75 * 2**30)
    flops = accounting.flops_per_token(config, 32)
    device_tokens = 16 * 32 / 8
    assert report["flops"]["model_causal"] == device_tokens * flops.training_causal
    assert report["work"]["flops"] == pytest.approx(device_tokens * flops.training_causal)
    received = sum(c["received"] for c in report["collectives"])
    assert report["work"]["ici"] == received > 0 and report["work"]["dcn"] == 0
    # fp32 weights; each device gathers half of them, in both passes of both microbatches.
    gathered = next(c["received"] for c in report["collectives"] if c["kind"] == "all-gather")
    assert gathered > 2 * 4 * weights.count_parameters(config) / 2 * 3 / 4
    bound = report["bound"]
    assert bound["seconds"] == max(bound[name] for name in ("compute", "hbm", "ici", "dcn"))
    assert bound["seconds"] == bound[bound["limit"]]
    assert report["tokens_per_second_per_device"] == device_tokens / bound["seconds"]
    assert report["mfu"] == pytest.approx(
        device_tokens * flops.training_full / bound["seconds"] / 197e12
    )
    text = "\n".join(compile_report.format_compile_report(report))
    assert "v5e:2x4, 8 devices (fsdp 4 x tensor 2): phase 0: 16 sequences of 32 in micro" in text
    assert "optimizer state" in text and "all-gather (ICI)" in text and "MFU" in text


def test_a_saved_program_takes_the_step_of_training(saved):
    """The program loaded from the file gives the loss and state of `make_step`."""
    recipe, report, file = saved
    program, metadata = executables.load_executable(file)
    assert metadata["report"] == report
    assert metadata["recipe"]["phases"][0]["microbatch"] == 8
    model, tx, state, tokens = state_and_tokens(recipe)
    expected_state, expected = make_step(model, tx)(jax.tree.map(jax.numpy.copy, state), tokens)
    actual_state, actual = program(state, tokens)
    assert float(actual["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(actual_state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_saved_programs_are_checked_before_they_are_loaded(saved, tmp_path):
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


def test_a_decoding_report_counts_the_cache():
    recipe = load_recipe("tiny", ["mesh.tensor=2"])
    report = compile_decoding(recipe, TOPOLOGY, batch_size=8, capacity=64)
    config = build_config(recipe)
    cache = 8 * 64 * accounting.kv_bytes_per_token(config, 4)  # fp32 on CPUs
    assert report["memory"]["inputs"] == pytest.approx(cache / 8, rel=0.05)
    assert report["memory"]["optimizer"] == 0
    assert report["tokens_per_second_per_device"] == 1 / report["bound"]["seconds"]
    assert "8 sequences against 64 slots" in compile_report.format_compile_report(report)[0]
    assert "ms per token" in compile_report.format_compile_report(report)[-1]
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
def test_a_refusal_names_the_missing_memory_and_settings_that_fit(text, monkeypatch):
    """24 sequences per device do not fit here."""

    class Program:
        def compile(self):
            raise jax.errors.JaxRuntimeError(text)

    lowered = lowering.LoweredProgram(Program(), lowering.ArgumentBytes(1, 1, 1), None, None)
    monkeypatch.setattr(compile, "lower_train_step", lambda *_: lowered)
    recipe = load_recipe("btlm-3b-8k", ["phases.1.batch_size=192", "run.tokens_per_device=0"])
    with pytest.raises(DoesNotFit) as error:
        compile_phase(recipe, 1, TOPOLOGY)
    assert error.value.needed == 23.77 * 2**30
    message = str(error.value)
    assert "v5e:2x4, phase 1: does not fit: the program needs 23.8 GiB per device, 15.8 " in message
    assert "8.0 GiB are missing; by estimate it fits with --set phases.1.microbatch=" in message


def test_a_compiled_program_that_does_not_fit_is_refused(monkeypatch):
    """For GPUs, XLA compiles programs of any size."""
    rates = TOPOLOGY.chip.per_device(TOPOLOGY.shape)._replace(memory=100_000)
    monkeypatch.setattr(type(TOPOLOGY.chip), "per_device", lambda *_: rates)
    with pytest.raises(DoesNotFit, match=r"97\.7 KiB are available, .* are missing; by estimate"):
        compile_phase(load_recipe("tiny", SMALL), 0, TOPOLOGY)


def test_other_errors_of_the_compiler_are_shortened():
    error = compile._compile_error(RuntimeError("INTERNAL: something odd\nand more"))
    assert not isinstance(error, DoesNotFit)
    assert str(error) == "XLA cannot compile this: INTERNAL: something odd"


def test_batches_and_phases_must_fit_the_recipe():
    recipe = load_recipe("tiny", ["phases.0.batch_size=12"])
    with pytest.raises(ValueError, match="batch size 12 does not divide"):
        compile_phase(recipe, 0, TOPOLOGY)
    with pytest.raises(ValueError, match="--phase: found 1, the recipe has phases 0 to 0"):
        compile_phase(recipe, 1, TOPOLOGY)


def test_the_command_prints_and_writes_reports(capsys, tmp_path):
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
    assert "select it with --phase" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (("--decode", "--fit"), "--decode: found --fit too, which is for training"),
        (("--decode", "--phase", "0"), "--decode: found --phase too, which is for training"),
        (
            ("--batch-size", "8"),
            "--batch-size needs --decode; for training set the sizes",
        ),
        (("--capacity", "8"), "--capacity needs --decode"),
        (("--decode", "--capacity", "0"), "--capacity: found 0, expected a positive int"),
        (("--quantize", "int8"), "--quantize needs --decode: add it, or omit --quantize"),
        (("--cache-dtype", "int8"), "--cache-dtype needs --decode"),
        (("--keep", "2"), "--keep needs --fit"),
        (("--jobs", "99"), "--jobs needs --fit or --table"),
        (("--fit", "--set", "run.remat=full"), "--set run.remat: found --fit too, which searches"),
        (("--fit", "--set", "mesh.fsdp=2"), "--set mesh.fsdp: found --fit too"),
        (("--table", __file__), "--table: found --topology too, which it ignores: remove one"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, message, capsys):
    assert cli.main(["compile", "tiny", "--topology", "v5e:2x4", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, ignored",
    [
        (
            ("run.log_every=3", "data.train=x", "run.remat=full", "model.init_truncation=2.0"),
            "--set run.log_every, data.train, model.init_truncation does nothing here",
        ),
        (("--decode", "optimizer.b1=0.5", "run.remat=full"), "--set optimizer.b1, run.remat does"),
        (("run.compute_dtype=float32", "phases.0.length=8", "data.mask_documents=true"), None),
    ],
)
def test_overrides_that_do_not_change_the_program_are_named(options, ignored, caplog):
    flags = [o for o in options if o.startswith("--")]
    command = Compile(set=tuple(o for o in options if "=" in o), decode=bool(flags))
    with caplog.at_level("WARNING", "btlm_jax"):
        command._name_ignored_overrides()
    assert ignored in caplog.text if ignored else not caplog.text


FOR_V5E = """
from btlm_jax.train import recipe_file
from btlm_jax.train.aot import compile, topologies
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
    """Heads of 80 pad to 128 lanes, which adds 0.6 of the cache; a copy would add 1.6."""
    out = subprocess.run(
        [sys.executable, "-c", FOR_V5E], check=True, capture_output=True, text=True
    ).stdout
    cache, rest = map(int, out.split())
    assert cache == pytest.approx(2 * 8 * 4 * 8192 * 2560 * 2 / 4, rel=0.01)
    assert rest < cache


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_3b_in_int4_decodes_in_3_gb(tmp_path):
    """The model card claims 3 GB (10^9 bytes each); here on one v5e chip with 2,048 slots."""
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "btlm_jax.cli", "compile", "btlm-3b-8k", "--decode"]
    command += ["--topology", "v5e:1x1", "--set", "mesh.fsdp=1", "--batch-size", "1"]
    command += ["--capacity", "2048", "--quantize", "int4", "--json", str(file)]
    subprocess.run(command, check=True)
    (report,) = json.loads(file.read_text())
    assert report["memory"]["parameters"] == pytest.approx(1.49e9, rel=0.02)
    assert report["memory"]["peak"] <= 3.0e9


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", ["v5e:4x4", "v4:2x2x2"])
def test_two_layers_of_3b_for_real_topologies(name, tmp_path):
    """Runs in a subprocess, because `prepare_compiler` must come before JAX starts.

    Two layers and the embedding have 0.29 B parameters. The devices share 12 bytes for each (p, m,
    v); XLA also needs the gathered embedding and its gradient.
    """
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "btlm_jax.cli", "compile", "btlm-3b-8k", "--phase", "1"]
    command += ["--topology", name, "--set", "model.fields.n_layer=2", "--json", str(file)]
    command += ["--set", f"phases.1.batch_size={16 if name == 'v5e:4x4' else 8}"]
    subprocess.run(command, check=True)
    (report,) = json.loads(file.read_text())
    config = build_config(load_recipe("btlm-3b-8k", ["model.fields.n_layer=2"]))
    parameters = weights.count_parameters(config)
    state = report["memory"]["parameters"] + report["memory"]["optimizer"]
    assert state == pytest.approx(12 * parameters / report["devices"], rel=0.02)
    assert state < report["memory"]["peak"] < 6 * 2**30
    assert report["unknown_loops"] == 0
    # The weights are gathered in bf16 for both passes, over all devices.
    gathered = next(c for c in report["collectives"] if c["kind"] == "all-gather")
    assert gathered["bytes"] == pytest.approx(4 * parameters, rel=0.35)
    assert 0.1 < report["mfu_causal"] <= 1.0
