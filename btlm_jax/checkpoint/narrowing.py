"""Weights that a conversion to a dtype with a smaller range turns into infinities or zeros."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from btlm_jax.checkpoint.unstacked import ReadPart
from btlm_jax.model import finite, sharding, weights
from btlm_jax.model.packed import PackedWeight
from btlm_jax.model.params import flatten_tree, unflatten_tree
from btlm_jax.utils.dtypes import largest_value
from btlm_jax.utils.format import join_first

logger = logging.getLogger(__name__)

_NAMED = 3  # arrays that a message names


def check_narrowed(
    params: Mapping[str, Any],
    leaves: Iterable[weights.DiskLeaf],
    stored: Mapping[weights.Path, DTypeLike],
    dtype: np.dtype | None,
    read: ReadPart,
) -> None:
    """Checks that weights which were loaded in another dtype have kept their values.

    The weights are inspected on their devices; only arrays that look damaged are read again. All
    processes that share them get the same result.

    Args:
      params: the loaded weights, stacked or unstacked.
      leaves: the stored arrays that were converted.
      stored: their dtypes, by path.
      dtype: dtype in memory; None is the stored one.
      read: reads a part of a stored array.

    Raises:
      ValueError: finite weights have become infinite.
    """
    leaves = [x for x in leaves if dtype is not None and _is_wider(stored[x.path], dtype)]
    if dtype is None or not leaves:
        return
    flat = flatten_tree(params)
    flat = {path: x.values if isinstance(x, PackedWeight) else x for path, x in flat.items()}
    suspects = {tuple(x.split("/")) for x in finite.nonfinite_by_array(unflatten_tree(flat))}
    if any(_reaches_lower(stored[x.path], dtype) for x in leaves):
        narrowed = {path: x for path, x in flat.items() if x.dtype == dtype}
        zeros = jax.device_get({path: _count_zeros(x) for path, x in narrowed.items()})
        for leaf in leaves:  # in stacked weights, the zeros of all layers are counted together
            count = int(zeros.get(leaf.path, zeros.get(leaf.weight.path, 0)))
            suspects |= {leaf.path} if 2 * count > math.prod(leaf.shape) else set()
    overflowed: dict[str, int] = {}
    vanished: dict[str, str] = {}
    for leaf in leaves:
        if leaf.path not in suspects and leaf.weight.path not in suspects:
            continue
        before = np.asarray(read(leaf, tuple(slice(0, n) for n in leaf.shape)))
        with np.errstate(over="ignore", under="ignore"):
            after = before.astype(dtype)
        if infinite := int(np.sum(np.isfinite(before) & ~np.isfinite(after))):
            overflowed["/".join(leaf.path)] = infinite
        lost, nonzero = int(np.sum((before != 0) & (after == 0))), int(np.sum(before != 0))
        if 2 * lost > nonzero:
            vanished["/".join(leaf.path)] = f"{lost:,} of {nonzero:,}"
    if overflowed:
        arrays = join_first((f"{name}: {n:,}" for name, n in overflowed.items()), _NAMED)
        raise ValueError(
            f"dtype: found {dtype}, in which weights beyond "
            f"{largest_value(dtype):,.6g} would be infinite ({arrays}), expected "
            "bfloat16 or float32"
        )
    if vanished:
        arrays = join_first((f"{name}: {n}" for name, n in vanished.items()), _NAMED)
        logger.warning(
            "weights too small for %s are zero now, most of those of %d arrays (%s): load them in "
            "bfloat16 or float32 to keep them", dtype, len(vanished), arrays,
        )  # fmt: skip


def _is_wider(stored: DTypeLike, dtype: np.dtype) -> bool:
    """Returns whether a stored dtype holds larger values than `dtype`."""
    return largest_value(stored) > largest_value(dtype)


def _reaches_lower(stored: DTypeLike, dtype: np.dtype) -> bool:
    """Returns whether a stored dtype holds smaller values, beside denormal ones, than `dtype`."""
    tiny, narrow = (float(ml_dtypes.finfo(x).smallest_normal) for x in (stored, dtype))
    return tiny < narrow


@jax.jit
def _count_zeros(x: jax.Array) -> jax.Array:
    with sharding.on_mesh(sharding.mesh_of(x)):
        return jnp.sum(x == 0, dtype=jnp.uint32)
