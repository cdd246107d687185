"""Runs: the same on every mesh, and after any interruption as if there had been none."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import btlm_jax as btlm
from btlm_jax import cli
from btlm_jax.checkpoint import metadata
from btlm_jax.convert import convert, export, verify
from btlm_jax.convert.hf import source as hf_source
from btlm_jax.model.params import flatten_tree
from btlm_jax.train import recipe_build, recipe_file
from btlm_jax.train.checkpoints import Checkpoints
from btlm_jax.train.loop import train
from btlm_jax.train.metrics import read_metrics
from btlm_jax.train.recipe import Recipe
from btlm_jax.train.recipe_build import build_config, build_optimizer, build_schedule
from btlm_jax.utils.compile_cache import count_compilations
from support import golden
from support.runs import compiled_once, copy_of, final_weights, losses, same_bits  # noqa: F401
from support.tokens import write_tokens

TINY = """
[model]
preset = "tiny"
[model.fields]
vocab_size = 61
n_embd = 32
n_head = 2
n_inner = 42
n_layer = 2
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


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A recipe in a file, and tokens in which every one follows from the two before."""
    root = tmp_path_factory.mktemp("data")
    tokens = np.zeros(4000, np.int64)
    tokens[:2] = 1, 2
    for i in range(2, len(tokens)):
        tokens[i] = (3 * tokens[i - 1] + tokens[i - 2]) % 61
    for name, part in (("train", tokens[:3000]), ("held", tokens[3000:])):
        write_tokens(root / name, part, vocab_size=61, eos_id=0)
        golden.write_tokenizer(root / name / "tokenizer", 61)
    file = root / "recipe.toml"
    file.write_text(TINY.format(train=root / "train", held=root / "held"))
    return file


def load(files: Path, *overrides: str) -> Recipe:
    return recipe_file.load_recipe(files, overrides)


@pytest.fixture(scope="module")
def reference(files, tmp_path_factory):
    """An uninterrupted run on a mesh of 8."""
    run = tmp_path_factory.mktemp("reference") / "run"
    outcome = train(load(files), run)
    return run, outcome


def test_a_run_and_what_it_leaves(reference, capsys):
    run, outcome = reference
    assert outcome.finished and outcome.step == 12
    found = losses(run)
    assert list(found) == list(range(1, 13)) and found[12] == outcome.loss < found[1]
    lines = read_metrics(run / "metrics.jsonl")
    held = {x["step"]: x for x in lines if "held_out_loss" in x}
    assert set(held) == {6, 12} and held[12]["held_out_loss"] == outcome.held_out
    assert held[12]["held_out_bits_per_byte"] > 0
    one = next(x for x in lines if x["step"] == 5 and "loss" in x)
    assert one["grad_norm"] == pytest.approx(
        np.sqrt(sum(one[f"grad_norm/{g}"] ** 2 for g in ("embedding", "hidden", "vector"))),
        rel=1e-5,
    )
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["12", "9"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "tokenizer/tokenizer.json").is_file()
    assert cli.main(["info", str(run)]) == 0
    assert "float32" in capsys.readouterr().out


def test_export_takes_the_run(reference, tmp_path):
    run, _ = reference
    export(run, tmp_path / "hf")
    assert verify(run, tmp_path / "hf")
    _, params = btlm.convert.load_hf(tmp_path / "hf")
    assert same_bits(flatten_tree(params), final_weights(run))


@pytest.mark.parametrize(
    "mesh",
    [
        dict(fsdp=1, data=8),
        dict(fsdp=4, tensor=2),
        dict(data=2, fsdp=2, tensor=2),
        dict(fsdp=4, context=2),
    ],
)
def test_same_losses_on_every_mesh(files, reference, mesh, tmp_path):
    """To fp32 rounding, which training amplifies: 12 steps at this rate, measured 3e-6."""
    sizes = [f"mesh.{k}={v}" for k, v in mesh.items()]
    train(load(files, *sizes), tmp_path / "run")
    a, b = losses(reference[0]), losses(tmp_path / "run")
    assert max(abs(a[s] - b[s]) for s in a) < 1e-4


def test_microbatches_add_up(files, reference, tmp_path):
    """Sums divided once: a step in two parts is a step, to rounding."""
    train(load(files, "phases.1.microbatch=16"), tmp_path / "run")
    a, b = losses(reference[0]), losses(tmp_path / "run")
    assert max(abs(a[s] - b[s]) for s in a) < 1e-4


def test_z_loss_reaches_the_step(files, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def asked(model, tx, *, z_loss, offload_optimizer):
        raise Asked(z_loss)

    monkeypatch.setattr(recipe_build, "make_step", asked)
    with pytest.raises(Asked, match=r"0\.25"):
        train(load(files, "optimizer.z_loss=0.25"), tmp_path / "run")


def test_optimizer_state_on_the_host(files, reference, tmp_path, monkeypatch):
    """Bitwise the same run, stopped and gone on with, and the state is where it should be."""
    from btlm_jax.train import preemption

    kinds = set()
    make_step = recipe_build.make_step

    def spying(*args, **kwargs):
        step = make_step(*args, **kwargs)

        def run(state, *batch):
            kinds.update(x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim)
            return step(state, *batch)

        return run

    monkeypatch.setattr(recipe_build, "make_step", spying)
    recipe = load(files, "run.offload_optimizer=true")
    monkeypatch.setattr(preemption.StopSignal, "requested", lambda self, step: step == 5)
    train(recipe, tmp_path / "run")
    monkeypatch.setattr(preemption.StopSignal, "requested", lambda self, step: False)
    assert train(recipe, tmp_path / "run").finished
    assert kinds == {"pinned_host"}
    assert losses(tmp_path / "run") == losses(reference[0])
    assert same_bits(final_weights(tmp_path / "run"), final_weights(reference[0]))


def test_one_compilation_per_shape(files, reference, tmp_path, caplog):
    """Two phases are two programs, compiled at their first steps; the recipe has 12 steps."""
    caplog.set_level("INFO", "btlm_jax")
    with count_compilations() as first:
        train(load(files, "run.seed=3"), tmp_path / "run")
    told = [r.message for r in caplog.records if "compiled its program" in r.message]
    assert len(told) == 2, told
    caplog.clear()
    with count_compilations() as second:
        train(load(files, "run.seed=3", "phases.0.steps=9"), tmp_path / "longer")
    assert 0 < second.count <= first.count  # more steps compile nothing more


def test_masked_documents_change_the_loss(files, reference, tmp_path):
    train(load(files, "data.mask_documents=true"), tmp_path / "run")
    assert losses(tmp_path / "run")[1] != losses(reference[0])[1]


def test_stopped_and_gone_on_with_is_bitwise_the_same(files, reference, tmp_path, monkeypatch):
    """A stop is asked for after every few steps, in phase one, at the change and in phase two."""
    from btlm_jax.train import preemption

    for stop_at in (2, 3, 8, 11):
        monkeypatch.setattr(
            preemption.StopSignal, "requested", lambda self, step, s=stop_at: step == s
        )
        outcome = train(load(files), tmp_path / "run")
        assert (outcome.step, outcome.finished) == (stop_at, False)
    monkeypatch.setattr(preemption.StopSignal, "requested", lambda self, step: False)
    assert train(load(files), tmp_path / "run").finished
    assert losses(tmp_path / "run") == losses(reference[0])
    assert same_bits(final_weights(tmp_path / "run"), final_weights(reference[0]))
    again = train(load(files), tmp_path / "run")  # nothing left to do
    assert again.finished and again.loss == losses(reference[0])[12]


def test_gone_on_with_on_another_mesh(files, reference, tmp_path, monkeypatch):
    from btlm_jax.train import preemption

    monkeypatch.setattr(preemption.StopSignal, "requested", lambda self, step: step == 7)
    train(load(files), tmp_path / "run")
    monkeypatch.undo()
    train(load(files, "mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2"), tmp_path / "run")
    a, b = losses(reference[0]), losses(tmp_path / "run")
    assert max(abs(a[s] - b[s]) for s in a) < 1e-4


SCRIPT = """
import sys
from btlm_jax import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_and_gone_on_with(files, tmp_path, number):
    """Real processes, killed at random moments, ten times each; then as if nothing had happened."""
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "XLA_FLAGS": ""}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    options = ["--set", "phases.0.steps=300", "--set", "run.checkpoint_every=7"]
    options += ["--set", "run.eval_every=0"]

    def start(run: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", SCRIPT, "train", str(files), str(run), *options]
        return subprocess.Popen(command, stdout=-1, stderr=-2, text=True, env=env)

    whole = start(tmp_path / "whole")
    out, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, out
    rng, kills, run, ended = random.Random(int(number)), 0, tmp_path / "run", False
    reached = 0
    while not ended:
        process = start(run)
        deadline = time.monotonic() + 120
        metrics = run / "metrics.jsonl"
        goal = reached + rng.randrange(1, 45)
        while process.poll() is None and time.monotonic() < deadline:
            text = metrics.read_text().splitlines() if metrics.exists() else []
            if len(text) >= goal and kills < 10:
                time.sleep(rng.random() * 0.05)
                process.send_signal(number)
                kills += 1
                break
            time.sleep(0.005)
        out, _ = process.communicate(timeout=120)
        if number == signal.SIGTERM and process.returncode == 0 and kills:
            assert "resume with: " in out or "next: btlm generate" in out
        assert process.returncode in (0, -number), out
        ended = process.returncode == 0 and "next: btlm generate" in out
        reached = len(losses(run)) if metrics.exists() else 0
        if kills == 10 and not ended:
            continue
    assert kills >= 5
    assert losses(run) == losses(tmp_path / "whole")
    assert same_bits(final_weights(run), final_weights(tmp_path / "whole"))
    assert not [p for p in (run / "checkpoints").iterdir() if not p.name.isdigit()]


# What can be wrong ------------------------------------------------------------------------------


def test_damaged_newest_checkpoint_is_reported_and_set_aside(files, reference, tmp_path, caplog):
    run = tmp_path / "run"
    train(load(files), run)
    newest = run / "checkpoints/12/state/d"
    largest = max(newest.iterdir(), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    assert train(load(files), run).finished
    assert "checkpoint" in caplog.text and "cannot be used" in caplog.text
    assert (run / "checkpoints/damaged-12").is_dir()
    assert losses(run) == losses(reference[0])
    assert same_bits(final_weights(run), final_weights(reference[0]))


@pytest.mark.parametrize("lost", ["state", "optimizer", "_CHECKPOINT_METADATA"])
def test_part_of_the_newest_checkpoint_is_gone(files, reference, tmp_path, lost):
    run = copy_of(reference[0], tmp_path / "run")
    gone = run / "checkpoints/12" / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert train(load(files), run).finished
    assert losses(run) == losses(reference[0])
    assert same_bits(final_weights(run), final_weights(reference[0]))


def test_when_no_checkpoint_can_be_read_nothing_is_touched(files, reference, tmp_path):
    """Nor does the next call start afresh over it."""
    run = copy_of(reference[0], tmp_path / "run")
    for step in (9, 12):
        shutil.rmtree(run / f"checkpoints/{step}/optimizer")
    before = sorted(p.relative_to(run) for p in run.rglob("*"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none of its checkpoints \[9, 12\] can be read"):
            train(load(files), run)
        assert sorted(p.relative_to(run) for p in run.rglob("*")) == before


def test_a_checkpoint_of_another_optimizer_is_not_damage(files, reference, tmp_path):
    run = copy_of(reference[0], tmp_path / "run")
    keeper = Checkpoints(run / "checkpoints", keep_last=2, keep_every=0)
    r = load(files, "optimizer.name=lion")
    model = btlm.BTLM(build_config(r))
    with pytest.raises(ValueError, match=r"does not fit the recipe's optimizer"):
        keeper.restore_newest(model, build_optimizer(r, model.config), btlm.make_mesh())
    keeper.close()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["12", "9"]


def test_gradients_that_are_not_finite(files, tmp_path):
    """Skipped without a trace, counted, and after some in a row the end."""
    from btlm_jax.train.step import init_state, make_step

    r = load(files)
    model = btlm.BTLM(build_config(r))
    params = model.init(jax.random.key(0))
    params["ln_f"]["scale"] = params["ln_f"]["scale"].at[0].set(np.inf)
    before = jax.tree.map(np.asarray, params)
    tx = build_optimizer(r, model.config)
    step, state = make_step(model, tx), init_state(params, tx)
    for i in (1, 2):
        state, metrics = step(state, np.ones((1, 8, 9), np.int32))
        assert (int(state.step), int(state.skipped), int(state.bad_in_a_row)) == (i, i, i)
        assert not np.isfinite(metrics["loss"])
    assert same_bits(flatten_tree(before), flatten_tree(state.params))
    assert all(not np.any(x) for x in jax.tree.leaves(state.opt_state))
    with pytest.raises(FloatingPointError, match=r"2 steps in a row .* there is no checkpoint"):
        train(
            dataclasses.replace(
                load(files, "run.max_bad_steps=2", "run.checkpoint_every=0"),
                optimizer=dataclasses.replace(r.optimizer, peak_lr=1e30, warmup_tokens=0),
            ),
            tmp_path / "run",
        )


@pytest.mark.parametrize("skipped, bad, updates", [(0, 0, 5), (2, 0, 3), (2, 1, 4), (2, 2, 4)])
def test_learning_rate_in_the_log_is_that_of_the_update(files, skipped, bad, updates):
    """After 2 of 6 steps were skipped the sixth is the fourth update (rate of step 3)."""
    from btlm_jax.train.loop import _report

    r, lines = load(files), {}
    log = types.SimpleNamespace(write=lines.__setitem__)
    zero = np.float32(0)
    metrics = {"loss": zero, "tokens": np.float32(64), "grad_norm": zero}
    metrics |= {"skipped": np.int32(skipped), "bad_in_a_row": np.int32(bad)}
    _report(r, btlm.BTLM(build_config(r)), log, (6, r.phases[0], metrics), 1.0)
    assert lines[6]["learning_rate"] == pytest.approx(float(build_schedule(r)(updates)))


@pytest.mark.parametrize(
    "overrides, error, said",
    [
        (["data.train=nowhere"], FileNotFoundError, "nowhere"),
        (["data.train="], ValueError, "btlm tokenize"),
        (["phases.0.batch_size=6"], ValueError, "found 6, expected a multiple of 8"),
        (["mesh.fsdp=3"], ValueError, "found 8"),
        (["model.fields.vocab_size=50"], ValueError, "61 tokens, the model 50"),
        (["phases.0.length=9", "mesh.context=2", "mesh.fsdp=4"], ValueError,
         r"phases\.0\.length: found 9, expected a multiple of 4, twice mesh\.context"),
        (["run.wandb_project=x"], ValueError, "pip install wandb"),
        (["phases.0.length=4096", "phases.1.length=4096"], ValueError,
         "3000 tokens, expected at least 4097"),
        (["phases.0.length=512", "phases.1.length=512"], ValueError,
         r"data\.held_out: 1000 tokens are fewer than one"),
        (["model.fields.completep_base_layers=1"], ValueError,
         "^optimizer.decay: .*expected .c"),
    ],
)  # fmt: skip
def test_refused_before_the_first_step(files, tmp_path, overrides, error, said):
    assert said
    with pytest.raises(error, match=said):
        train(load(files, *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_gone_on_with_otherwise(files, reference, tmp_path):
    run, _ = reference
    for override, said in (
        ("optimizer.peak_lr=0.02", r"optimizer\.peak_lr \(0\.01 -> 0\.02\)"),
        ("phases.0.steps=9", "phases"),
        ("run.seed=1", r"run\.seed"),
        ("model.fields.n_layer=1", r"model\.fields\.n_layer"),
    ):
        with pytest.raises(ValueError, match=said):
            train(load(files, override), run)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="is not a run"):
        train(load(files), tmp_path / "home")


def test_changed_data_is_noticed(files, reference, tmp_path):
    write_tokens(tmp_path / "other", np.arange(3000) % 61, vocab_size=61, eos_id=0)
    with pytest.raises(ValueError, match="data_fingerprint"):
        train(load(files, f"data.train={tmp_path / 'other'}"), reference[0])


def test_profile(files, tmp_path):
    train(load(files, "phases.0.steps=3", "run.eval_every=0"), tmp_path / "run", (2, 3))
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))


def test_start_from_a_checkpoint(files, reference, tmp_path):
    """Fine-tuning begins with the weights of another run, from both formats."""
    run, _ = reference
    export(run, tmp_path / "hf")
    for source in (run / "checkpoints/12", tmp_path / "hf"):
        text = files.read_text().replace('preset = "tiny"', f'checkpoint = "{source}"')
        text = text.split("[model.fields]")[0] + text[text.index("[[phases]]") :]
        file = tmp_path / f"{source.name}.toml"
        file.write_text(text)
        train(recipe_file.load_recipe(file), tmp_path / f"run-{source.name}")
        assert losses(tmp_path / f"run-{source.name}")[1] < losses(run)[1] - 0.1


def test_tokens_of_another_tokenizer_are_refused(files, reference, tmp_path):
    """The same number of tokens in another order, which no loss would tell at once."""
    run = copy_of(reference[0], tmp_path / "run")
    path = run / "tokenizer/tokenizer.json"
    tokens = json.loads(path.read_text())
    vocab = tokens["model"]["vocab"]
    vocab["0"], vocab["1"] = vocab["1"], vocab["0"]
    path.write_text(json.dumps(tokens))
    file = tmp_path / "other.toml"
    rest = files.read_text()
    file.write_text(f'[model]\ncheckpoint = "{run}"\n{rest[rest.index("[[phases]]") :]}')
    with pytest.raises(ValueError, match=r"another tokenizer than that of .*--tokenizer .*run"):
        train(load(file), tmp_path / "next")


def test_stored_slopes_are_trained_with(files, tmp_path, monkeypatch):
    """Those of the released model lost bits in bf16: no format of it may lead to the exact ones."""
    case = golden.load("g_bf16")
    hf = golden.write_hf(tmp_path / "hf", case)
    convert(hf, tmp_path / "orbax")
    monkeypatch.setattr(hf_source, "fetch_from_hub", lambda name, *_: {"org/name": hf}[name])
    text = files.read_text()
    rest = text[text.rindex("[[phases]]") :]
    found = []
    for i, source in enumerate((tmp_path / "orbax", hf, "org/name")):
        file, run = tmp_path / f"{i}.toml", tmp_path / f"run-{i}"
        file.write_text(f'[model]\ncheckpoint = "{source}"\n{rest}')
        train(load(file, "phases.0.steps=2"), run)
        assert metadata.read_metadata(run).config == case.config, source
        found.append(losses(run))
    assert len(found[0]) == 2 and found[0] == found[1] == found[2]


def test_training_checkpoints_are_checkpoints(reference):
    meta = metadata.read_metadata(reference[0])
    assert meta.ocdbt and meta.origin["step"] == 12
    assert json.loads(json.dumps(meta.origin))["recipe"]["phases"][0]["steps"] == 8


def test_a_disk_that_is_too_small_is_noticed_before_the_first_step(files, tmp_path, monkeypatch):
    """Steps 3, 6, 9, 12, two of them kept: three at once must fit."""
    r = load(files)
    model = btlm.BTLM(build_config(r))
    params = model.init(jax.random.key(0), mesh=btlm.make_mesh())
    size = 3 * sum(x.nbytes for x in jax.tree.leaves(params))  # with Adam's moments, and counters
    usage = types.SimpleNamespace(free=3 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(OSError, match=r"no space for .*checkpoints: .* are to be written"):
        train(r, tmp_path / "run")
    assert not read_metrics(tmp_path / "run/metrics.jsonl")
    usage.free = 3 * size + 1000
    assert train(r, tmp_path / "run").finished


def test_keep_every(tmp_path, files):
    train(load(files, "run.checkpoint_every=2", "run.keep_every=4", "run.keep_last=1"),
          tmp_path / "run")  # fmt: skip
    keeper = Checkpoints(tmp_path / "run/checkpoints", keep_last=1, keep_every=4)
    assert keeper.steps() == [4, 8, 12]
    keeper.close()
