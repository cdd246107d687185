"""The kinds of ALiBi by which a model reads more than it was trained on."""

from __future__ import annotations

import dataclasses
from typing import Literal

from btlm_jax.config import AlibiScaling
from btlm_jax.model.btlm import BTLM

Kind = Literal["none", "fixed", "dynamic"]


def trained_length(model: BTLM, given: int | None = None) -> int:
    """The tokens of the sequences a model was trained on: as given, or its `n_positions`.

    Raises:
      ValueError: fewer than 2, or learned positions, which end where they were trained.
    """
    c = model.config
    if not c.alibi:
        raise ValueError(
            "position_embedding_type: found 'learned', expected 'alibi': a model with learned "
            f"positions cannot read beyond its {c.n_positions}"
        )
    found = c.n_positions if given is None else given
    if found < 2:
        raise ValueError(f"trained length: found {found}, expected at least 2 tokens")
    return found


def kinds(model: BTLM) -> tuple[Kind, ...]:
    """Those that `scaled` can make of the model."""
    own = model.config.alibi_scaling
    return ("none", "fixed") if own is not None and own.factor else ("none", "fixed", "dynamic")


def scaled(model: BTLM, kind: Kind, trained: int, length: int, *, new: int = 0) -> BTLM:
    """The model with another scaling of ALiBi's distances (arXiv 2310.13017).

    Args:
      model: a factor of its own is taken for part of its training; a `train_seq_len` of its own
        is not, as it changes nothing at the trained length.
      kind: "none", as trained; "fixed", distances are divided by length / trained at every length;
        "dynamic", by S / trained once there are more than `trained` keys S.
      trained: in tokens.
      length: that is to be read. Up to `trained`, all kinds are "none".
      new: that are generated after, which "dynamic" counts too.

    Raises:
      ValueError: "dynamic", and the model was trained with a factor.
    """
    own = model.config.alibi_scaling
    factor = 1.0 if own is None or own.factor is None else own.factor
    if kind == "dynamic" and factor != 1.0:
        raise ValueError(
            f"scaling 'dynamic': found a model with the fixed factor {factor}, and there is no "
            "dynamic scaling with a factor: use 'none' or 'fixed', which multiplies it"
        )
    scaling = None if factor == 1.0 else AlibiScaling(factor=factor)
    if length > trained and kind == "fixed":
        scaling = AlibiScaling(factor=factor * length / trained)
    elif length + new > trained and kind == "dynamic":
        scaling = AlibiScaling(train_seq_len=trained)
    config = dataclasses.replace(model.config, alibi_scaling=scaling)
    return dataclasses.replace(model, config=config)
