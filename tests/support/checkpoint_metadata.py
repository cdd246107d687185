"""Checkpoints with edited metadata."""

from __future__ import annotations

import hashlib
import json


def edit_metadata(path, change):
    file = path / "_CHECKPOINT_METADATA"
    meta = json.loads(file.read_text())
    notes = meta["custom_metadata"]["btlm_jax"]
    change(notes)
    notes.pop("seal")
    notes["seal"] = hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(meta))
