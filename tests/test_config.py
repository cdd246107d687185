"""Configuration: flavors, round trips, and every refusal by name."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btlm_jax import AlibiScaling, BTLMConfig
from btlm_jax.config import PRESETS
from support import golden

LEGACY = json.loads((golden.GOLDEN / "legacy_configs.json").read_text())
FLAVOURS = [k for k in LEGACY if not k.startswith("_")]


def released(**changes) -> dict:
    return BTLMConfig.preset("btlm-3b-8k").to_hf() | changes


@pytest.mark.parametrize("name", FLAVOURS)
def test_flavors_of_the_siblings(name):
    raw, meaning = LEGACY[name]["raw"], LEGACY[name]["canonical"]
    base = {k: v for k, v in released().items() if not k.startswith("mup_")}
    if raw.get("position_embedding_type") == "learned":
        base["alibi_scaling"] = None
    c = BTLMConfig.from_hf(base | {"n_head": 32} | raw)
    assert c.mup_embeddings_scale == meaning["embeddings_scale"]
    assert c.mup_width_scale == meaning["width_scale"]
    assert c.mup_scale_qk_dot_by_d == meaning["qk_by_d"]
    # The July 2023 file spells the product out: it comes back to the last bit.
    exact = "output_logits_scale" in raw or "width_scale" in raw
    tolerance = 0 if exact else 1e-15
    assert c.logits_scale == pytest.approx(meaning["logits_scale"], rel=tolerance, abs=0)


@given(width=st.floats(1e-3, 1.0), logits=st.floats(1e-3, 10.0))
def test_output_logits_scale_survives(width, logits):
    c = BTLMConfig.from_hf({"width_scale": width, "output_logits_scale": logits})
    assert c.logits_scale == pytest.approx(logits, rel=3e-16, abs=0)


def test_released_model():
    c = BTLMConfig.preset("btlm-3b-8k")
    assert (c.n_embd, c.n_layer, c.n_head, c.head_dim, c.n_inner) == (2560, 32, 32, 80, 6826)
    assert c.attention_scale == 1 / 80
    assert c.logits_scale == 0.22200000000000003
    assert BTLMConfig.preset("btlm-40m").attention_scale == 1 / 64
    c.require_no_dropout()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name):
    c = BTLMConfig.preset(name)
    assert BTLMConfig.from_hf(json.loads(json.dumps(c.to_hf()))) == c


@pytest.mark.parametrize("name", golden.NAMES)
def test_golden_configs_round_trip(name, tmp_path):
    raw = golden.load(name).hf_config
    c = BTLMConfig.from_hf(raw)
    (tmp_path / "config.json").write_text(json.dumps(c.to_hf()))
    assert BTLMConfig.from_hf(tmp_path) == BTLMConfig.from_hf(tmp_path / "config.json") == c


def test_ladder_has_base_width_256():
    for name in ("btlm-40m", "btlm-130m", "btlm-450m", "btlm-1.7b", "btlm-3b-8k"):
        c = BTLMConfig.preset(name)
        assert c.mup_width_scale == 256 / c.n_embd
        assert c.n_inner == 8 * c.n_embd // 3
        assert c.n_layer == 32


def test_class_defaults_are_the_originals():
    c = BTLMConfig.from_hf({})
    assert (c.n_embd, c.n_layer, c.n_head, c.n_inner) == (768, 12, 12, 3072)
    assert (c.activation_function, c.position_embedding_type) == ("gelu_new", "learned")
    assert c.tie_word_embeddings and c.resid_pdrop == 0.1 and c.logits_scale == 1.0
    with pytest.raises(ValueError, match=r"dropout is not implemented.*resid_pdrop=0\.0"):
        c.require_no_dropout()


def test_attention_scale():
    c = BTLMConfig(n_embd=64, n_head=4)
    assert c.attention_scale == 0.25
    assert dataclasses.replace(c, mup_scale_qk_dot_by_d=True).attention_scale == 1 / 16
    assert dataclasses.replace(c, scale_attn_weights=False).attention_scale == 1.0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_embd": 2561}, "n_embd: found 2561, expected a multiple of n_head = 32"),
        ({"n_layer": 0}, "n_layer: found 0"),
        ({"vocab_size": "50257"}, "vocab_size: found '50257'"),
        ({"n_head": True}, "n_head: found True"),
        ({"activation_function": "relu"}, "activation_function: found 'relu', expected one of swi"),
        ({"position_embedding_type": "rope"}, "position_embedding_type: found 'rope'"),
        ({"position_embedding_type": "rotary"}, "rotary positions"),
        ({"rotary_dim": 32}, "rotary_dim=32"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: found True"),
        ({"model_type": "llama"}, "model_type: found 'llama', expected one of btlm, jais"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon: found 0"),
        ({"mup_width_scale": float("nan")}, "mup_width_scale: found nan"),
        ({"mup_scale_qk_dot_by_d": 1}, "mup_scale_qk_dot_by_d: found 1, expected true or false"),
        ({"resid_pdrop": 1.0}, "resid_pdrop: found 1.0"),
        ({"eos_token_id": -1}, "eos_token_id: found -1"),
        ({"embeddings_scale": 14.6}, "mixes two key flavors"),
        ({"width_scale": 0.1}, "mixes two key flavors"),
        ({"alibi_scaling": {"type": "linear"}}, "alibi_scaling"),
        ({"alibi_scaling": {"type": "linear", "factor": 4}}, r"alibi_scaling.factor: found 4,"),
        ({"alibi_scaling": {"type": "linear", "factor": 1.0}}, r"factor: found 1\.0"),
        ({"alibi_scaling": {"type": "dynamic", "factor": 4.0}}, "alibi_scaling"),
        ({"alibi_scaling": {"type": "linear", "train_seq_len": 1}}, "train_seq_len: found 1"),
        ({"alibi_scaling": {"type": "linear", "train_seq_len": 2.5}}, "train_seq_len: found 2.5"),
        ({"alibi_scaling": {"type": "linear", "base": 4.0}}, "found the entry 'base'"),
        (
            {"alibi_scaling": {"type": "linear", "factor": 4.0, "train_seq_len": 8}},
            "alibi_scaling: found",
        ),
        ({"alibi_scaling": 4.0}, "alibi_scaling: found 4.0"),
    ],
)
def test_refusals_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        BTLMConfig.from_hf(released(**changes))


def test_all_problems_are_listed():
    with pytest.raises(ValueError, match=r"n_layer[\s\S]*activation_function"):
        BTLMConfig.from_hf(released(n_layer=-1, activation_function="relu"))


def test_files_that_are_not_configurations(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        BTLMConfig.from_hf(tmp_path)
    path = tmp_path / "config.json"
    for text, message in (("{", "not valid JSON"), ("[]", "found a JSON list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            BTLMConfig.from_hf(path)


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


def test_no_config_json_holds_completep():
    """The original code would ignore it, so none is written and none is read."""
    c = dataclasses.replace(BTLMConfig.preset("tiny"), completep_base_layers=1)
    with pytest.raises(ValueError, match=r"completep_base_layers: found 1;[\s\S]*fold_completep"):
        c.to_hf()
    assert not [key for key in released() if "completep" in key]
    with pytest.raises(ValueError, match="completep_base_layers: found 4, expected no such key"):
        BTLMConfig.from_hf(released(completep_base_layers=4))


def test_scaling_and_slopes_belong_to_alibi():
    scaling = AlibiScaling(factor=4.0)
    with pytest.raises(ValueError, match="alibi_scaling"):
        BTLMConfig(alibi_scaling=scaling)
    with pytest.raises(ValueError, match="exactly one"):
        AlibiScaling(factor=4.0, train_seq_len=8)
    with pytest.raises(ValueError, match="alibi_slopes"):
        BTLMConfig(alibi_slopes=(0.5,))
