"""The string in a field of a large JSON object, decoded without holding the object."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btlm_jax.data.json_stream import JsonFieldError, stream_string_field


def streamed(data: bytes, block: int, field="text") -> str:
    blocks = (data[i : i + block] for i in range(0, len(data), block))
    return "".join(stream_string_field(blocks, field))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.text(), st.booleans(), st.integers(1, 9))
def test_strings_are_those_of_json_loads(others, text, escaped, block):
    data = json.dumps(others | {"text": text}, ensure_ascii=escaped).encode(
        "utf-8", "surrogatepass"
    )
    try:
        text.encode()
    except UnicodeEncodeError:
        if not escaped:
            return  # not UTF-8
    assert streamed(data, block) == json.loads(data)["text"]


@pytest.mark.parametrize(
    "data, message",
    [
        (b"[1, 2]", "found list, expected an object"),
        (b'{"txt": "a", "n": 1}', "no field 'text', found 'txt', 'n'"),
        (b'{"text": 3}', "field 'text': found number, expected a string"),
        (b'{"text": null}', "field 'text': found NoneType, expected a string"),
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "a', "a string that does not end"),
        (b'{"text": "a"} x', "data after the object at character 14"),
        (b'{"text": "a", }', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8 .* at byte 10 of the line"),
        (b'{"text": "a\\x"}', "a bad character in it"),
        (b'{"text": "a", "text": "b"}', "the field 'text' twice"),
        (b'{"a": ' + b"[" * 2000, "nested more than 1000 deep"),
        (b'{"a": nul}', "expected a value"),
    ],
)
def test_what_is_wrong_is_named(data, message):
    with pytest.raises(JsonFieldError, match=message):
        streamed(data, 5)
