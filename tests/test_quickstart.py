"""The quickstart, its text, and one training step."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import cases
import jax
import numpy as np
import pytest
from btlm_jax.train import manual, plots, quickstart
from btlm_jax.train.step import init_state, make_step

from btlm_jax import BTLM, BTLMConfig, cli, make_mesh, mup


def test_text_is_split_without_overlap():
    text = manual.manual()
    assert sum(map(len, text.train)) > 200_000 and sum(map(len, text.held_out)) > 10_000
    paragraphs = [{p for doc in docs for p in doc.strip().split("\n\n")} for docs in text]
    assert not paragraphs[0] & paragraphs[1]
    everything = [p for doc in text.train for p in doc.strip().split("\n\n")]
    assert len(everything) == len(set(everything))


def test_tokenizer_and_encoding():
    docs = ["The with statement.\n", 'A "class" — definition.\n']
    tokenizer = manual.train_tokenizer(manual.manual().train[:5], 512)
    ids = manual.encode(tokenizer, docs)
    end = tokenizer.token_to_id("<|endoftext|>")
    assert end == 0 and ids.dtype == np.int32 and (ids == end).sum() == 2 and ids[-1] == end
    first = list(ids[: np.argmax(ids == end)])
    assert tokenizer.decode(first) == docs[0]


def test_training_batches_cover_the_text():
    tokens = np.arange(1000, dtype=np.int32)
    batches = manual.training_batches(tokens, 4, 11, seed=0)
    seen = np.zeros(1000, int)
    for _ in range(24):  # 96 windows: about one epoch
        batch = next(batches)
        assert batch.shape == (4, 11) and np.all(np.diff(batch) == 1)
        seen[batch[:, 1:]] += 1
    assert (seen > 0).mean() > 0.9 and seen.max() <= 2
    again = manual.training_batches(tokens, 4, 11, seed=0)
    np.testing.assert_array_equal(next(again), next(manual.training_batches(tokens, 4, 11, seed=0)))


def test_evaluation_batches_predict_every_token_once():
    tokens = np.arange(57, dtype=np.int32)
    counts = np.zeros(57, int)
    for _, labels in manual.evaluation_batches(tokens, 4, 11, -100):
        targets = labels[:, 1:]
        np.add.at(counts, targets[targets != -100], 1)
    assert counts[0] == 0 and np.all(counts[1:] == 1)


def test_unigram_entropy():
    assert manual.unigram_entropy(np.array([1, 1, 2, 2])) == pytest.approx(np.log(2))


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
            losses.append(float(metrics.loss))
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
from btlm_jax.train import quickstart
recipe = quickstart.Recipe(width=128, layers=1, vocab_size=512, length=64, steps=12)
quickstart.train(Path(sys.argv[1]), recipe=recipe._replace(warmup=2, evaluate_every=6))
"""


def test_small_run_end_to_end(tmp_path):
    """In a process of its own, as the command runs: virtual devices and all."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", SMALL, str(tmp_path / "q")], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    for text in (
        "mesh of 4 cpu devices (fsdp 2, tensor 2)",
        "unigram entropy",
        "held-out loss",
        "every weight bit-equal",
        "[sampled]",
        "next: btlm generate",
    ):
        assert text in done.stdout
    rows = [json.loads(x) for x in (tmp_path / "q/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert rows[-1]["held_out_loss"] < rows[5]["held_out_loss"] < np.log(512) + 1
    assert (tmp_path / "q/loss.png").read_bytes().startswith(b"\x89PNG")
    for name in ("checkpoint", "hf", "converted"):
        assert (tmp_path / "q" / name).is_dir()


def test_steps_must_be_positive(capsys, tmp_path):
    assert cli.main(["quickstart", str(tmp_path / "q"), "--steps", "0"]) == 2
    assert "steps: found 0, expected at least 1" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_from_hf(tmp_path):
    """In a process of its own, without devices set up for it."""
    source = cases.write_hf(tmp_path / "hf", cases.load("i_untied"), tokenizer=True)
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "btlm_jax.cli", "quickstart", str(tmp_path / "q")]
    done = subprocess.run([*command, "--hf", str(source)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert ": 32 tensors (32 float32)" in out and "[greedy]" in out and "next: btlm generate" in out
