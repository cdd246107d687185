"""Hugging Face `config.json` files: every flavor, read and written in this one place.

BTLM and its siblings spell the muP fields in different ways; `BTLMConfig` has one field for each
meaning, named as in the released model:

| meaning | released | BTLM of July 2023 | Jais-13b |
|---|---|---|---|
| factor on embeddings | mup_embeddings_scale | embeddings_scale | embeddings_scale |
| q·k divided by K | mup_scale_qk_dot_by_d | scale_qk_dot_by_d | scale_qk_dot_by_d |
| width scale | mup_width_scale | width_scale | 256 / n_embd |
| factor on logits | mup_output_alpha * mup_width_scale | output_logits_scale | width_scale |

Later Jais models and Cerebras-GPT with muP have the released keys; the Cerebras-GPT models with
`model_type` "gpt2" have none.

Absent keys leave their factors at 1, as in the original class.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from btlm_jax.config import AlibiScaling, BTLMConfig, is_int, is_number
from btlm_jax.hf_config_values import ALIASES, normalize_values
from btlm_jax.presets import MUP_BASE_WIDTH
from btlm_jax.utils.json_files import json_type
from btlm_jax.utils.local_paths import AnyPath, local_path

logger = logging.getLogger(__name__)

# The public Cerebras-GPT models are GPT-2s: learned positions, GELU, muP off.
MODEL_TYPES = ("btlm", "jais", "gpt2")
# The original modelling code, which the config.json of an export refers to.
_CODE = "cerebras/btlm-3b-8k-base--"
# Fields of BTLMConfig that no config.json has a key for.
_WITHOUT_KEY = ("alibi_slopes", "completep_base_layers", "completep_alpha")
# Names before the release and since.
_OLD_MUP_KEYS = {
    "embeddings_scale": "mup_embeddings_scale",
    "scale_qk_dot_by_d": "mup_scale_qk_dot_by_d",
}
# The presence of one of these marks a flavor from before the release.
_OLD_KEYS = {*_OLD_MUP_KEYS, "output_logits_scale", "width_scale"}


# Reading ------------------------------------------------------------------------------------------


def read_config_json(path: AnyPath) -> dict[str, Any]:
    """Reads a `config.json`, or the one in a directory, into a dict.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a JSON object; the message names the file and the position.
    """
    path = local_path(path, "source")
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a Hugging Face config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not valid JSON ({e}); download the file again") from e
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: found a JSON {json_type(raw)}, expected an object")
    return raw


def config_from_hf(raw: Mapping[str, Any]) -> BTLMConfig:
    """Returns the configuration that a parsed `config.json` of any flavor describes.

    Raises:
      ValueError: a field is invalid or not supported.
    """
    raw = normalize_values(raw)
    _check_supported(raw)
    names = [f.name for f in dataclasses.fields(BTLMConfig) if f.name not in _WITHOUT_KEY]
    values = {n: raw[n] for n in names if n in raw}
    values["alibi_scaling"] = alibi_scaling_from_hf(raw.get("alibi_scaling"))
    values.update(_mup_fields(raw))
    return BTLMConfig(**values)


def alibi_scaling_from_hf(value: Any) -> AlibiScaling | None:
    """Parses the `alibi_scaling` entry, by the rules of the original configuration; null is None.

    Raises:
      ValueError: not an entry that the original code accepts.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) != 2 or value.get("type") != "linear":
        raise ValueError(
            f"alibi_scaling: found {value!r}, expected null, "
            '{"type": "linear", "factor": float > 1.0} or '
            '{"type": "linear", "train_seq_len": int > 1}'
        )
    (key,) = set(value) - {"type"}
    if key not in ("factor", "train_seq_len"):
        raise ValueError(
            f"alibi_scaling: found the entry {key!r}, expected 'factor' or 'train_seq_len'"
        )
    return AlibiScaling(**{key: value[key]})


def _check_supported(raw: Mapping[str, Any]) -> None:
    """Raises ValueError for fields that change the computation and are not implemented."""
    rotary = raw.get("rotary_dim") or raw.get("position_embedding_type") == "rotary"
    problems = []
    if raw.get("model_type", "btlm") not in MODEL_TYPES:
        problems.append(
            f"model_type: found {raw['model_type']!r}, expected one of {', '.join(MODEL_TYPES)}"
        )
    if rotary:
        problems.append(
            f"rotary_dim={raw.get('rotary_dim')!r}, position_embedding_type="
            f"{raw.get('position_embedding_type')!r}: rotary positions (Crystal) are not supported,"
            " expected alibi or learned positions"
        )
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention", "is_encoder_decoder"):
        if raw.get(name):
            problems.append(f"{name}: found {raw[name]!r}, expected false: it is not supported")
    for name in ("completep_base_layers", "completep_alpha"):
        if name in raw:
            problems.append(
                f"{name}: found {raw[name]!r}, expected no such key: the original code would "
                "ignore it. Set it with dataclasses.replace, or in model.fields of a recipe"
            )
    if quantized := raw.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
        problems.append(
            f"quantization_config: found {method or str(quantized)[:80]!r}, expected no such key: "
            "quantized weights cannot be converted: use the original model, or call "
            "model.dequantize() in transformers and save it in floats"
        )
    if problems:
        raise ValueError("unsupported BTLM configuration:\n  " + "\n  ".join(problems))


def _mup_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the muP keys of the older flavors into fields of `BTLMConfig`.

    `output_logits_scale` marks the BTLM of July 2023; `width_scale` without it marks Jais-13b,
    where it is the logits scale and the width scale follows from the base width of 256.
    """
    fields = {new: raw[old] for old, new in _OLD_MUP_KEYS.items() if old in raw}
    both = [f"{new} and {old}" for old, new in _OLD_MUP_KEYS.items() if new in raw and old in raw]
    if both or ("width_scale" in raw and "mup_width_scale" in raw):
        raise ValueError(
            f"config.json mixes two key flavors ({', '.join(both) or 'width_scale'}): keep the "
            "mup_* keys or the old ones, not both"
        )
    if "output_logits_scale" in raw:
        width_scale, logits_scale = raw.get("width_scale", 1.0), raw["output_logits_scale"]
    elif "width_scale" in raw:
        if not (is_int(raw.get("n_embd")) and raw["n_embd"] > 0):
            raise ValueError("width_scale without n_embd: expected n_embd, the model's width")
        width_scale, logits_scale = MUP_BASE_WIDTH / raw["n_embd"], raw["width_scale"]
    else:
        return fields
    for name, value in (("width_scale", width_scale), ("output_logits_scale", logits_scale)):
        if not (is_number(value) and value > 0):
            raise ValueError(f"{name}: found {value!r}, expected a number > 0")
    return fields | {
        "mup_width_scale": width_scale,
        "mup_output_alpha": _exact_quotient(logits_scale, width_scale),
    }


def _exact_quotient(product: float, factor: float) -> float:
    """Returns q with q * factor == product in float64, if one is next to product / factor."""
    q = product / factor
    candidates = (q, math.nextafter(q, math.inf), math.nextafter(q, -math.inf))
    return next((x for x in candidates if x * factor == product), q)


# Writing ------------------------------------------------------------------------------------------


def config_to_hf(config: BTLMConfig) -> dict[str, Any]:
    """Returns the `config.json` in the flavor of the released model.

    Raises:
      ValueError: CompleteP is on, which the original code does not support.
    """
    if config.completep_base_layers is not None:
        raise ValueError(
            f"completep_base_layers: found {config.completep_base_layers}; neither config.json nor "
            "the original modelling code has a factor on residual branches. Multiply it into the "
            "weights first: model, params = btlm.load(CHECKPOINT); btlm.save(FOLDED, "
            "*btlm.fold_completep(model.config, params))"
        )
    scaling = config.alibi_scaling
    fields = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.name not in (*_WITHOUT_KEY, "alibi_scaling")
    }
    return {
        "architectures": ["BTLMLMHeadModel"],
        "model_type": "btlm",
        "auto_map": {
            "AutoConfig": f"{_CODE}configuration_btlm.BTLMConfig",
            "AutoModel": f"{_CODE}modeling_btlm.BTLMModel",
            "AutoModelForCausalLM": f"{_CODE}modeling_btlm.BTLMLMHeadModel",
        },
        **fields,
        "alibi_scaling": None if scaling is None else alibi_scaling_to_hf(scaling),
        "scale_attn_by_inverse_layer_idx": False,
        "use_cache": True,
    }


def alibi_scaling_to_hf(scaling: AlibiScaling) -> dict[str, Any]:
    """Returns the `alibi_scaling` entry of a `config.json`."""
    if scaling.factor is not None:
        return {"type": "linear", "factor": scaling.factor}
    return {"type": "linear", "train_seq_len": scaling.train_seq_len}


def export_config_json(
    config: BTLMConfig,
    dtypes: Sequence[str],
    original: Mapping[str, Any] | None = None,
    original_dtypes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Returns the `config.json` of an export, in the flavor of its source.

    A source that was converted gets its own `config.json` back, with every field that has changed
    since replaced. Without one, or if its flavor cannot express the changes (a Jais-13b of another
    base width, for example), the flavor of the released model is used, in the latter case with a
    warning.

    Args:
      config: the configuration of the checkpoint; its slopes are a tensor in Hugging Face files.
      dtypes: the dtypes of the stored weights, without duplicates, sorted.
      original: the `config.json` from which the checkpoint was converted.
      original_dtypes: `dtypes` at that time; None means that they have not changed.

    Raises:
      ValueError: CompleteP is on, which the original code does not support.
    """
    plain = dataclasses.replace(config, alibi_slopes=None)
    dtype = dtypes[0] if len(dtypes) == 1 else "float32"
    if original is not None:
        updated = _with_changes(original, plain)
        # transformers would round the weights to a stale dtype when it loads them.
        if original_dtypes is not None and list(dtypes) != list(original_dtypes):
            updated |= {key: dtype for key in ("torch_dtype", "dtype") if key in original}
        if config_from_hf(updated) == plain:
            return updated
        logger.warning(
            "config.json is written with the keys of the released BTLM: those of the source cannot "
            "express what has been changed since"
        )
    return config_to_hf(plain) | {"torch_dtype": dtype}


def _with_changes(original: Mapping[str, Any], config: BTLMConfig) -> dict[str, Any]:
    """Returns `original` with every field replaced that does not mean what `config` says."""
    before, fields = config_from_hf(original), config_to_hf(config)
    names = [f.name for f in dataclasses.fields(config) if f.name in fields]
    changes = {n: fields[n] for n in names if getattr(before, n) != getattr(config, n)}
    changes = {(ALIASES[n] if ALIASES.get(n) in original else n): v for n, v in changes.items()}
    if _OLD_KEYS & set(original) and any(name.startswith("mup_") for name in changes):
        changes = {n: v for n, v in changes.items() if not n.startswith("mup_")}
        changes |= {old: getattr(config, new) for old, new in _OLD_MUP_KEYS.items()}
        if "output_logits_scale" in original:  # BTLM of July 2023
            changes["output_logits_scale"] = config.logits_scale
            changes["width_scale"] = config.mup_width_scale
        elif "width_scale" in original:  # Jais-13b, where width_scale is the logits scale
            changes["width_scale"] = config.logits_scale
    return {**original, **changes}


def generation_config_json(config: BTLMConfig) -> dict[str, Any]:
    """Returns a `generation_config.json` with the special tokens, for a model that has none."""
    tokens = {n: getattr(config, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"_from_model_config": True} | {n: v for n, v in tokens.items() if v is not None}
