"""Fixtures of the evaluation tests."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from support import golden
from support.harness_tasks import write_tasks


class TrainedModel(NamedTuple):
    """A small model that has learned one page by heart.

    Attributes:
      folder: holds the checkpoint `run` and the text `page.txt`.
      model, params: the model and its weights.
      text: the page.
      loss: the last training loss, in nats per token.
    """

    folder: Path
    model: Any
    params: Any
    text: str
    loss: float


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> TrainedModel:
    """A model trained on a page of Python's reference, one token per character."""
    import jax

    from btlm_jax import BTLM, BTLMConfig, load_tokenizer, save
    from btlm_jax.data import sample_text
    from btlm_jax.model import mup
    from btlm_jax.train.step import init_state, make_step

    config = dataclasses.replace(
        BTLMConfig.preset("tiny"), vocab_size=96, n_positions=64, n_embd=128, n_head=2, n_inner=342,
        n_layer=1, mup_width_scale=0.5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("trained")
    golden.write_tokenizer(folder, config.vocab_size)
    text = " ".join(sample_text.read_sample_text()[:2000].split())
    ids = np.array(load_tokenizer(folder).encode(text).ids, np.int32)
    model, tx = BTLM(config), mup.adamw(1e-2, config)
    step, state = make_step(model, tx), init_state(model.init(jax.random.key(0)), tx)
    rng = np.random.default_rng(0)
    for _ in range(120):
        starts = rng.integers(0, len(ids) - 65, 8)
        state, metrics = step(state, np.stack([ids[s : s + 65] for s in starts])[None])
    save(folder / "run", config, state.params, assets=[folder / "tokenizer.json"])
    (folder / "page.txt").write_text(text)
    return TrainedModel(folder, model, state.params, text, float(metrics["loss"]))


@pytest.fixture
def refuse_to_load(monkeypatch) -> None:
    """Fails the test if an evaluation reads weights."""

    def load(*args, **options):
        pytest.fail("the weights were read")

    monkeypatch.setattr("btlm_jax.checkpoint.checkpoint.load", load)


@pytest.fixture
def lm_eval():
    """The harness; skips the test if it is not installed."""
    return pytest.importorskip("lm_eval")


@pytest.fixture
def only_local_tasks(lm_eval, monkeypatch) -> None:
    """Leaves out lm-eval's own 15,000 tasks, whose index takes seconds."""
    from lm_eval.tasks import TaskManager

    local = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", local)


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A folder with local tasks."""
    return write_tasks(tmp_path / "tasks")
