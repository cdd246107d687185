"""A checkpoint's model and weights, loaded for an evaluation."""

from __future__ import annotations

import dataclasses
from typing import Any

from btlm_jax.checkpoint import checkpoint
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params


def load_for_evaluation(
    path: str, dtype: str | None, mesh: Any, *, unstacked: bool = False
) -> tuple[BTLM, Params]:
    """Loads a model and its weights.

    Args:
      path: a checkpoint.
      dtype: dtype of weights and computation; None keeps the stored dtype and computes in the
        platform's.
      mesh: the mesh to load onto, or None.
      unstacked: load one array per layer, as decoding wants them.
    """
    model, params = checkpoint.load(path, dtype=dtype, mesh=mesh, unstacked=unstacked)
    return (dataclasses.replace(model, compute_dtype=dtype) if dtype else model), params
