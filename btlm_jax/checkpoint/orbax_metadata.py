"""Writes a scalar checkpoint with Orbax into a temporary directory to borrow its metadata files.

Orbax has no function that writes its two metadata files for arrays that it did not write itself.
Neither file contains the shapes of the arrays, so a checkpoint of scalars has the right ones.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath
from orbax.checkpoint import __version__ as orbax_version
from orbax.checkpoint import v1 as ocp

from btlm_jax.model import weights
from btlm_jax.model.params import flatten_tree, unflatten_tree

ITEM = "state"  # Orbax's name for the item that `ocp.load(path)` reads: the weights
MARKER_FILE = "_CHECKPOINT_METADATA"  # Orbax writes it into every finished checkpoint


def array_list(leaves: Iterable[weights.Path]) -> str:
    """Returns Orbax's `_METADATA` for arrays of these paths; their shapes are in `zarr.json`."""
    return _scalar_checkpoint(leaves, None)[0]


def commit_marker(custom: dict[str, Any]) -> str:
    """Returns Orbax's `_CHECKPOINT_METADATA` with custom metadata and without clock readings."""
    values = json.loads(_scalar_checkpoint([("x",)], custom)[1])
    return json.dumps(values | {"init_timestamp_nsecs": None, "commit_timestamp_nsecs": None})


def require_arrays(directory: epath.Path, leaves: Iterable[weights.Path]) -> None:
    """Raises an error, its own or one of Orbax, if the installed Orbax does not find the arrays."""
    found: Any = ocp.metadata(os.fspath(directory)).metadata
    if found is None or set(flatten_tree(found)) != set(leaves):
        raise ValueError(f"orbax-checkpoint {orbax_version} does not find the arrays")


def _scalar_checkpoint(
    leaves: Iterable[weights.Path], custom: dict[str, Any] | None
) -> tuple[str, str]:
    """Saves a tree of scalars and returns the texts of Orbax's two metadata files."""
    context = ocp.Context()
    context.array_options.saving.use_ocdbt = False
    tree: Any = unflatten_tree({path: np.zeros((), np.float32) for path in leaves})
    logger = logging.getLogger("absl")
    level = logger.level
    with tempfile.TemporaryDirectory() as folder, context:
        # Orbax warns that there is no OCDBT database to merge, which is intended.
        logger.setLevel(logging.ERROR)
        path = epath.Path(folder) / "scalars"
        try:
            ocp.save(os.fspath(path), tree, custom_metadata=custom)
        finally:
            logger.setLevel(level)
        return (path / ITEM / "_METADATA").read_text(), (path / MARKER_FILE).read_text()
