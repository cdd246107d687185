"""The metadata files that a scalar checkpoint lends: deterministic, without clock readings."""

from __future__ import annotations

import json

from btlm_jax.checkpoint import orbax_metadata


def test_the_commit_marker_holds_custom_metadata_and_no_clock_readings():
    custom = {"btlm_jax": {"format": 2, "origin": {"x": 1.5}, "hashes": ["a", None]}}
    marker = orbax_metadata.commit_marker(custom)
    assert marker == orbax_metadata.commit_marker(custom)
    values = json.loads(marker)
    assert values["custom_metadata"] == custom
    assert values["init_timestamp_nsecs"] is values["commit_timestamp_nsecs"] is None


def test_the_list_of_arrays_names_every_path():
    paths = [("a",), ("b", "c")]
    text = orbax_metadata.array_list(paths)
    assert text == orbax_metadata.array_list(paths)
    values = json.loads(text)
    assert set(values["tree_metadata"]) == {"('a',)", "('b', 'c')"}
    assert values["use_ocdbt"] is False and values["use_zarr3"] is True
