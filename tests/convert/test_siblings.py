"""Tiny siblings of BTLM are converted, compared with the NumPy reference, and exported unchanged.

The reference knows only the muP keys of the released model; `released_mup` translates those of
every flavor by hand. The siblings cover learned, ALiBi and scaled positions, GELU and SwiGLU, head
counts that are not a power of two, tied and untied heads, fp32, fp16 and bf16.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import btlm_jax as btlm
from btlm_jax.convert import convert, export, load_hf, verify
from btlm_jax.convert.hf.source import open_hf
from btlm_jax.model import weights
from support import golden
from support import reference_numpy as ref

MASK_SUFFIXES = (".attn.bias", ".attn.masked_bias")
LM_HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
SIZES: dict[str, Any] = dict(
    vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4, n_inner=85,
    activation_function="swiglu", position_embedding_type="alibi", layer_norm_epsilon=1e-5,
    initializer_range=0.073, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    scale_attn_weights=True, bos_token_id=60, eos_token_id=60, use_cache=True,
)  # fmt: skip
JAIS: dict[str, Any] = {
    "model_type": "jais",
    "architectures": ["JAISLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_jais.JAISConfig",
        "AutoModelForCausalLM": "modeling_jais.JAISLMHeadModel",
    },
    "pad_token_id": 0,
}


@dataclasses.dataclass(frozen=True)
class Sibling:
    """A tiny model of one flavor.

    Attributes:
      raw: its config.json.
      released_mup: its muP values under the keys of the released flavor, for the reference.
      dtype: dtype of its weights.
      slopes: dtype of the stored slopes; None if it stores none.
      head: whether it stores the tied head as well.
      buffers: whether it stores the causal masks of old files.
    """

    raw: dict[str, Any]
    released_mup: dict[str, Any]
    dtype: Any = np.float32
    slopes: Any = np.float32
    head: bool = False
    buffers: bool = False


SIBLINGS = {
    "Cerebras-GPT muP": Sibling(
        SIZES | {
            "model_type": "btlm", "activation_function": "gelu", "n_inner": 128,
            "position_embedding_type": "learned", "mup_embeddings_scale": 10,
            "mup_output_alpha": 1.0, "mup_width_scale": 0.125, "mup_scale_qk_dot_by_d": True,
        },
        {}, slopes=None, head=True, buffers=True,
    ),
    "BTLM of July 2023": Sibling(
        SIZES | {
            "model_type": "btlm", "embeddings_scale": 14.6, "width_scale": 0.1,
            "output_logits_scale": 0.22200000000000003, "scale_qk_dot_by_d": True,
            "torch_dtype": "bfloat16",
        },
        {
            "mup_embeddings_scale": 14.6, "mup_scale_qk_dot_by_d": True,
            "mup_output_alpha": 0.22200000000000003, "mup_width_scale": 1.0,
        },
        dtype=ml_dtypes.bfloat16, slopes=None, head=True,
    ),
    "BTLM chat": Sibling(
        SIZES | {
            "model_type": "btlm", "alibi_scaling": None, "mup_embeddings_scale": 14.6,
            "mup_output_alpha": 2.2200000000000003, "mup_width_scale": 0.1,
            "mup_scale_qk_dot_by_d": True,
        },
        {}, dtype=ml_dtypes.bfloat16, slopes=ml_dtypes.bfloat16, head=True, buffers=True,
    ),
    "Jais-13b": Sibling(
        SIZES | JAIS | {
            "embeddings_scale": 14.6, "width_scale": 0.11100000000000002,
            "scale_qk_dot_by_d": True,
        },
        {
            "mup_embeddings_scale": 14.6, "mup_scale_qk_dot_by_d": True,
            "mup_output_alpha": 0.11100000000000002, "mup_width_scale": 1.0,
        },
        head=True,
    ),
    "Jais-30b": Sibling(
        SIZES | JAIS | {
            "n_embd": 42, "n_head": 7, "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.22,
            "mup_width_scale": 0.03571428571428571, "mup_scale_qk_dot_by_d": True,
            "tie_word_embeddings": False,
        },
        {}, slopes=ml_dtypes.bfloat16, head=True,
    ),
    "Jais family": Sibling(
        SIZES | JAIS | {
            "n_embd": 34, "n_head": 17, "n_inner": 91, "rotary_dim": None,
            "alibi_scaling": {"type": "linear", "train_seq_len": 16},
            "mup_embeddings_scale": 9.1705785388303, "mup_output_alpha": 1.09518349815769,
            "mup_width_scale": 0.23529411764705882, "mup_scale_qk_dot_by_d": True,
        },
        {}, dtype=np.float16,
    ),
}  # fmt: skip


def tensors(sibling: Sibling) -> dict[str, np.ndarray]:
    """Returns random weights and the other tensors of such a file."""
    config, rng = btlm.BTLMConfig.from_hf(sibling.raw), np.random.default_rng(7)
    out = {}
    for leaf in weights.disk_leaves(config):
        w = leaf.weight
        value = w.mean + 0.1 * rng.standard_normal(w.hf_shape)
        out[leaf.hf_name] = value.astype(sibling.dtype)
    if sibling.head and config.tie_word_embeddings:
        out[LM_HEAD] = out[EMBEDDING].copy()
    if sibling.slopes is not None:
        exact = ref.alibi_slopes(config.n_head)[:, None]
        out[golden.SLOPES] = exact.astype(sibling.slopes)
    if sibling.buffers:
        n = config.n_positions
        for i in range(config.n_layer):
            mask = np.tril(np.ones((n, n), np.uint8))[None, None]
            out[f"transformer.h.{i}.attn.bias"] = mask if i else mask.astype(bool)
            out[f"transformer.h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    return out


def write(path: Path, raw: dict[str, Any], named: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    save_file(named, path / "model.safetensors")
    return path


@pytest.fixture(params=SIBLINGS)
def sibling(request) -> Sibling:
    return SIBLINGS[request.param]


def exported_tensors(sibling: Sibling, named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors of an export, without masks and without a copy of a tied head."""
    tied = sibling.raw.get("tie_word_embeddings", True)
    return {
        n: x
        for n, x in named.items()
        if not n.endswith(MASK_SUFFIXES) and not (tied and n == LM_HEAD)
    }


def test_a_sibling_converts_computes_and_exports_exactly(sibling, tmp_path, caplog):
    named = tensors(sibling)
    source = write(tmp_path / "hf", sibling.raw, named)
    with caplog.at_level("INFO"):
        convert(source, tmp_path / "c")
    masks = sorted(n for n in named if n.endswith(MASK_SUFFIXES))
    assert bool(masks) == sibling.buffers
    assert not masks or f"ignored mask buffers: {', '.join(masks)}" in caplog.text
    assert sibling.buffers or "ignored" not in caplog.text
    assert verify(source, tmp_path / "c") and verify(tmp_path / "c")

    # The logits of 24 tokens, more than "Jais family" was trained on, equal the reference.
    ids = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, 24))
    expected = ref.forward(named, sibling.raw | sibling.released_mup, ids)["logits"]
    model, params = btlm.load(tmp_path / "c", dtype=jnp.float32)
    model = dataclasses.replace(model, compute_dtype=jnp.float32)
    logits = model.apply(params, ids)
    assert np.abs(expected).max() > 0.1  # measured 0.16 to 0.98
    assert golden.max_error(logits, expected) < 3e-6  # measured 2.9e-7

    # Loading directly gives the same.
    direct, same = load_hf(source, dtype=jnp.float32)
    assert direct.config == model.config
    jax.tree.map(np.testing.assert_array_equal, same, params)

    export(tmp_path / "c", tmp_path / "back")
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert back == sibling.raw and list(back) == list(sibling.raw)
    exported = open_hf(tmp_path / "back")
    written = {n: exported.read_tensor(n) for n in exported.tensors}
    if sibling.slopes is None and sibling.raw["position_embedding_type"] == "alibi":
        # Exact slopes are added: 4 heads have 2**-2, 2**-4, ...
        assert (written.pop(golden.SLOPES) == ref.alibi_slopes(4)[:, None]).all()
    original = exported_tensors(sibling, named)
    assert set(written) == set(original)
    for name, x in original.items():
        assert (written[name].dtype, written[name].shape) == (x.dtype, x.shape), name
        assert written[name].tobytes() == x.tobytes(), name


def test_the_reference_distinguishes_the_flavors(tmp_path):
    """The muP values of one flavor are wrong for another."""
    july, jais = SIBLINGS["BTLM of July 2023"], SIBLINGS["Jais-13b"]
    named, ids = tensors(jais), np.arange(12)[None]
    right = ref.forward(named, jais.raw | jais.released_mup, ids)["logits"]
    assert (
        golden.max_error(right, ref.forward(named, jais.raw | july.released_mup, ids)["logits"])
        > 0.1
    )
    unscaled = jais.released_mup | {"mup_scale_qk_dot_by_d": False}
    assert golden.max_error(right, ref.forward(named, jais.raw | unscaled, ids)["logits"]) > 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.0.attn.rotary_emb.inv_freq",
        "transformer.h.0.attn.bias2",
        "transformer.h.x.attn.bias",
        "transformer.h.0.mlp.bias",
        "transformer.h.2.ln_1.weight",
        "transformer.wpe.weight",
        "lm_head.bias",
        "score.weight",
    ],
)
def test_unknown_tensors_are_refused_by_name(name, tmp_path):
    chat = SIBLINGS["BTLM chat"]
    named = tensors(chat) | {name: np.ones(4, np.float32)}
    source = write(tmp_path / "hf", chat.raw, named)
    for call in (lambda: convert(source, tmp_path / "c"), lambda: load_hf(source)):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).splitlines()[1:] == [f"  unexpected: {name}"]
        assert str(source) in str(error.value)
    assert os.listdir(tmp_path) == ["hf"]


def test_slopes_with_learned_positions_are_refused(tmp_path):
    gpt = SIBLINGS["Cerebras-GPT muP"]
    named = tensors(gpt) | {golden.SLOPES: np.ones((4, 1), np.float32)}
    with pytest.raises(ValueError, match=f"unexpected: {golden.SLOPES}"):
        convert(write(tmp_path / "hf", gpt.raw, named), tmp_path / "c")


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"model_type": "crystalcoder", "rotary_dim": 8, "position_embedding_type": "rotary"},
            "model_type: found 'crystalcoder', expected one of btlm, jais",
        ),
        ({"rotary_dim": 8}, r"rotary positions \(Crystal\) are not supported"),
        ({"position_embedding_type": "rotary"}, r"rotary positions \(Crystal\) are not supported"),
        ({"model_type": "crystalcoder"}, "model_type: found 'crystalcoder'"),
    ],
)
def test_crystal_is_refused(changes, said, tmp_path):
    chat = SIBLINGS["BTLM chat"]
    source = write(tmp_path / "hf", chat.raw | changes, tensors(chat))
    for call in (lambda: convert(source, tmp_path / "c"), lambda: load_hf(source)):
        with pytest.raises(ValueError, match=said) as error:
            call()
        assert "rotary_dim" not in changes or "rotary_dim=8" in str(error.value)
    assert os.listdir(tmp_path) == ["hf"]
