"""Writes a scalar checkpoint with Orbax in a temporary folder to borrow its two metadata files.

Orbax offers no function that writes these files for arrays that it did not write itself. Their
contents do not depend on the shapes of the arrays, so a checkpoint of scalars has the same ones.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from btlm_jax.model import weights
from btlm_jax.model.params import unflatten_tree

ITEM = "state"  # Orbax's name for the item that `ocp.load(path)` reads: the weights
MARKER_FILE = "_CHECKPOINT_METADATA"  # a file that Orbax writes into every finished checkpoint


def array_list(paths: Iterable[weights.Path]) -> str:
    """Returns Orbax's `_METADATA` for arrays of these paths; each `zarr.json` holds a shape."""
    return _scalar_checkpoint(paths, None)[0]


def commit_marker(custom: Mapping[str, Any]) -> str:
    """Returns Orbax's `_CHECKPOINT_METADATA` with custom metadata and without clock readings."""
    values = json.loads(_scalar_checkpoint([("x",)], custom)[1])
    return json.dumps(values | {"init_timestamp_nsecs": None, "commit_timestamp_nsecs": None})


def _scalar_checkpoint(
    paths: Iterable[weights.Path], custom: Mapping[str, Any] | None
) -> tuple[str, str]:
    """Saves a tree of scalars. Returns the text of Orbax's array list and of its commit marker."""
    context = ocp.Context()
    context.array_options.saving.use_ocdbt = False
    tree: Any = unflatten_tree({path: np.zeros((), np.float32) for path in paths})
    logger = logging.getLogger("absl")
    level = logger.level
    with tempfile.TemporaryDirectory() as folder, context:
        # Orbax warns that without OCDBT there are no OCDBT databases to merge.
        logger.setLevel(logging.ERROR)
        path = epath.Path(folder) / "scalars"
        try:
            ocp.save(
                os.fspath(path), tree, custom_metadata=None if custom is None else dict(custom)
            )
        finally:
            logger.setLevel(level)
        return (path / ITEM / "_METADATA").read_text(), (path / MARKER_FILE).read_text()
