"""Text for small experiments: tokens to train on, and held-out tokens."""

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
    """Tokens to train on and held-out tokens, int32 [N], of one vocabulary."""

    train: np.ndarray
    held_out: np.ndarray
    vocab_size: int
    name: str

    @property
    def fingerprint(self) -> str:
        """Returns the SHA-256 of all tokens."""
        return hashlib.sha256(self.train.tobytes() + self.held_out.tobytes()).hexdigest()

    def batches(self, count: int, batch_size: int, length: int, seed: int) -> np.ndarray:
        """Returns windows at random positions, int32 [count, B, T + 1]."""
        starts = np.random.default_rng(seed).integers(
            0, len(self.train) - length, (count, batch_size, 1)
        )
        return self.train[starts + np.arange(length + 1)]

    def windows(self, count: int, batch_size: int, length: int) -> np.ndarray:
        """Returns evenly spaced held-out windows, int32 [count, B, T + 1]."""
        last = len(self.held_out) - length - 1
        starts = np.linspace(0, last, count * batch_size).astype(np.int64)
        return self.held_out[starts.reshape(count, batch_size, 1) + np.arange(length + 1)]


def read_corpus(directory: Path | None, length: int) -> Corpus:
    """Reads a corpus: the bytes of the quickstart's text, or a directory of `btlm tokenize`.

    The last tenth is held out. At most the first 20 million tokens of a directory are read.

    Args:
      directory: token shards; None is the text of the quickstart.
      length: tokens per window.

    Raises:
      ValueError: the corpus is too short for the windows.
      FileNotFoundError: there are no token shards in the directory.
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
    held_out = int(_HELD_OUT * len(tokens))
    if held_out < length + 1:
        raise ValueError(
            f"--data: {name} has {len(tokens):,} tokens, of which {held_out:,} are held out, "
            f"expected at least {length + 1:,}, for windows of {length} tokens and one more"
        )
    return Corpus(tokens[:-held_out], tokens[-held_out:], vocab_size, name)
