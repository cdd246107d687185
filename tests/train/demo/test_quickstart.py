"""The quickstart: its text, and every step end to end."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pydoc_data.topics import topics

import numpy as np
import pytest

from btlm_jax import cli
from btlm_jax.data import sample_text
from btlm_jax.train import preemption
from btlm_jax.train.demo import quickstart
from btlm_jax.train.metrics import read_metrics
from btlm_jax.utils import plots
from support import compiling, golden


def test_the_sample_text_has_every_paragraph_once():
    """So that the held-out end repeats nothing of the part to train on."""
    text = sample_text.read_sample_text()
    paragraphs = text.removesuffix("\n").split("\n\n")
    assert len(text) > 300_000 and len(paragraphs) == len(set(paragraphs)) > 1000
    pages = [page.strip() for page in topics.values()]
    assert set(paragraphs) == {p for page in pages for p in page.split("\n\n")}
    assert text.startswith(topics[min(topics)].strip().split("\n\n")[0])


def test_unigram_entropy_of_two_equal_tokens_is_log_2():
    assert quickstart.unigram_entropy(np.array([1, 1, 2, 2])) == pytest.approx(np.log(2))


def test_a_missing_matplotlib_is_named_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'btlm-jax\[plot\]'"):
        plots.require_matplotlib()
    with pytest.raises(ValueError, match="matplotlib"):
        quickstart.run_quickstart(tmp_path / "q")
    assert not (tmp_path / "q").exists()


SMALL = """
import sys
from pathlib import Path
from btlm_jax.train.demo import quickstart
sizes = ["vocab_size=512", "n_embd=128", "n_head=2", "n_inner=341", "n_layer=1"]
overrides = ["model.fields." + x for x in sizes]
overrides += ["model.fields.mup_width_scale=0.5", "phases.0.length=64", "run.eval_every=6"]
overrides += ["run.log_every=1"]
quickstart.run_quickstart(Path(sys.argv[1]), steps=12, seed=3, overrides=overrides)
"""


def test_a_small_run_works_end_to_end(tmp_path, capsys):
    """In a separate process, with the virtual devices of the command."""
    command = [sys.executable, "-c", SMALL, str(tmp_path / "q")]
    env = compiling.default_devices()
    done = subprocess.run(command, capture_output=True, text=True, env=env)
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
    # Only after the samples, which may contain anything.
    listed = re.findall(r"^  (\S+) ", done.stdout.rsplit("\nwritten to ", 1)[1], re.MULTILINE)
    assert {"text.txt", "run/", "hf/", "converted/"} < set(listed)
    assert all((tmp_path / "q" / name).exists() for name in listed)
    assert (tmp_path / "q/text.txt").read_text() == sample_text.read_sample_text()
    # On one device, although the run was sharded.
    (then,) = re.findall(r"^next: btlm (.*)$", done.stdout, re.MULTILINE)
    assert cli.main(shlex.split(then)) == 0
    assert capsys.readouterr().out.startswith("The statement")


def test_a_stopped_run_prints_how_to_resume(tmp_path, capsys, monkeypatch):
    sizes = ("n_embd=64", "n_head=1", "n_inner=8", "n_layer=1", "mup_width_scale=1.0")
    overrides = [f"model.fields.{x}" for x in sizes]
    monkeypatch.setattr(preemption.StopSignal, "requested", lambda self, step: step == 1)
    quickstart.run_quickstart(tmp_path / "it's", steps=2, overrides=overrides)
    out = capsys.readouterr().out
    assert "stopped after step 1; resume with: btlm train tiny" in out
    assert not (tmp_path / "it's/hf").exists()
    monkeypatch.undo()
    (then,) = re.findall(r"resume with: btlm (.*)$", out, re.MULTILINE)
    assert "mesh" not in then  # the number of devices may change
    assert cli.main(shlex.split(then)) == 0
    assert "step 2: loss" in capsys.readouterr().out


def test_the_number_of_steps_must_be_positive(capsys, tmp_path):
    assert cli.main(["quickstart", str(tmp_path / "q"), "--steps", "0"]) == 2
    assert "steps: found 0, expected at least 1" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_a_hugging_face_checkpoint_is_converted_and_generates(tmp_path):
    """In a separate process, without devices prepared for it."""
    source = golden.write_hf(tmp_path / "hf", golden.load("i_untied"), tokenizer=True)
    env = compiling.one_device()
    command = [sys.executable, "-m", "btlm_jax.cli", "quickstart", str(tmp_path / "q")]
    done = subprocess.run([*command, "--hf", str(source)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert ": 32 tensors (32 float32)" in out and "[greedy]" in out and "next: btlm generate" in out
