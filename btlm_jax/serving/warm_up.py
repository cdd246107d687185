"""Compiles the programs of an engine before requests come."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np

from btlm_jax.generation.engine import Engine
from btlm_jax.utils.compile_cache import count_compilations

logger = logging.getLogger(__name__)

# The rules that requests have by default: greedy, and sampled from the most likely tokens.
_RULES: tuple[dict[str, Any], ...] = (
    {"do_sample": False},
    {"do_sample": True, "top_k": 0, "top_p": 0.9, "temperature": 0.8},
)


def warm_up(engine: Engine) -> None:
    """Runs requests with the usual rules, and prompts of few and of many tokens.

    Other lengths and rules are compiled when a request needs them.
    """
    start, rng = time.monotonic(), np.random.default_rng(0)
    longest = max(1, min(engine.chunk, engine.max_length - 2))
    with count_compilations() as compilations:
        for options in _RULES:
            for length in sorted({1, longest}):
                prompt = rng.integers(0, engine.model.config.vocab_size, length)
                new = min(2, engine.max_length - length)
                engine.submit(prompt, max_new_tokens=new, eos_token_id=None, **options).result()
    engine.prefixes.clear()
    logger.info("compiled %d programs in %.0f s", compilations.count, time.monotonic() - start)
