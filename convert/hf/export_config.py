"""The small JSON files of an export: `config.json` in its source's flavor, generation config."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from btlm_jax.checkpoint.metadata import Metadata
from btlm_jax.config import BTLMConfig
from btlm_jax.model import weights

logger = logging.getLogger(__name__)


def config_json(meta: Metadata) -> dict[str, Any]:
    """The `config.json`: the original one, with what has changed since put in its own flavor.

    A model that never had one gets the released flavor, as does one that its own cannot express
    (a Jais-13b of another base width, say), with a warning.
    """
    original = meta.origin.get("hf_config")
    plain = dataclasses.replace(meta.config, alibi_slopes=None)
    dtypes = sorted({str(meta.leaves[x.path].dtype) for x in weights.disk_leaves(meta.config)})
    dtype = dtypes[0] if len(dtypes) == 1 else "float32"
    if original is not None:
        changed = _changed(original, plain)
        if dtypes != meta.origin.get("dtypes", dtypes):  # or transformers would round on loading
            changed |= {key: dtype for key in ("torch_dtype", "dtype") if key in original}
        if BTLMConfig.from_hf(changed) == plain:
            return changed
        logger.warning(
            "config.json is written with the keys of the released BTLM: those of the source cannot "
            "express what has been changed since"
        )
    return plain.to_hf() | {"torch_dtype": dtype}


def _changed(original: dict[str, Any], config: BTLMConfig) -> dict[str, Any]:
    """`original` with every field replaced that reads otherwise than in `config`."""
    before, fields = BTLMConfig.from_hf(original), config.to_hf()
    names = [f.name for f in dataclasses.fields(config) if f.name in fields]
    changed = {n: fields[n] for n in names if getattr(before, n) != getattr(config, n)}
    old = set(original) & {
        "embeddings_scale", "scale_qk_dot_by_d", "output_logits_scale", "width_scale",
    }  # fmt: skip
    if old and any(name.startswith("mup_") for name in changed):
        changed = {n: v for n, v in changed.items() if not n.startswith("mup_")} | {
            "embeddings_scale": config.mup_embeddings_scale,
            "scale_qk_dot_by_d": config.mup_scale_qk_dot_by_d,
        }
        if "output_logits_scale" in original:
            changed["output_logits_scale"] = config.logits_scale
            changed["width_scale"] = config.mup_width_scale
        elif "width_scale" in original:  # Jais-13b, where width_scale is the logits scale
            changed["width_scale"] = config.logits_scale
    return original | changed


def generation_config(config: BTLMConfig) -> dict[str, Any]:
    """A `generation_config.json` for a model that has none: the special tokens, else defaults."""
    tokens = {n: getattr(config, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"_from_model_config": True} | {n: v for n, v in tokens.items() if v is not None}
