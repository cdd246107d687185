"""The quickstart, its text, and one training step."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest

from btlm_jax import BTLM, BTLMConfig, cli, make_mesh
from btlm_jax.data import sample_text
from btlm_jax.model import mup
from btlm_jax.train import preemption
from btlm_jax.train.demo import quickstart
from btlm_jax.train.metrics import read_metrics
from btlm_jax.train.step import init_state, make_step
from btlm_jax.utils import plots
from support import golden


def test_text_has_every_paragraph_once():
    """So that nothing of it is held out that was trained on, wherever it is cut."""
    text = sample_text.read_sample_text()
    paragraphs = text.removesuffix("\n").split("\n\n")
    assert len(text) > 300_000 and len(paragraphs) == len(set(paragraphs)) > 1000
    pages = [page.strip() for page in topics.values()]
    assert set(paragraphs) == {p for page in pages for p in page.split("\n\n")}
    assert text.startswith(topics[min(topics)].strip().split("\n\n")[0])


def test_unigram_entropy():
    assert quickstart.unigram_entropy(np.array([1, 1, 2, 2])) == pytest.approx(np.log(2))


def test_steps_agree_on_a_mesh():
    config = dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=97)
    model, tx = BTLM(config), mup.adamw(1e-2, config)
    step = make_step(model, tx)
    ids = np.random.default_rng(0).integers(0, 97, (8, 16))
    curves = []
    for mesh in (None, make_mesh(fsdp=4, tensor=2)):
        state = init_state(model.init(jax.random.key(0), mesh=mesh), tx)
        losses = []
        for _ in range(5):
            state, metrics = step(state, ids[None])
            losses.append(float(metrics["loss"]))
        curves.append(losses)
        adam = state.opt_state[1]
        for moment, param in zip(
            jax.tree.leaves(adam.mu), jax.tree.leaves(state.params), strict=True
        ):
            assert moment.sharding == param.sharding
    assert curves[0][-1] < curves[0][0] - 0.5
    # Adam divides small gradients by their size, so rounding grows a little with every step.
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


def test_dropout_is_refused():
    config = dataclasses.replace(BTLMConfig.preset("tiny"), attn_pdrop=0.1)
    with pytest.raises(ValueError, match="dropout is not implemented"):
        make_step(BTLM(config), mup.adamw(1e-2, config))


def test_missing_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'btlm-jax\[plot\]'"):
        plots.require_matplotlib()
    with pytest.raises(ValueError, match="matplotlib"):
        quickstart.train(tmp_path / "q")
    assert not (tmp_path / "q").exists()


SMALL = """
import sys
from pathlib import Path
from btlm_jax.train.demo import quickstart
sizes = ["vocab_size=512", "n_embd=128", "n_head=2", "n_inner=341", "n_layer=1"]
overrides = ["model.fields." + x for x in sizes]
overrides += ["model.fields.mup_width_scale=0.5", "phases.0.length=64", "run.eval_every=6"]
overrides += ["run.log_every=1"]
quickstart.train(Path(sys.argv[1]), steps=12, seed=3, overrides=overrides)
"""


def test_small_run_end_to_end(tmp_path, capsys):
    """In a process of its own, as the command runs: virtual devices and all."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", SMALL, str(tmp_path / "q")], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    for text in (
        "mesh of 4 cpu devices (fsdp 2, tensor 2)",
        "width 128 (muP base 64)",
        "unigram entropy",
        "held-out loss",
        "every weight bit-equal",
        "[sampled]",
        "next: btlm generate",
    ):
        assert text in done.stdout
    run = tmp_path / "q/run"
    rows = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 13))
    held_out = {r["step"]: r["held_out_loss"] for r in rows if "held_out_loss" in r}
    assert list(held_out) == [6, 12] and held_out[12] < held_out[6] < np.log(512) + 1
    assert f"held-out loss {held_out[12]:.3f} nats per token" in done.stdout
    assert json.loads((run / "recipe.json").read_text())["recipe"]["run"]["seed"] == 3
    assert (tmp_path / "q/loss.png").read_bytes().startswith(b"\x89PNG")
    # Only what follows the samples, which may look like anything.
    listed = re.findall(r"^  (\S+) ", done.stdout.rsplit("\nmade in ", 1)[1], re.MULTILINE)
    assert {"text.txt", "run/", "hf/", "converted/"} < set(listed)
    assert all((tmp_path / "q" / name).exists() for name in listed)
    assert (tmp_path / "q/text.txt").read_text() == sample_text.read_sample_text()
    # On one device, whatever the run was sharded over.
    (then,) = re.findall(r"^next: btlm (.*)$", done.stdout, re.MULTILINE)
    assert cli.main(shlex.split(then)) == 0
    assert capsys.readouterr().out.startswith("The statement")


def test_stopped_run_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    sizes = ("n_embd=64", "n_head=1", "n_inner=8", "n_layer=1", "mup_width_scale=1.0")
    overrides = [f"model.fields.{x}" for x in sizes]
    monkeypatch.setattr(preemption.StopSignal, "requested", lambda self, step: step == 1)
    quickstart.train(tmp_path / "it's", steps=2, overrides=overrides)
    out = capsys.readouterr().out
    assert "stopped after step 1; go on with: btlm train tiny" in out
    assert not (tmp_path / "it's/hf").exists()
    monkeypatch.undo()
    (then,) = re.findall(r"go on with: btlm (.*)$", out, re.MULTILINE)
    assert "mesh" not in then  # as many devices as there are then
    assert cli.main(shlex.split(then)) == 0
    assert "step 2: loss" in capsys.readouterr().out


def test_steps_must_be_positive(capsys, tmp_path):
    assert cli.main(["quickstart", str(tmp_path / "q"), "--steps", "0"]) == 2
    assert "steps: found 0, expected at least 1" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_from_hf(tmp_path):
    """In a process of its own, without devices set up for it."""
    source = golden.write_hf(tmp_path / "hf", golden.load("i_untied"), tokenizer=True)
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "btlm_jax.cli", "quickstart", str(tmp_path / "q")]
    done = subprocess.run([*command, "--hf", str(source)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert ": 32 tensors (32 float32)" in out and "[greedy]" in out and "next: btlm generate" in out
