"""BTLM-3B-8K in JAX/Flax: exact, muP, ALiBi, Orbax and Hugging Face checkpoints.

The public names below are loaded on first use, so that `btlm --help` and tools that only need one
part do not pay for the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from btlm_jax import convert as convert
    from btlm_jax import mup as mup
    from btlm_jax.checkpoint import load as load
    from btlm_jax.checkpoint import save as save
    from btlm_jax.config import AlibiScaling as AlibiScaling
    from btlm_jax.config import BTLMConfig as BTLMConfig
    from btlm_jax.generation.api import generate as generate
    from btlm_jax.generation.prompt_cache import PromptCache as PromptCache
    from btlm_jax.generation.scoring import score as score
    from btlm_jax.kv_cache import KVCache as KVCache
    from btlm_jax.loss import next_token_loss as next_token_loss
    from btlm_jax.model import BTLM as BTLM
    from btlm_jax.sharding import make_mesh as make_mesh
    from btlm_jax.tokenizer import load_tokenizer as load_tokenizer
    from btlm_jax.weights import fold_completep as fold_completep

_HOME = {
    "AlibiScaling": "config",
    "BTLM": "model",
    "BTLMConfig": "config",
    "KVCache": "kv_cache",
    "PromptCache": "generation.prompt_cache",
    "fold_completep": "weights",
    "generate": "generation.api",
    "load": "checkpoint",
    "load_tokenizer": "tokenizer",
    "make_mesh": "sharding",
    "next_token_loss": "loss",
    "save": "checkpoint",
    "score": "generation.scoring",
}
_MODULES = ("convert", "mup")
__all__ = ["__version__", *_MODULES, *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"btlm_jax.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"btlm_jax.{_HOME[name]}"), name)
    raise AttributeError(f"module 'btlm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
