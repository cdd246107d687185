"""`verify` compares the logits of two models on request."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import btlm_jax as btlm
from btlm_jax import BTLMConfig
from btlm_jax.convert import convert, export, verify
from btlm_jax.model import weights
from btlm_jax.model.params import unflatten_tree
from support import golden
from support.checkpoint_forms import (
    NAME,
    differences,
    write_pair,
)


def test_logits_differ_where_weights_do(tmp_path):
    a, b = write_pair(tmp_path, lambda tensors: tensors[NAME].__setitem__((0, 0), 0.75))
    convert(a, tmp_path / "c")
    assert verify(a, tmp_path / "c", logits=True)
    found = differences(a, b, logits=True)
    assert set(found) == {NAME, "logits"}
    assert "max |difference| 0 of" not in found["logits"] and "of positions" in found["logits"]
    assert verify(tmp_path / "c", b, logits=True, atol=10.0)
    assert not differences(a, b).keys() & {"logits"}


def test_logits_can_differ_although_weights_are_within_the_tolerance(tmp_path):

    def change(tensors):
        for name, x in tensors.items():
            if name != golden.SLOPES:
                tensors[name] = x + np.float32(1e-3)

    a, b = write_pair(tmp_path, change)
    assert verify(a, b, atol=1.1e-3)
    assert list(differences(a, b, atol=1.1e-3, logits=True)) == ["logits"]


@pytest.fixture
def logits_calls(monkeypatch) -> list:
    """The sources whose logits were computed."""
    module, calls = sys.modules["btlm_jax.convert.verify"], []

    def logits(source, tokens):
        calls.append(source)
        return np.zeros((2, 3, 5))

    monkeypatch.setattr(module, "compute_logits", logits)
    return calls


def test_logits_of_different_configurations_are_not_compared(tmp_path, logits_calls):
    a, b = write_pair(tmp_path, lambda tensors: None, n_positions=64)
    assert list(differences(a, b, logits=True)) == ["config n_positions"] and not logits_calls
    assert verify(a, a, logits=True) and logits_calls == [a, a]


def test_logits_of_a_fresh_model_and_its_export(tmp_path, logits_calls):
    config = BTLMConfig.preset("tiny")
    shapes = {w.path: weights.stacked_shape(w, config) for w in weights.weight_table(config)}
    flat = {path: np.ones(shape, np.float32) for path, shape in shapes.items()}
    btlm.save(tmp_path / "c", config, unflatten_tree(flat))
    export(tmp_path / "c", tmp_path / "e")
    assert verify(tmp_path / "c", tmp_path / "e", logits=True)
    assert len(logits_calls) == 2


def test_nan_logits_of_one_model_are_a_difference(forms, monkeypatch):
    module, answers = sys.modules["btlm_jax.convert.verify"], [np.zeros((1, 2, 3)) for _ in "ab"]
    answers[1][0, 1, 2] = np.nan
    monkeypatch.setattr(module, "compute_logits", lambda source, tokens: answers.pop())
    assert not verify(forms["orbax"], forms["bin"], logits=True, atol=1.0)
