"""Positions: defaults, counts of valid tokens, and the lengths that a model can read."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from btlm_jax.config import BTLMConfig
from btlm_jax.model import positions
from btlm_jax.model.btlm import BTLM

LEARNED = BTLMConfig(
    vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2, activation_function="gelu_new",
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
ALIBI = BTLMConfig.preset("tiny")


def test_positions_count_valid_tokens_and_stay_in_range_at_padding():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    counted = positions.count_positions(LEARNED, mask, np.array([[2], [6]]))
    assert np.array_equal(counted, [[1, 1, 2, 3, 4], [6, 7, 7, 7, 7]])
    assert positions.count_positions(ALIBI, mask) is None


def test_padding_at_the_end_may_exceed_the_learned_positions():
    model = BTLM(LEARNED)
    params = model.init(jax.random.key(0))
    ids = np.arange(1, 9)[None]
    padded = np.pad(ids, ((0, 0), (0, 8)))
    expected = model.apply(params, ids)
    assert np.allclose(model.apply(params, padded, length=8)[:, :8], expected, atol=1e-6)
    with pytest.raises(ValueError, match="9 tokens exceed n_positions = 8"):
        model.apply(params, padded, length=9)


def test_a_length_beyond_learned_positions_is_an_error_and_beyond_the_trained_context_a_warning(
    caplog,
):
    with pytest.raises(ValueError, match=r"9 tokens exceed the 8 learned positions .*: cut"):
        positions.check_length(LEARNED, 9, "windows", "cut them")
    positions.check_length(LEARNED, 8, "windows", "cut them")
    positions.check_length(ALIBI, ALIBI.n_positions, "windows", "cut them")
    assert not caplog.records
    positions.check_length(ALIBI, ALIBI.n_positions + 1, "windows", "cut them")
    assert "quality degrades" in caplog.text
    assert LEARNED.position_limit == 8 and ALIBI.position_limit is None
