"""An exported config.json has the key flavor of its source."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import btlm_jax as btlm
from btlm_jax import AlibiScaling, BTLMConfig
from btlm_jax.checkpoint import metadata
from btlm_jax.config import Positions
from btlm_jax.convert import convert, export
from btlm_jax.model import alibi, weights
from btlm_jax.model.params import unflatten_tree
from support import golden
from support.safetensors_files import assert_same_bits, read_json

BF16 = golden.load("g_bf16")


FLAVORS = {k: v for k, v in read_json(golden.GOLDEN / "legacy_configs.json").items() if k[0] != "_"}


SIZES = dict(n_embd=32, n_head=2, n_inner=40, n_layer=1, n_positions=64, vocab_size=61)


def flavor(name: str) -> dict:
    """Returns a tiny config.json with the keys of a published model, some only for transformers."""
    common = dict(
        architectures=["BTLMLMHeadModel"],
        model_type="jais" if name.startswith("jais") else "btlm",
        activation_function="swiglu",
        position_embedding_type="alibi",
        layer_norm_epsilon=1e-05,
        initializer_range=0.073,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=60,
        eos_token_id=60,
        torch_dtype="float32",
        transformers_version="4.30.0",
        use_cache=True,
        reorder_and_upcast_attn=False,
    )
    return common | FLAVORS[name]["raw"] | SIZES


def write_flavor(path: Path, raw: dict) -> dict[str, np.ndarray]:
    """Writes a random model with this config.json. Returns its tensors."""
    config, rng = BTLMConfig.from_hf(raw), np.random.default_rng(0)
    tensors = {
        leaf.hf_name: rng.standard_normal(leaf.weight.hf_shape, np.float32)
        for leaf in weights.disk_leaves(config)
    }
    if config.positions is Positions.ALIBI:
        tensors[golden.SLOPES] = alibi.slopes(config.n_head).astype(np.float32)[:, None]
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    save_file(tensors, path / "model.safetensors")
    return tensors


def save_changed(checkpoint: Path, target: Path, **changes) -> BTLMConfig:
    """Saves a checkpoint with a changed configuration, as training would. Returns it."""
    meta = metadata.read_metadata(checkpoint)
    config = dataclasses.replace(meta.config, **changes)
    leaves = {
        leaf.weight.path: np.concatenate(list(meta.blocks(leaf))).reshape(leaf.weight.shape)
        for leaf in weights.disk_leaves(meta.config)
    }
    stacked = {p: x[None] if p[0] == "blocks" else x for p, x in leaves.items()}
    btlm.save(target, config, unflatten_tree(stacked), origin=meta.origin)
    return config


def has_old_keys(raw: dict) -> bool:
    return "width_scale" in raw


@pytest.mark.parametrize("name", FLAVORS)
def test_an_unchanged_config_is_exported_verbatim(name, tmp_path, package_log):
    raw = flavor(name)
    tensors = write_flavor(tmp_path / "hf", raw)
    convert(tmp_path / "hf", tmp_path / "c")
    export(tmp_path / "c", tmp_path / "back")
    written = read_json(tmp_path / "back/config.json")
    assert written == raw and list(written) == list(raw)  # in its order too
    assert_same_bits(load_file(tmp_path / "back/model.safetensors"), tensors)
    assert "cannot express" not in package_log.text
    # Saving it again does not change it.
    save_changed(tmp_path / "c", tmp_path / "c2")
    export(tmp_path / "c2", tmp_path / "back2")
    assert read_json(tmp_path / "back2/config.json") == raw


CHANGES = [
    {"alibi_scaling": AlibiScaling(factor=4.0)},
    {"alibi_scaling": AlibiScaling(train_seq_len=32)},
    {"mup_embeddings_scale": 12.5},
    {"mup_scale_qk_dot_by_d": False, "layer_norm_epsilon": 1e-6},
    {"mup_output_alpha": 1.75},
]


@pytest.mark.parametrize(
    "name, changes",
    [
        (name, changes)
        for name in FLAVORS
        for changes in CHANGES
        if flavor(name)["position_embedding_type"] == "alibi" or "alibi_scaling" not in changes
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_changes_are_written_with_the_keys_of_the_source(name, changes, tmp_path, package_log):
    raw = flavor(name)
    write_flavor(tmp_path / "hf", raw)
    convert(tmp_path / "hf", tmp_path / "c")
    config = save_changed(tmp_path / "c", tmp_path / "c2", **changes)
    export(tmp_path / "c2", tmp_path / "back")
    written = read_json(tmp_path / "back/config.json")
    assert BTLMConfig.from_hf(written) == dataclasses.replace(config, alibi_slopes=None)
    assert "cannot express" not in package_log.text
    assert not any(key.startswith("mup_") for key in written) or not has_old_keys(raw)
    assert has_old_keys(written) == has_old_keys(raw)
    assert ("output_logits_scale" in written) == ("output_logits_scale" in raw)
    # Other keys are unchanged, also those that only transformers uses.
    mup_keys = {"embeddings_scale", "output_logits_scale", "width_scale", "scale_qk_dot_by_d"}
    assert {k for k in raw if written[k] != raw[k]} <= {*changes, *mup_keys}
    assert set(written) - set(raw) <= {"alibi_scaling"}
    convert(tmp_path / "back", tmp_path / "c3")
    assert metadata.read_metadata(tmp_path / "c3").config == config


def test_a_change_that_the_keys_cannot_express_switches_to_released_keys(tmp_path, package_log):
    """The width scale of Jais-13b follows from n_embd; a warning is logged."""
    raw = flavor("jais_13b")
    write_flavor(tmp_path / "hf", raw)
    convert(tmp_path / "hf", tmp_path / "c")
    config = save_changed(tmp_path / "c", tmp_path / "c2", mup_width_scale=0.125)
    export(tmp_path / "c2", tmp_path / "back")
    (warning,) = [r for r in package_log.records if "cannot express" in r.getMessage()]
    assert warning.levelname == "WARNING" and "keys of the released BTLM" in warning.getMessage()
    written, plain = (
        read_json(tmp_path / "back/config.json"),
        dataclasses.replace(config, alibi_slopes=None),
    )
    assert written == plain.to_hf() | {"torch_dtype": "float32"}
    assert "width_scale" not in written and BTLMConfig.from_hf(written) == plain
    convert(tmp_path / "back", tmp_path / "c3")
    assert metadata.read_metadata(tmp_path / "c3").config == config


def test_changes_are_written_where_old_keys_lack_a_width_scale(tmp_path):
    """Such a config.json is read, so a changed one must read as changed."""
    raw = flavor("jais_13b")
    del raw["width_scale"]
    write_flavor(tmp_path / "hf", raw)
    convert(tmp_path / "hf", tmp_path / "c")
    config = save_changed(tmp_path / "c", tmp_path / "c2", mup_embeddings_scale=12.5)
    export(tmp_path / "c2", tmp_path / "back")
    written = BTLMConfig.from_hf(read_json(tmp_path / "back/config.json"))
    assert written == dataclasses.replace(config, alibi_slopes=None)


def test_torch_dtype_is_that_of_the_exported_weights(tmp_path):
    """A bf16 model trained further in fp32; transformers loads in the dtype of config.json."""
    convert(golden.write_hf(tmp_path / "hf", BF16), tmp_path / "c")
    meta = metadata.read_metadata(tmp_path / "c")
    assert BF16.hf_config["torch_dtype"] == "bfloat16" and BF16.params["wte"].dtype == np.float32
    btlm.save(tmp_path / "c2", meta.config, BF16.params, origin=meta.origin)
    export(tmp_path / "c2", tmp_path / "back")
    assert read_json(tmp_path / "back/config.json")["torch_dtype"] == "float32"
