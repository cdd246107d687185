"""Hostile and damaged safetensors files and indices are refused, or read as their headers say."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from btlm_jax.convert.hf.headers import SAFETENSORS_DTYPES
from support import golden
from support.hostile_files import (
    BIN,
    MANY_EXAMPLES,
    MODEL,
    assert_equal_tensors,
    mutated_bytes,
    read_everything,
    refusal,
)

CASE = golden.load("b_sp_alibi")


@pytest.fixture(scope="module")
def golden_file(tmp_path_factory) -> bytes:
    return (golden.write_hf(tmp_path_factory.mktemp("hf") / "x", CASE) / MODEL).read_bytes()


def split_safetensors(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Returns the header of a safetensors file, and its data."""
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def join_safetensors(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def tensors_by_header(raw: bytes) -> dict[str, np.ndarray]:
    """Returns the tensors of an accepted file by its header, which must fill the file exactly."""
    header, data = split_safetensors(raw)
    header.pop("__metadata__", None)
    spans = sorted(tuple(e["data_offsets"]) for e in header.values())
    assert all(a <= b for a, b in spans) and spans[-1][1] == len(data) and spans[0][0] == 0
    assert all(b == c for (_, b), (c, _) in itertools.pairwise(spans))
    return {
        name: np.frombuffer(data[slice(*e["data_offsets"])], SAFETENSORS_DTYPES[e["dtype"]])
        .reshape(e["shape"])
        for name, e in header.items()
    }  # fmt: skip


def check_safetensors(raw: bytes) -> None:
    arrays, errors = read_everything({MODEL: raw})
    if not errors:
        expected = tensors_by_header(raw)
        assert set(arrays) == set(expected)
        assert_equal_tensors(arrays, expected)
    assert not errors or list(errors) == [""]


@MANY_EXAMPLES
@given(data=st.data())
def test_safetensors_with_mutated_bytes_are_refused_or_read_as_described(golden_file, data):
    header_end = 8 + int.from_bytes(golden_file[:8], "little")
    check_safetensors(data.draw(mutated_bytes(golden_file, (0, header_end + 8))))


# Values in place of a name, a number or a list of numbers.
ODD = [
    None, True, 0, 1, -1, 1.0, 1.5, 1e300, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64,
    10**30, "", "F32", "BF16", "F64", "F8_E4M3", "F4", "BOOL", "x", [], [0], [0, 0], [0, 4], [4, 0],
    [-4, 0], [0.0, 4.0], [None], ["4"], [[4]], [1 << 63, 1 << 63], [0, 4, 8], {}, {"a": 1},
    {"F32": None}, [0, 2**62], [2**63, 0], [1] * 65,
]  # fmt: skip


@MANY_EXAMPLES
@given(data=st.data())
def test_safetensors_with_mutated_headers_are_refused_or_read_as_described(data):
    """Overlapping, exchanged and shifted offsets, and wrong types, names, shapes and dtypes."""
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(6, 12, dtype=np.float32),
        "c": np.arange(4, dtype=np.float16),
        "d": np.zeros((0, 3), np.int64),
        "e": np.array(5, np.int8),
        "f": np.arange(3, dtype=np.uint8),  # at an odd offset
    }
    header, payload = split_safetensors(save(tensors, {"format": "pt"}))
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from([n for n in header if n != "__metadata__"]))
        entry = header[name]
        kinds = ["field", "shift", "exchange", "add", "list", "drop", "item"]
        kind = data.draw(st.sampled_from(kinds))
        whole = isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list)
        if kind == "field" and isinstance(entry, dict):
            field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            entry[field] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
        elif kind == "shift" and whole:
            delta = data.draw(st.sampled_from([-8, -4, -1, 1, 4, 24, 1 << 40]))
            entry["data_offsets"] = [
                x + delta if isinstance(x, int) else x for x in entry["data_offsets"]
            ]
        elif kind == "exchange":
            other = data.draw(st.sampled_from(sorted(header)))
            header[name], header[other] = header[other], header[name]
        elif kind == "add":
            new = data.draw(st.sampled_from(["__metadata__", "", "\n", "../x", "a\0", "\u2028"]))
            header[new] = copy.deepcopy(entry)
        elif kind == "list" and isinstance(entry, dict):
            header[name] = list(entry.values())
        elif kind == "drop" and isinstance(entry, dict) and entry:
            del entry[data.draw(st.sampled_from(sorted(entry)))]
        elif kind == "item" and whole:
            entry["data_offsets"].append(data.draw(st.sampled_from(ODD)))
    check_safetensors(join_safetensors(json.dumps(header).encode(), payload))


F32 = b'"dtype": "F32", "shape": [1], "data_offsets": [0, 4]'


EMPTY = b'"dtype": "F32", "data_offsets": [4, 4]'


HEADERS = {
    "entry is a list": b'{"a": ["F32", [1], [0, 4]]}',
    "dtype is an object": b'{"a": {"dtype": {"F32": null}, "shape": [1], "data_offsets": [0, 4]}}',
    "axis of 2**64 - 1": b'{"a": {%b}, "b": {"dtype": "I8", "shape": [0, %d], %b}}'
    % (F32, 2**64 - 1, b'"data_offsets": [4, 4]'),
    "axis of 2**62": b'{"a": {%b}, "b": {"dtype": "I64", "shape": [%d, 0], %b}}'
    % (F32, 2**62, b'"data_offsets": [4, 4]'),
    "65 axes": b'{"a": {"dtype": "F32", "shape": [%b], "data_offsets": [0, 4]}}'
    % b",".join([b"1"] * 65),
    "name twice": b'{"a": {%b}, "a": {%b}}' % (F32, F32),
    "field twice": b'{"a": {%b, "dtype": "F32"}}' % F32,
    "metadata twice": b'{"a": {%b}, "__metadata__": {}, "__metadata__": {}}' % F32,
    "text twice in metadata": b'{"a": {%b}, "__metadata__": {"x": "1", "x": "2"}}' % F32,
    "metadata of numbers": b'{"a": {%b}, "__metadata__": {"x": 1}}' % F32,
    "metadata is a list": b'{"a": {%b}, "__metadata__": []}' % F32,
    "overlap": b'{"a": {%b}, "b": {%b}}' % (F32, F32),
    "a byte missing": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 3]}}',
    "a byte left over": b'{"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}',
    "a gap": b'{"a": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}}',
    "backwards": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
    "shape overflows": b'{"a": {"dtype": "F32", "shape": [%d, 4], "data_offsets": [0, 4]}}' % 2**62,
    "deep extra field": b'{"a": {%b, "x": %b}}' % (F32, b"[" * 100_000 + b"]" * 100_000),
    "deep name": b'{"a": %b}' % (b'{"a":' * 100_000),
    "long number": b'{"a": {%b, "x": 1%b}}' % (F32, b"0" * 5000),
    "NaN": b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}',
    "trailing text": b'{"a": {%b}} {}' % F32,
    "byte order mark": b'\xef\xbb\xbf{"a": {%b}}' % F32,
    "UTF-16": (b'{"a": {%b}}' % F32).decode().encode("utf-16"),
    "lone surrogate": b'{"\\ud800": {%b}}' % F32,
    "not UTF-8": b'{"\xff": {%b}}' % F32,
    "a list": b"[]",
    "null": b"null",
    "nothing": b"",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=list(HEADERS))
def test_hostile_headers_are_refused(header):
    assert MODEL in refusal({MODEL: join_safetensors(header, bytes(4))})


def test_unusual_but_valid_headers_are_accepted():
    for header in (
        b'{"a": {%b}, "__metadata__": null}' % F32,
        b'{"a": {%b, "x": [[[1]]]}}  ' % F32,
        b'{"a": {%b}, "": {"dtype": "I64", "shape": [3, 0, 9], "data_offsets": [0, 0]}}' % F32,
    ):
        check_safetensors(join_safetensors(header, b"\1\2\3\4"))
        assert not read_everything({MODEL: join_safetensors(header, b"\1\2\3\4")})[1]


@pytest.mark.parametrize(
    "size", [0, 2, 3, 99, 1 << 20, 99_999_999, 1 << 32, 1 << 63, (1 << 64) - 1]
)
def test_wrong_header_lengths_are_refused(size):
    raw = join_safetensors(b'{"a": {%b}}' % F32, bytes(4))
    assert MODEL in refusal({MODEL: size.to_bytes(8, "little") + raw[8:]})


def test_files_of_zeros_and_other_kinds_are_refused():
    for raw in (b"", bytes(7), bytes(8), bytes(1 << 20), b"\xff" * 1000, b"PK\3\4" + bytes(99)):
        for name in (MODEL, BIN):
            assert name in refusal({name: raw})


SHARDS = {
    "model-00001-of-00002.safetensors": {"a": np.arange(6.0), "b": np.arange(3)},
    "model-00002-of-00002.safetensors": {"c": np.ones((2, 2), np.float16), "d": np.array(True)},
}


SHARDED = {name: save(tensors) for name, tensors in SHARDS.items()}


WEIGHT_MAP = {n: shard for shard, tensors in SHARDS.items() for n in tensors}


INDEX = "model.safetensors.index.json"


def index_file(weight_map: Any, **more: Any) -> dict[str, bytes]:
    return {INDEX: json.dumps({"weight_map": weight_map} | more).encode()}


@MANY_EXAMPLES
@given(data=st.data())
def test_mutated_indices_are_refused_or_lead_to_the_right_tensors(data):
    """All tensors that the index names are read, or it is refused."""
    weight_map: dict[str, Any] = dict(WEIGHT_MAP)
    values = [
        *SHARDS, "../hf/model-00001-of-00002.safetensors", "/etc/passwd", "config.json", INDEX, ".",
        "model-00003-of-00003.safetensors", "model.safetensors", "", None, 3, [], {}, "x\0", "a/b",
    ]  # fmt: skip
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(["a", "b", "c", "d", "e", "", "a "]))
        if data.draw(st.booleans()):
            weight_map[name] = data.draw(st.sampled_from(values))
        else:
            weight_map.pop(name, None)
    files, (first, second) = SHARDED | index_file(weight_map), SHARDS
    lie = data.draw(st.sampled_from([None, None, None, "same shard", "one more"]))
    if lie == "same shard":
        files[second] = files[first]
    if lie == "one more":
        files[second] = save(SHARDS[second] | {"a": np.zeros(6)})
    arrays, errors = read_everything(files)
    assert errors or set(arrays) == set(weight_map)
    assert_equal_tensors(arrays, {n: x for tensors in SHARDS.values() for n, x in tensors.items()})


@MANY_EXAMPLES
@given(data=st.data())
def test_mutated_shards_and_indices_are_refused_or_read_as_described(data):
    files = SHARDED | index_file(WEIGHT_MAP)
    name = data.draw(st.sampled_from(sorted(files)))
    files[name] = data.draw(mutated_bytes(files[name]))
    arrays, errors = read_everything(files)
    if errors:
        return
    if name == INDEX:  # its values are plain file names: nothing else than these can come out
        assert_equal_tensors(
            arrays, {n: x for tensors in SHARDS.values() for n, x in tensors.items()}
        )
    else:
        (other,) = set(SHARDS) - {name}
        assert_equal_tensors(arrays, SHARDS[other] | tensors_by_header(files[name]))


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b'"x"', b"1e999", b'{"weight_map": {"a": "x", "a": "y"}}',
        b'{"weight_map": {}, "weight_map": {}}', b"[" * 200_000, b'{"a":' * 200_000,
        b'{"weight_map": {"a": 1' + b"0" * 9999 + b"}}", b'{"weight_map": NaN}',
        b"\xff\xfe", b"{}\0",
    ],
)  # fmt: skip
def test_invalid_indices_are_refused(text):
    assert INDEX in refusal(SHARDED | {INDEX: text})


def test_an_index_with_a_name_too_long_for_the_file_system_is_refused():
    assert INDEX in refusal(index_file({"a": "x" * 5000}))
