"""Mixtures of token directories: which source the next unit of training data comes from."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from btlm_jax.data.token_shards import TokenShards
from btlm_jax.utils.local_paths import local_name, local_path

# Subset -> percent of SlimPajama-627B. BTLM-3B-8K was trained on one epoch of it.
MIXTURES: Mapping[str, Mapping[str, float]] = {
    "slimpajama": {
        "commoncrawl": 52.2,
        "c4": 26.7,
        "github": 5.2,
        "books": 4.2,
        "arxiv": 4.6,
        "wikipedia": 3.8,
        "stackexchange": 3.3,
    }
}

_TOTAL_SHARE = 1 << 24  # weights are rounded to this fraction of their sum


class Source(NamedTuple):
    """Tokens to train on, and their weight relative to the other sources."""

    tokens: TokenShards
    weight: float = 1.0


def open_mixture(
    parent: str | os.PathLike[str], weights: str | Mapping[str, float]
) -> list[Source]:
    """Opens the sources of a mixture.

    Args:
      parent: directory that holds one directory of tokens per subset.
      weights: subset directory -> weight, or the name of one of `MIXTURES`.

    Raises:
      FileNotFoundError: a subset has no directory of tokens.
      ValueError: unknown mixture, or damaged tokens.
    """
    if isinstance(weights, str):
        if weights not in MIXTURES:
            raise ValueError(f"mixture: found {weights!r}, expected one of {', '.join(MIXTURES)}")
        weights = MIXTURES[weights]
    parent = local_path(parent, "parent")
    weights = {local_name(name, "weights"): weight for name, weight in weights.items()}
    if missing := [name for name in weights if not (parent / name).is_dir()]:
        present = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
        raise FileNotFoundError(
            f"{parent}: the mixture needs directories {', '.join(missing)}, found "
            f"{', '.join(present) or 'none'}; rename the directories, or set data.weights for "
            "those that exist"
        )
    return [Source(TokenShards(parent / name), weight) for name, weight in weights.items()]


def mixture_shares(sources: Sequence[Source]) -> tuple[int, ...]:
    """Returns integers proportional to the weights of the sources.

    Raises:
      ValueError: no sources, or a weight that is not a positive number.
    """
    if not sources:
        raise ValueError("sources: found none, expected at least one directory of tokens")
    for source in sources:
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise ValueError(
                f"{source.tokens.directory}: weight: found {source.weight}, expected more than 0"
            )
    total = math.fsum(s.weight for s in sources)
    return tuple(max(1, round(s.weight / total * _TOTAL_SHARE)) for s in sources)


def units_per_source(units: np.ndarray, shares: Sequence[int]) -> np.ndarray:
    """Returns how many of the first `units` units of the mixture come from each source.

    Each further unit comes from exactly one source, and no source is ever more than a few units
    away from its share.

    Args:
      units: int64 [N].
      shares: integers proportional to the weights of S sources.

    Returns:
      int64 [S, N].
    """
    rest, total, counts = units, sum(shares), []
    for share in shares:
        others = rest * (total - share) // total
        counts.append(rest - others)
        rest, total = others, total - share
    return np.stack(counts)


def check_sources(sources: Sequence[Source], unit: int) -> None:
    """Raises ValueError if a source is shorter than a unit, or the tokenizers differ."""
    first = sources[0].tokens
    for tokens, _ in sources:
        if len(tokens) <= unit:
            raise ValueError(
                f"{tokens.directory} holds {len(tokens)} tokens, expected at least {unit + 1}: one "
                "more than the longest sequence"
            )
        for field in ("tokenizer_sha256", "eos_id"):
            value, expected = (getattr(x.metadata, field) for x in (tokens, first))
            if value != expected:
                raise ValueError(
                    f"{tokens.directory}: {field}: found {value}, {first.directory} has "
                    f"{expected}; tokenize both with the same tokenizer"
                )
