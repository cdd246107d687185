"""Muon's view of our weights: stacked, with split heads, sharded and zero-padded."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from btlm_jax.model.weights import Weight


def matrix_view(w: Weight, rms: bool) -> tuple[MuonDimensionNumbers, float]:
    """Returns Muon's axes of a stacked kernel [L, ...], and its factor by shape.

    Axes that are neither inputs nor outputs are batch axes: L and qkv. The factor is optax's, in
    fp32, but for the true shape: `scale_by_shape` would count the zero padding of a mesh.
    """
    split = next(i for i in range(len(w.shape)) if math.prod(w.shape[:i]) == w.hf_shape[0])
    outputs = [i for i in range(split, len(w.shape)) if w.axes[i] != "qkv"]
    n_in, n_out = w.hf_shape[0], math.prod(w.shape[i] for i in outputs)
    factor = np.sqrt(np.float32(max(n_in, n_out) if rms else max(1, n_out / n_in)))
    inputs = tuple(range(1, split + 1))
    return MuonDimensionNumbers(inputs, tuple(i + 1 for i in outputs)), float(factor)


def on_any_mesh(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets XLA choose the shardings inside `tx.update`; results are sharded like the arguments.

    On a mesh of explicit type, optax's Muon would have to state the sharding of every product.
    """

    def update(updates, state, params=None):
        mesh = next((jax.typeof(x).sharding.mesh for x in jax.tree.leaves(updates)), None)
        if mesh is None or mesh.empty:
            return tx.update(updates, state)
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        with jax.sharding.use_abstract_mesh(mesh):
            free: Any = jax.sharding.auto_axes(tx.update, axes=mesh.axis_names, out_sharding=specs)
            return free(updates, state)

    return optax.GradientTransformation(tx.init, update)
