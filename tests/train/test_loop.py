"""Runs are the same on every mesh, and after any interruption as if there had been none."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import btlm_jax as btlm
from btlm_jax import cli
from btlm_jax.checkpoint import metadata
from btlm_jax.checkpoint.trained_documents import read_trained_documents
from btlm_jax.convert import convert, export, verify
from btlm_jax.convert.hf import source as hf_source
from btlm_jax.data.token_shards import TokenShards
from btlm_jax.model.loss import target_loss
from btlm_jax.model.params import flatten_tree
from btlm_jax.train import preemption, recipe_build
from btlm_jax.train.batches import document_segments
from btlm_jax.train.loop import train
from btlm_jax.train.metrics import read_metrics
from btlm_jax.train.recipe_file import load_recipe
from btlm_jax.utils.compile_cache import count_compilations
from support import compiling, golden
from support.kill_and_resume import KillAndResume
from support.runs import (
    assert_close_losses,
    assert_same_run,
    copy_run,
    final_weights,
    losses,
    same_bits,
)


@pytest.fixture
def stop_after(monkeypatch):
    """Returns a function: training stops after that step from now on; None never stops."""

    def set_step(stop: int | None) -> None:
        monkeypatch.setattr(preemption.StopSignal, "requested", lambda self, step: step == stop)

    return set_step


def test_a_run_leaves_metrics_checkpoints_a_plot_and_the_tokenizer(reference, capsys):
    run, result = reference
    assert result.finished and result.step == 12
    curve = losses(run)
    assert list(curve) == list(range(1, 13)) and curve[12] == result.loss < curve[1]
    lines = read_metrics(run / "metrics.jsonl")
    held = {x["step"]: x for x in lines if "held_out_loss" in x}
    assert set(held) == {6, 12} and held[12]["held_out_loss"] == result.held_out
    assert held[12]["held_out_bits_per_byte"] > 0
    line = next(x for x in lines if x["step"] == 5 and "loss" in x)
    groups = ("embedding", "hidden", "vector")
    assert line.keys() == {
        "step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second_per_device",
        "skipped", *(f"{name}/{g}" for name in ("grad_norm", "update_norm") for g in groups),
    }  # fmt: skip
    assert line["grad_norm"] == pytest.approx(
        np.sqrt(sum(line[f"grad_norm/{g}"] ** 2 for g in groups)), rel=1e-5
    )
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["12", "9"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "tokenizer/tokenizer.json").is_file()
    assert cli.main(["info", str(run)]) == 0
    assert "float32" in capsys.readouterr().out


def test_training_checkpoints_are_checkpoints(reference):
    meta = metadata.read_metadata(reference[0])
    assert meta.ocdbt and meta.origin["step"] == 12
    assert json.loads(json.dumps(meta.origin))["recipe"]["phases"][0]["steps"] == 8


def test_a_run_can_be_exported(reference, tmp_path):
    run, _ = reference
    export(run, tmp_path / "hf")
    assert verify(run, tmp_path / "hf")
    _, params = btlm.convert.load_hf(tmp_path / "hf")
    assert same_bits(flatten_tree(params), final_weights(run))


@pytest.fixture
def phase_two(reference, tmp_path):
    """A copy of the reference as it was after step 9 of 12, in its second phase."""
    run = copy_run(reference[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints/12")
    return run


# Up to fp32 rounding, which training amplifies: after 12 steps at this rate, to 3e-6.
ROUNDING = 1e-4


@pytest.mark.parametrize(
    "mesh", [dict(fsdp=1, data=8), dict(data=2, fsdp=2, tensor=2), dict(fsdp=4, context=2)]
)
def test_a_run_can_be_resumed_on_another_mesh(load_tiny, reference, phase_two, mesh):
    result = train(load_tiny(*(f"mesh.{k}={v}" for k, v in mesh.items())), phase_two)
    assert result.held_out == pytest.approx(reference[1].held_out, abs=ROUNDING)
    assert_close_losses(phase_two, reference[0], ROUNDING)


def test_microbatches_add_up_to_a_step(load_tiny, reference, phase_two):
    """Sums are divided once, so that a step in two parts is the same step up to rounding."""
    train(load_tiny("phases.1.microbatch=16"), phase_two)
    assert_close_losses(phase_two, reference[0], ROUNDING)


def test_z_loss_reaches_the_step(load_tiny, tmp_path, monkeypatch):
    class Called(Exception):
        pass

    def make_step(model, tx, *, z_loss, offload_optimizer):
        raise Called(z_loss)

    monkeypatch.setattr(recipe_build, "make_step", make_step)
    with pytest.raises(Called, match=r"0\.25"):
        train(load_tiny("optimizer.z_loss=0.25"), tmp_path / "run")


def test_offloaded_optimizer_state_changes_no_bit_and_stays_on_the_host(
    load_tiny, reference, phase_two, monkeypatch, stop_after
):
    """Even when the run is stopped and resumed, and was begun without."""
    memory_kinds = set()
    make_step = recipe_build.make_step

    def spying(*args, **kwargs):
        step = make_step(*args, **kwargs)

        def run(state, *batch):
            leaves = jax.tree.leaves(state.opt_state)
            memory_kinds.update(x.sharding.memory_kind for x in leaves if x.ndim)
            return step(state, *batch)

        return run

    monkeypatch.setattr(recipe_build, "make_step", spying)
    recipe = load_tiny("run.offload_optimizer=true")
    stop_after(10)
    train(recipe, phase_two)
    stop_after(None)
    assert train(recipe, phase_two).finished
    assert memory_kinds == {"pinned_host"}
    assert_same_run(phase_two, reference[0])


def test_the_step_is_compiled_once_per_shape(load_tiny, reference, tmp_path, caplog, stop_after):
    """Two phases are two programs, compiled at their first steps; the recipe has 12 steps."""
    caplog.set_level("INFO", "btlm_jax")
    stop_after(9)  # the first step of phase two
    with count_compilations() as first:
        train(load_tiny(), tmp_path / "run")
    messages = [r.message for r in caplog.records if "compiled its program" in r.message]
    assert len(messages) == 2, messages
    stop_after(None)
    with count_compilations() as second:
        train(load_tiny(), tmp_path / "longer")
    assert 0 < second.count <= first.count  # more steps compile nothing more


def test_masked_documents_are_evaluated_masked_and_recorded(
    load_tiny, reference, tmp_path, stop_after
):
    """An older version's run, with another loss for the first tokens, is not resumed."""
    recipe, run = load_tiny("data.mask_documents=true"), tmp_path / "run"
    stop_after(6)  # after the first evaluation
    train(recipe, run)
    assert losses(run)[1] != losses(reference[0])[1]
    held = [x for x in read_metrics(run / "metrics.jsonl") if "held_out_loss" in x]
    assert [x["held_out_masked"] for x in held] == [1]
    model, params = btlm.load(run)
    tokens = TokenShards(Path(recipe.data.held_out))
    windows = np.stack([tokens.read(start, 17) for start in range(0, 7 * 128, 16)])
    loss = jax.jit(lambda segments: target_loss(model, params, windows, segments)[1].mean)
    masked, joined = (float(loss(segments)) for segments in (document_segments(windows, 0), None))
    assert held[0]["held_out_loss"] == pytest.approx(masked, rel=1e-5)
    assert abs(masked - joined) > 1e-4
    record = read_trained_documents(metadata.read_metadata(run).origin)
    assert record == ("separate", 0, True)
    identity = json.loads((run / "recipe.json").read_text())
    del identity["documents"]
    (run / "recipe.json").write_text(json.dumps(identity))
    with pytest.raises(ValueError, match=r"left the first token .* --set model\.checkpoint="):
        train(recipe, run)


def test_a_resumed_run_is_bitwise_the_same(load_tiny, reference, tmp_path, stop_after):
    """Stopped again and again: in phase one, at the change and in phase two."""
    for step in (2, 8, 11):
        stop_after(step)
        result = train(load_tiny(), tmp_path / "run")
        assert (result.step, result.finished) == (step, False)
    stop_after(None)
    assert train(load_tiny(), tmp_path / "run").finished
    assert_same_run(tmp_path / "run", reference[0])
    again = train(load_tiny(), tmp_path / "run")  # nothing left to do
    assert again.finished and again.loss == losses(reference[0])[12]
    assert again.held_out == reference[1].held_out


@pytest.fixture(scope="module")
def resumption(tiny_recipe):
    """Returns a function: a longer run as a process, killed that many times by a signal."""
    overrides = ("phases.0.steps=150", "run.checkpoint_every=7", "run.eval_every=0")
    options = [x for o in overrides for x in ("--set", o)]

    def make(run: Path, kills: int, kill_signal: signal.Signals) -> KillAndResume:
        return KillAndResume(
            [sys.executable, "-m", "btlm_jax.cli", "train", str(tiny_recipe), str(run), *options],
            progress=lambda: len(losses(run)),
            pieces=(1, 44),
            kills=kills,
            kill_signal=kill_signal,
            finished=lambda output: "next: btlm generate" in output,
            environment=compiling.one_device(),
            delay=0.05,
            timeout=300,
            seed=int(kill_signal),
        )

    return make


@pytest.fixture(scope="module")
def uninterrupted(resumption, tmp_path_factory) -> Path:
    """The longer run, which nothing killed."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    resumption(run, 0, signal.SIGTERM).run()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("kill_signal", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_killed_at_random_moments_is_bitwise_the_same(
    resumption, uninterrupted, tmp_path, kill_signal
):
    """Real processes, three kills each."""
    run, outputs = tmp_path / "run", []
    _, ended_by_signal = resumption(run, 3, kill_signal).run(outputs.append)
    if kill_signal == signal.SIGTERM:  # a run either ends by the signal or says how to resume
        hints = ("resume with: ", "next: btlm generate")
        assert sum(not any(h in o for h in hints) for o in outputs) == ended_by_signal
    else:
        assert ended_by_signal >= 2
    assert_same_run(run, uninterrupted)
    assert all(p.name.isdigit() for p in (run / "checkpoints").iterdir())


def test_steps_can_be_profiled(load_tiny, tmp_path, stop_after):
    stop_after(3)
    train(load_tiny(), tmp_path / "run", (2, 3))
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))


def test_training_starts_from_a_checkpoint_of_either_format(
    tiny_recipe, reference, tmp_path, stop_after
):
    run, _ = reference
    stop_after(1)
    export(run, tmp_path / "hf")
    for source in (run / "checkpoints/12", tmp_path / "hf"):
        text = tiny_recipe.read_text().replace('preset = "tiny"', f'checkpoint = "{source}"')
        text = text.split("[model.fields]")[0] + text[text.index("[[phases]]") :]
        file = tmp_path / f"{source.name}.toml"
        file.write_text(text)
        train(load_recipe(file), tmp_path / f"run-{source.name}")
        assert losses(tmp_path / f"run-{source.name}")[1] < losses(run)[1] - 0.1


def test_training_uses_the_slopes_of_the_checkpoint(tiny_recipe, tmp_path, monkeypatch):
    """The released model's lost bits in bf16; no format may replace them with the exact ones."""
    case = golden.load("g_bf16")
    hf = golden.write_hf(tmp_path / "hf", case)
    convert(hf, tmp_path / "orbax")
    monkeypatch.setattr(hf_source, "fetch_from_hub", lambda name, *_: {"org/name": hf}[name])
    text = tiny_recipe.read_text()
    phases = text[text.rindex("[[phases]]") :]
    curves = []
    for i, source in enumerate((tmp_path / "orbax", hf, "org/name")):
        file, run = tmp_path / f"{i}.toml", tmp_path / f"run-{i}"
        file.write_text(f'[model]\ncheckpoint = "{source}"\n{phases}')
        train(load_recipe(file, ["phases.0.steps=2"]), run)
        assert metadata.read_metadata(run).config == case.config, source
        curves.append(losses(run))
    assert len(curves[0]) == 2 and curves[0] == curves[1] == curves[2]
