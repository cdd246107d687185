"""Subcommands that generate text."""

from __future__ import annotations

import dataclasses
import logging
from typing import Literal

from tyro.conf import Positional


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt."""

    checkpoint: Positional[str]
    """An Orbax checkpoint that carries a tokenizer: a directory, or a gs:// URL."""
    prompt: str
    """The text to continue."""
    max_new_tokens: int = 50
    """How many tokens to add at most."""
    sample: bool = False
    """Draw from the distribution instead of taking the most likely token."""
    temperature: float = 1.0
    """Divides the logits before drawing."""
    top_k: int = 50
    """Draw from the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the most likely tokens that together have this probability."""
    seed: int = 0
    """Of the draws."""
    cache_length: int | None = None
    """Slots of the KV cache; default as many as are needed."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of weights and computation; default as stored, computing in the platform's."""

    def run(self) -> None:
        import numpy as np

        import btlm_jax as btlm
        from btlm_jax import manifest
        from btlm_jax.tokenizer import check_vocabulary

        sampled = (self.temperature, self.top_k, self.top_p) != (1.0, 50, 1.0)
        if sampled and not self.sample:
            logging.getLogger(__name__).warning(
                "--temperature, --top-k and --top-p do nothing without --sample"
            )
        # The tokenizer first: the weights may be large.
        config = manifest.read(self.checkpoint).config
        tokenizer = btlm.load_tokenizer(self.checkpoint)
        check_vocabulary(tokenizer, config.vocab_size)
        ids = tokenizer.encode(self.prompt).ids
        if not ids:
            raise ValueError("--prompt is empty: give at least one character")
        model, params = btlm.load(self.checkpoint, dtype=self.dtype)
        if self.dtype:
            model = dataclasses.replace(model, compute_dtype=self.dtype)
        out = btlm.generate(
            model,
            params,
            np.array([ids]),
            max_new_tokens=self.max_new_tokens,
            do_sample=self.sample,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            cache_length=self.cache_length,
        )
        print(tokenizer.decode(out[0].tolist()))
