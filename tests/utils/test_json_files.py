"""Our JSON files: damage is named, with the file and what to do."""

from __future__ import annotations

import pytest

from btlm_jax.utils.json_files import json_type, parse_object, read_object


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "x.json is empty: copy it again"),
        (b"\0\0 \n", "x.json holds nothing but blanks or zero bytes: copy it again"),
        (b'{"a": ', r"x.json is damaged, not JSON \(.*\): copy it again"),
        (b"\xff\xfe", "x.json is damaged, not JSON"),
        (b"[" * 100_000, "x.json is damaged, not JSON"),
        (b"[1]", "x.json holds no JSON object: copy it again"),
    ],
)
def test_damage_is_named_with_the_file_and_the_fix(data, message, tmp_path):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_object(tmp_path / "x.json", "copy it again")


def test_a_byte_order_mark_is_skipped():
    assert parse_object(b'\xef\xbb\xbf{"a": 1}', "x.json") == {"a": 1}


def test_types_have_the_names_of_json():
    values = [None, True, 1, 1.5, "a", [], {}]
    names = ["null", "boolean", "number", "number", "string", "array", "object"]
    assert [json_type(value) for value in values] == names
