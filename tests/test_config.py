"""BTLMConfig: derived quantities, presets, and the refusal of invalid fields."""

from __future__ import annotations

import dataclasses

import pytest

from btlm_jax import AlibiScaling, BTLMConfig


def test_released_model():
    c = BTLMConfig.preset("btlm-3b-8k")
    assert (c.n_embd, c.n_layer, c.n_head, c.head_dim, c.n_inner) == (2560, 32, 32, 80, 6826)
    assert c.attention_scale == 1 / 80
    assert c.logits_scale == 0.22200000000000003
    assert BTLMConfig.preset("btlm-40m").attention_scale == 1 / 64
    c.require_no_dropout()


def test_ladder_has_base_width_256():
    for name in ("btlm-40m", "btlm-130m", "btlm-450m", "btlm-1.7b", "btlm-3b-8k"):
        c = BTLMConfig.preset(name)
        assert c.mup_width_scale == 256 / c.n_embd
        assert c.n_inner == 8 * c.n_embd // 3
        assert c.n_layer == 32


def test_attention_scale():
    c = BTLMConfig(n_embd=64, n_head=4)
    assert c.attention_scale == 0.25
    assert dataclasses.replace(c, mup_scale_qk_dot_by_d=True).attention_scale == 1 / 16
    assert dataclasses.replace(c, scale_attn_weights=False).attention_scale == 1.0


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="unknown preset 'btlm-7b'; the presets are btlm-3b-8k"):
        BTLMConfig.preset("btlm-7b")


def test_residual_scale():
    c = BTLMConfig.preset("btlm-3b-8k")
    assert c.residual_scale == 1.0
    c = dataclasses.replace(c, completep_base_layers=2)
    assert c.residual_scale == 2 / 32
    assert dataclasses.replace(c, completep_alpha=0.5).residual_scale == 0.25
    assert dataclasses.replace(c, n_layer=1).residual_scale == 2.0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(completep_base_layers=0), "completep_base_layers: found 0, expected None or a posit"),
        (dict(completep_base_layers=2.0), r"completep_base_layers: found 2\.0"),
        (dict(completep_base_layers=True), "completep_base_layers: found True"),
        (dict(completep_base_layers=2, completep_alpha=0.4), r"completep_alpha: found 0\.4, expe"),
        (dict(completep_base_layers=2, completep_alpha="1"), "completep_alpha: found '1'"),
        (dict(completep_alpha=0.5), r"completep_alpha: found 0\.5, expected 1\.0 without"),
    ],
)
def test_bad_completep(changes, message):
    with pytest.raises(ValueError, match=message):
        BTLMConfig(**changes)


def test_scaling_and_slopes_belong_to_alibi():
    scaling = AlibiScaling(factor=4.0)
    with pytest.raises(ValueError, match="alibi_scaling"):
        BTLMConfig(alibi_scaling=scaling)
    with pytest.raises(ValueError, match="exactly one"):
        AlibiScaling(factor=4.0, train_seq_len=8)
    with pytest.raises(ValueError, match="alibi_slopes"):
        BTLMConfig(alibi_slopes=(0.5,))


@pytest.mark.parametrize("value, ids", [(None, ()), (5, (5,)), ((5, 6), (5, 6))])
def test_eos_token_ids_are_none_one_or_several(value, ids):
    assert dataclasses.replace(BTLMConfig.preset("tiny"), eos_token_id=value).eos_token_ids == ids
