"""Reads and edits the custom metadata of checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from btlm_jax.checkpoint import metadata


def read_custom_metadata(checkpoint: Path) -> dict:
    """Returns the custom metadata of a checkpoint as stored."""
    marker = json.loads((checkpoint / metadata.MARKER_FILE).read_text())
    return marker["custom_metadata"]["btlm_jax"]


def edit_metadata(
    checkpoint: Path, change: Callable[[dict], object], *, update_checksum: bool = True
) -> None:
    """Applies a change to the custom metadata of a checkpoint."""
    file = checkpoint / metadata.MARKER_FILE
    marker = json.loads(file.read_text())
    custom = marker["custom_metadata"]["btlm_jax"]
    change(custom)
    if update_checksum:
        custom.pop("seal", None)
        text = json.dumps(custom, sort_keys=True)
        custom["seal"] = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps(marker))


@contextlib.contextmanager
def restored(file: Path) -> Iterator[Path]:
    """Restores the content of a file at the end of the `with` block."""
    content = file.read_bytes()
    try:
        yield file
    finally:
        file.write_bytes(content)
