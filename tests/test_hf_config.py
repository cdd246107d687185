"""config.json: every flavor read, round trips, refusals by name, and what an export writes."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btlm_jax import BTLMConfig, hf_config
from btlm_jax.config import PRESETS
from support import golden

LEGACY = json.loads((golden.GOLDEN / "legacy_configs.json").read_text())
FLAVORS = [k for k in LEGACY if not k.startswith("_")]


def released(**changes) -> dict:
    return BTLMConfig.preset("btlm-3b-8k").to_hf() | changes


@pytest.mark.parametrize("name", FLAVORS)
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


def test_class_defaults_are_the_originals():
    c = BTLMConfig.from_hf({})
    assert (c.n_embd, c.n_layer, c.n_head, c.n_inner) == (768, 12, 12, 3072)
    assert (c.activation_function, c.position_embedding_type) == ("gelu_new", "learned")
    assert c.tie_word_embeddings and c.resid_pdrop == 0.1 and c.logits_scale == 1.0
    with pytest.raises(ValueError, match=r"dropout is not implemented.*resid_pdrop=0\.0"):
        c.require_no_dropout()


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
        ({"eos_token_id": -2}, "eos_token_id: found -2"),
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
    for text, message in (("{", "not valid JSON"), ("[]", "found a JSON array")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            BTLMConfig.from_hf(path)


def test_no_config_json_holds_completep():
    """The original code would ignore it, so none is written and none is read."""
    c = dataclasses.replace(BTLMConfig.preset("tiny"), completep_base_layers=1)
    with pytest.raises(ValueError, match=r"completep_base_layers: found 1;[\s\S]*fold_completep"):
        c.to_hf()
    assert not [key for key in released() if "completep" in key]
    with pytest.raises(ValueError, match="completep_base_layers: found 4, expected no such key"):
        BTLMConfig.from_hf(released(completep_base_layers=4))


def in_flavor(name: str) -> dict:
    """Returns a whole config.json whose muP keys are those of one flavor."""
    base = {k: v for k, v in released().items() if not k.startswith("mup_")}
    return base | {"n_head": 32} | LEGACY[name]["raw"]


JULY, JAIS_13B = "btlm_19c3116_21Jul2023", "jais_13b"


@pytest.mark.parametrize("name", [JULY, JAIS_13B])
def test_an_export_without_changes_returns_the_original_file(name):
    raw = in_flavor(name) | {"torch_dtype": "bfloat16", "unknown": [1]}
    config = BTLMConfig.from_hf(raw)
    assert hf_config.export_config_json(config, ["bfloat16"], raw, ["bfloat16"]) == raw
    written = hf_config.export_config_json(config, ["float32"], raw, ["bfloat16"])
    assert written == raw | {"torch_dtype": "float32"}


@pytest.mark.parametrize("name", [JULY, JAIS_13B])
def test_changes_are_written_in_the_flavor_of_the_source(name):
    raw = in_flavor(name)
    config = BTLMConfig.from_hf(raw)
    config = dataclasses.replace(
        config, n_positions=16384, mup_embeddings_scale=7.0, mup_output_alpha=2.0
    )
    written = hf_config.export_config_json(config, ["float32"], raw)
    assert written.keys() == raw.keys() and BTLMConfig.from_hf(written) == config


def test_a_change_that_the_flavor_cannot_express_is_written_with_released_keys(caplog):
    raw = in_flavor(JAIS_13B)
    config = dataclasses.replace(BTLMConfig.from_hf(raw), mup_width_scale=0.5)
    with caplog.at_level(logging.WARNING):
        written = hf_config.export_config_json(config, ["bfloat16", "float32"], raw)
    assert "those of the source cannot express" in caplog.text
    assert written == config.to_hf() | {"torch_dtype": "float32"}


def test_generation_config_has_the_special_tokens_that_are_set():
    config = dataclasses.replace(BTLMConfig.preset("tiny"), pad_token_id=3, bos_token_id=None)
    expected = {"_from_model_config": True, "eos_token_id": 0, "pad_token_id": 3}
    assert hf_config.generation_config_json(config) == expected


def test_the_public_cerebras_gpt_models_are_gpt2s():
    raw = {
        "model_type": "gpt2",
        "architectures": ["GPT2Model"],
        "activation_function": "gelu",
        "n_positions": 2048,
    }
    sizes = {"n_embd": 768, "n_head": 12, "n_inner": 3072, "n_layer": 10, "vocab_size": 50257}
    c = BTLMConfig.from_hf(raw | sizes)
    assert (c.activation_function, c.position_embedding_type) == ("gelu", "learned")
    assert c.logits_scale == c.mup_embeddings_scale == 1.0 and c.tie_word_embeddings


def test_values_are_read_as_other_tools_write_them():
    plain = BTLMConfig.from_hf(released())
    written = released(n_embd=2560.0, tie_word_embeddings="true", pad_token_id=-1, n_inner=6826.0)
    assert BTLMConfig.from_hf(written | {"dtype": "bfloat16", "rope_parameters": None}) == plain
    renamed = {k: v for k, v in released().items() if k != "n_layer"}
    assert BTLMConfig.from_hf(renamed | {"num_hidden_layers": 32}) == plain
    assert BTLMConfig.from_hf({"model_type": "llava", "text_config": released()}) == plain
    with pytest.raises(ValueError, match="n_layer = 32 and num_hidden_layers = 3"):
        BTLMConfig.from_hf(released(num_hidden_layers=3))
    several = BTLMConfig.from_hf(released(eos_token_id=[50256, 5, 50256]))
    assert several.eos_token_id == (50256, 5)
    assert BTLMConfig.from_hf(json.loads(json.dumps(several.to_hf()))) == several
    assert BTLMConfig.from_hf(released(eos_token_id=[50256])) == plain
