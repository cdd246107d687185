"""Hostile pickles are refused without running code, and mutated ones hold what they state."""

from __future__ import annotations

import os
import zipfile

from hypothesis import given
from hypothesis import strategies as st

from support.hostile_files import (
    BIN,
    MANY_EXAMPLES,
    SHARED,
    TORCH_BIN,
    mutated_bytes,
    read_everything,
    refusal,
    zip_bytes,
)
from support.hostile_pickles import hostile_pickles


def test_hostile_pickles_are_refused_without_running_code(tmp_path):
    flag = tmp_path / "ran"
    pickles = hostile_pickles(flag)
    assert len(pickles) > 100
    for name, pkl in pickles.items():
        raw = zip_bytes(pkl)
        message = refusal({BIN: raw})
        assert BIN in message and len(message) < 1000 and "\n" not in message, name
    assert os.listdir(tmp_path) == []


@MANY_EXAMPLES
@given(data=st.data())
def test_mutated_pickles_describe_no_more_than_the_storages_hold(data):
    """The pickle is mutated, and its checksum is valid."""
    with zipfile.ZipFile(TORCH_BIN / "state_dict.bin") as z:
        members = {i.filename.replace("state_dict/", "m/"): z.read(i) for i in z.infolist()}
    pkl = data.draw(mutated_bytes(members.pop("m/data.pkl")))
    arrays, errors = read_everything({BIN: zip_bytes(pkl, members)})
    assert set(errors) <= {""}
    held = sum(len(x) for n, x in members.items() if "/data/" in n)
    assert sum(x.nbytes for n, x in arrays.items() if n not in SHARED) <= 10 * held
