"""Random documents to evaluate."""

from __future__ import annotations

import numpy as np


def random_documents(*lengths: int, vocab: int = 96) -> list:
    """Returns documents of random ids; their bytes are none of the numbers of tokens."""
    from btlm_jax.evaluation.documents import TokenizedDocument

    rng = np.random.default_rng(0)
    ids = [rng.integers(0, vocab, n).astype(np.uint16) for n in lengths]
    return [TokenizedDocument(x, 3 * len(x) + 1) for x in ids]
