"""Kinds of ALiBi scaling by which a model reads beyond its trained length."""

from __future__ import annotations

import dataclasses
from typing import Literal

from btlm_jax.config import AlibiScaling, Positions
from btlm_jax.model.btlm import BTLM

ScalingKind = Literal["none", "fixed", "dynamic"]


def trained_length(model: BTLM, override: int | None = None) -> int:
    """Returns the sequence length that a model was trained on: its `n_positions` by default.

    Raises:
      ValueError: fewer than 2 tokens, or learned positions, which end at the trained length.
    """
    c = model.config
    if c.positions is not Positions.ALIBI:
        raise ValueError(
            f"position_embedding_type: found {c.position_embedding_type!r}, expected 'alibi': only "
            f"ALiBi's distances can be scaled to read beyond {c.n_positions} tokens"
        )
    length = c.n_positions if override is None else override
    if length < 2:
        raise ValueError(f"trained length: found {length}, expected at least 2 tokens")
    return length


def scaling_kinds(model: BTLM) -> tuple[ScalingKind, ...]:
    """Returns the kinds that `with_scaling_kind` can apply to the model."""
    scaling = model.config.alibi_scaling
    if scaling is not None and scaling.factor:
        return ("none", "fixed")
    return ("none", "fixed", "dynamic")


def with_scaling_kind(
    model: BTLM, kind: ScalingKind, trained: int, length: int, *, new_tokens: int = 0
) -> BTLM:
    """Returns the model with another scaling of ALiBi's distances (arXiv 2310.13017).

    Args:
      model: the model. Its own factor counts as part of its training; its own `train_seq_len` does
        not, because it changes nothing at the trained length.
      kind: "none", as trained; "fixed" divides distances by length / trained at every length;
        "dynamic" divides by S / trained as soon as the number of keys S exceeds `trained`.
      trained: trained length, in tokens.
      length: number of tokens to read. Up to `trained`, all kinds are "none".
      new_tokens: number of tokens to generate after them, which "dynamic" counts too.

    Raises:
      ValueError: "dynamic" for a model that was trained with a factor.
    """
    scaling = model.config.alibi_scaling
    factor = 1.0 if scaling is None or scaling.factor is None else scaling.factor
    if kind == "dynamic" and factor != 1.0:
        raise ValueError(
            f"scaling 'dynamic': found a model with the fixed factor {factor}, and there is no "
            "dynamic scaling with a factor: use 'none' or 'fixed', which multiplies it"
        )
    new_scaling = None if factor == 1.0 else AlibiScaling(factor=factor)
    if length > trained and kind == "fixed":
        new_scaling = AlibiScaling(factor=factor * length / trained)
    elif length + new_tokens > trained and kind == "dynamic":
        new_scaling = AlibiScaling(train_seq_len=trained)
    config = dataclasses.replace(model.config, alibi_scaling=new_scaling)
    return dataclasses.replace(model, config=config)
