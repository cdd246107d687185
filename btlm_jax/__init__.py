"""BTLM-3B-8K in JAX/Flax: exact, muP, ALiBi, Orbax and Hugging Face checkpoints.

The public names are imported on first use, so that `btlm --help` and tools that need only one part
do not import the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from btlm_jax import convert as convert
    from btlm_jax.checkpoint.checkpoint import load as load
    from btlm_jax.checkpoint.checkpoint import save as save
    from btlm_jax.config import AlibiScaling as AlibiScaling
    from btlm_jax.config import BTLMConfig as BTLMConfig
    from btlm_jax.data.tokenizer import load_tokenizer as load_tokenizer
    from btlm_jax.generation.continuous_batching import generate_batch as generate_batch
    from btlm_jax.generation.engine import Engine as Engine
    from btlm_jax.generation.generate import generate as generate
    from btlm_jax.generation.pipeline import pipeline as pipeline
    from btlm_jax.generation.prompt_cache import PromptCache as PromptCache
    from btlm_jax.generation.scoring import score as score
    from btlm_jax.generation.streaming import stream as stream
    from btlm_jax.model import mup as mup
    from btlm_jax.model.btlm import BTLM as BTLM
    from btlm_jax.model.kv_cache import KVCache as KVCache
    from btlm_jax.model.loss import next_token_loss as next_token_loss
    from btlm_jax.model.params import fold_completep as fold_completep
    from btlm_jax.model.sharding import make_mesh as make_mesh

_HOME = {
    "AlibiScaling": "config",
    "BTLM": "model.btlm",
    "BTLMConfig": "config",
    "Engine": "generation.engine",
    "KVCache": "model.kv_cache",
    "PromptCache": "generation.prompt_cache",
    "fold_completep": "model.params",
    "generate": "generation.generate",
    "generate_batch": "generation.continuous_batching",
    "load": "checkpoint.checkpoint",
    "load_tokenizer": "data.tokenizer",
    "make_mesh": "model.sharding",
    "next_token_loss": "model.loss",
    "pipeline": "generation.pipeline",
    "save": "checkpoint.checkpoint",
    "score": "generation.scoring",
    "stream": "generation.streaming",
}
_MODULES = {"convert": "convert", "mup": "model.mup"}
__all__ = ["__version__", *_MODULES, *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"btlm_jax.{_MODULES[name]}")
    if name in _HOME:
        return getattr(importlib.import_module(f"btlm_jax.{_HOME[name]}"), name)
    raise AttributeError(f"module 'btlm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
