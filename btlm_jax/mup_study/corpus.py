"""Text to try small models on: tokens to train on, and tokens held out."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from btlm_jax.data import sample_text
from btlm_jax.data.token_shards import TokenShards

_MOST_TOKENS = 20_000_000
_HELD_OUT = 0.1


class Corpus(NamedTuple):
    """Tokens to train on and tokens held out, int32 [N], in a vocabulary."""

    train: np.ndarray
    held_out: np.ndarray
    vocab_size: int
    name: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all tokens."""
        return hashlib.sha256(self.train.tobytes() + self.held_out.tobytes()).hexdigest()

    def batches(self, count: int, batch_size: int, length: int, seed: int) -> np.ndarray:
        """Windows at random places, int32 [count, B, T + 1]."""
        at = np.random.default_rng(seed).integers(
            0, len(self.train) - length, (count, batch_size, 1)
        )
        return self.train[at + np.arange(length + 1)]

    def windows(self, count: int, batch_size: int, length: int) -> np.ndarray:
        """Held-out windows, evenly spread, int32 [count, B, T + 1]."""
        last = len(self.held_out) - length - 1
        at = np.linspace(0, last, count * batch_size).astype(np.int64)
        return self.held_out[at.reshape(count, batch_size, 1) + np.arange(length + 1)]


def read(directory: Path | None, length: int) -> Corpus:
    """A corpus: the bytes of the quickstart's text, or a directory of `btlm tokenize`.

    The end, a tenth, is held out; of a directory the first 20 million tokens are read.

    Raises:
      ValueError: it is shorter than the windows take.
      FileNotFoundError: there is none.
    """
    if directory is None:
        tokens = np.frombuffer(sample_text.read_sample_text().encode(), np.uint8).astype(np.int32)
        vocab_size, name = 256, "bytes of Python's language reference"
    else:
        shards = TokenShards(directory)
        count = min(len(shards), _MOST_TOKENS)
        tokens = np.asarray(shards.read(0, count), np.int32)
        vocab_size, name = shards.metadata.vocab_size, str(directory)
        if count < len(shards):
            name = f"the first {count:,} of {len(shards):,} tokens of {directory}"
    held = int(_HELD_OUT * len(tokens))
    if held < length + 1:
        raise ValueError(
            f"--data: {name} has {len(tokens):,} tokens, of which {held:,} are held out, expected "
            f"at least {length + 1:,} held out: windows of {length} tokens and the one after"
        )
    return Corpus(tokens[:-held], tokens[-held:], vocab_size, name)
