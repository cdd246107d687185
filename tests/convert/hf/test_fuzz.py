"""Hostile and damaged checkpoints: refused by name, or read exactly as their headers say.

Real files are mutated, and hostile ones made here. Whatever is in them, `open_hf` and reading end
within seconds in ValueError or FileNotFoundError that names the file, or in the tensors that the
file describes: never in another exception, a hang or a wrong tensor.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import io
import itertools
import json
import math
import os
import pickle
import posix
import shutil
import signal
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

import btlm_jax as btlm
from btlm_jax.convert import convert, export, verify
from btlm_jax.convert.hf.headers import SAFETENSORS_DTYPES
from btlm_jax.convert.hf.source import open_hf
from support import golden as golden_lib
from support.torch_pickles import archive, numbers, pickled, storage, tensor, text

BTLM_BIN, TORCH_BIN = golden_lib.GOLDEN / "btlm_bin", golden_lib.GOLDEN / "torch_bin"
SHARED = {"shared.head", "shared.tail", "shared.strided"}  # parts of a storage: no checksum
MODEL = "model.safetensors"
BIN = "pytorch_model.bin"

Expected = Mapping[str, np.ndarray]


@contextlib.contextmanager
def folder(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A checkpoint directory of these files; a config.json is added if there is none."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "hf"
        path.mkdir()
        for file, data in ({"config.json": b"{}"} | dict(files)).items():
            (path / file).write_bytes(data)
        yield path


@contextlib.contextmanager
def bounded(seconds: float = 5.0) -> Iterator[None]:
    """Fails what takes longer: soon, if it waits or loops, and by CPU time on a busy machine."""

    def stop(*_):
        raise TimeoutError("the example hangs")

    before, began = signal.signal(signal.SIGALRM, stop), time.process_time()
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - began < seconds


def outcome(files: Mapping[str, bytes]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Opens a directory and reads every tensor in every way.

    Returns:
        The tensors, and the messages of refusals: by tensor, or under "" if it does not open.
    """
    arrays: dict[str, np.ndarray] = {}
    errors: dict[str, str] = {}
    with folder(files) as path, bounded():
        try:
            source = open_hf(path)
        except (ValueError, FileNotFoundError) as error:
            assert str(path) in str(error)
            return {}, {"": str(error)}
        for name, info in source.tensors.items():
            try:
                array = source.read_tensor(name)
                blocks = list(source.blocks(name, max(info.size // 3, 1)))
            except ValueError as error:
                assert str(info.file) in str(error)
                errors[name] = str(error)
                continue
            assert (array.shape, array.dtype) == (info.shape, info.dtype)
            assert b"".join(b.tobytes() for b in blocks) == array.tobytes()
            part = tuple(slice(n // 2) for n in info.shape)
            # `...` keeps a scalar an array: a NumPy bool would lose a byte that is neither 0 nor 1.
            assert source.read_tensor(name, part).tobytes() == array[(*part, ...)].tobytes()
            arrays[name] = array
    return arrays, errors


def refusal(files: Mapping[str, bytes]) -> str:
    arrays, errors = outcome(files)
    assert not arrays and list(errors) == [""]
    return errors[""]


def assert_same(found: Expected, expected: Expected) -> None:
    for name, array in found.items():
        assert (array.shape, array.dtype) == (expected[name].shape, expected[name].dtype), name
        assert array.tobytes() == expected[name].tobytes(), name


# Mutations of bytes.


def places(low: int, high: int) -> st.SearchStrategy[int]:
    """Numbers from `low` to `high`, all as likely: Hypothesis itself prefers the ends."""
    span = high - low + 1
    return st.integers(0, 2**32 - 1).map(lambda n: low + n * 2_654_435_761 % 2**32 % span)


@st.composite
def mutated(draw, raw: bytes, hot: tuple[int, int] | None = None) -> bytes:
    """1 to 3 changes: flips, numbers, cuts, insertions, repetitions; half of them in `hot`."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        low, high = hot if hot and draw(st.booleans()) else (0, len(data))
        last = max(min(high, len(data)) - 1, 0)
        at = draw(places(min(low, last), last))
        kind = draw(st.sampled_from(["flip", "byte", "number", "cut", "delete", "insert", "copy"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "number":
            width = draw(st.sampled_from([2, 4, 8]))
            value = draw(st.sampled_from([0, 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1]))
            data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == "cut":
            del data[at:]
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        else:
            source = draw(places(0, max(len(data) - 1, 0)))
            data[at:at] = data[source : source + draw(st.integers(1, 200))]
    return bytes(data)


# safetensors.

CASE = golden_lib.load("b_sp_alibi")


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> bytes:
    return (golden_lib.write_hf(tmp_path_factory.mktemp("hf") / "x", CASE) / MODEL).read_bytes()


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its data."""
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def join(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def described(raw: bytes) -> dict[str, np.ndarray]:
    """What a file that was accepted must hold, by its own header; it must fill the file exactly."""
    header, data = split(raw)
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
    arrays, errors = outcome({MODEL: raw})
    if not errors:
        expected = described(raw)
        assert set(arrays) == set(expected)
        assert_same(arrays, expected)
    assert not errors or list(errors) == [""]


@settings(max_examples=400)
@given(data=st.data())
def test_mutated_bytes_of_safetensors(golden, data):
    header_end = 8 + int.from_bytes(golden[:8], "little")
    check_safetensors(data.draw(mutated(golden, (0, header_end + 8))))


# What stands where a name, a number or a list of numbers should.
ODD = [
    None, True, 0, 1, -1, 1.0, 1.5, 1e300, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64,
    10**30, "", "F32", "BF16", "F64", "F8_E4M3", "F4", "BOOL", "x", [], [0], [0, 0], [0, 4], [4, 0],
    [-4, 0], [0.0, 4.0], [None], ["4"], [[4]], [1 << 63, 1 << 63], [0, 4, 8], {}, {"a": 1},
    {"F32": None}, [0, 2**62], [2**63, 0], [1] * 65,
]  # fmt: skip


@settings(max_examples=500)
@given(data=st.data())
def test_mutated_headers_of_safetensors(data):
    """Overlapping, exchanged and shifted offsets, and wrong types, names, shapes and dtypes."""
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(6, 12, dtype=np.float32),
        "c": np.arange(4, dtype=np.float16),
        "d": np.zeros((0, 3), np.int64),
        "e": np.array(5, np.int8),
        "f": np.arange(3, dtype=np.uint8),  # at an odd offset
    }
    header, payload = split(save(tensors, {"format": "pt"}))
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
    check_safetensors(join(json.dumps(header).encode(), payload))


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
def test_hostile_headers(header):
    assert MODEL in refusal({MODEL: join(header, bytes(4))})


def test_harmless_headers():
    """What is odd, but says clearly what it means."""
    for header in (
        b'{"a": {%b}, "__metadata__": null}' % F32,
        b'{"a": {%b, "x": [[[1]]]}}  ' % F32,
        b'{"a": {%b}, "": {"dtype": "I64", "shape": [3, 0, 9], "data_offsets": [0, 0]}}' % F32,
    ):
        check_safetensors(join(header, b"\1\2\3\4"))
        assert not outcome({MODEL: join(header, b"\1\2\3\4")})[1]


@pytest.mark.parametrize(
    "size", [0, 2, 3, 99, 1 << 20, 99_999_999, 1 << 32, 1 << 63, (1 << 64) - 1]
)
def test_lying_header_lengths(size):
    raw = join(b'{"a": {%b}}' % F32, bytes(4))
    assert MODEL in refusal({MODEL: size.to_bytes(8, "little") + raw[8:]})


def test_files_of_zeros_and_of_other_kinds():
    for raw in (b"", bytes(7), bytes(8), bytes(1 << 20), b"\xff" * 1000, b"PK\3\4" + bytes(99)):
        for name in (MODEL, BIN):
            assert name in refusal({name: raw})


# Indices over shards.

SHARDS = {
    "model-00001-of-00002.safetensors": {"a": np.arange(6.0), "b": np.arange(3)},
    "model-00002-of-00002.safetensors": {"c": np.ones((2, 2), np.float16), "d": np.array(True)},
}
SHARDED = {name: save(tensors) for name, tensors in SHARDS.items()}
WEIGHT_MAP = {n: shard for shard, tensors in SHARDS.items() for n in tensors}
INDEX = "model.safetensors.index.json"


def index(weight_map: Any, **more: Any) -> dict[str, bytes]:
    return {INDEX: json.dumps({"weight_map": weight_map} | more).encode()}


@settings(max_examples=150)
@given(data=st.data())
def test_lying_indices(data):
    """Whatever an index says: the right tensors, all that it names, or a refusal."""
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
    files, (first, second) = SHARDED | index(weight_map), SHARDS
    lie = data.draw(st.sampled_from([None, None, None, "same shard", "one more"]))
    if lie == "same shard":
        files[second] = files[first]
    if lie == "one more":
        files[second] = save(SHARDS[second] | {"a": np.zeros(6)})
    arrays, errors = outcome(files)
    assert errors or set(arrays) == set(weight_map)
    assert_same(arrays, {n: x for tensors in SHARDS.values() for n, x in tensors.items()})


@settings(max_examples=200)
@given(data=st.data())
def test_mutated_sharded_files(data):
    files = SHARDED | index(WEIGHT_MAP)
    name = data.draw(st.sampled_from(sorted(files)))
    files[name] = data.draw(mutated(files[name]))
    arrays, errors = outcome(files)
    if errors:
        return
    if name == INDEX:  # its values are plain file names: nothing else than these can come out
        assert_same(arrays, {n: x for tensors in SHARDS.values() for n, x in tensors.items()})
    else:
        (other,) = set(SHARDS) - {name}
        assert_same(arrays, SHARDS[other] | described(files[name]))


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b'"x"', b"1e999", b'{"weight_map": {"a": "x", "a": "y"}}',
        b'{"weight_map": {}, "weight_map": {}}', b"[" * 200_000, b'{"a":' * 200_000,
        b'{"weight_map": {"a": 1' + b"0" * 9999 + b"}}", b'{"weight_map": NaN}',
        b"\xff\xfe", b"{}\0",
    ],
)  # fmt: skip
def test_indices_that_are_none(text):
    assert INDEX in refusal(SHARDED | {INDEX: text})


def test_an_index_with_a_name_too_long_for_the_file_system():
    assert INDEX in refusal(index({"a": "x" * 5000}))


# torch .bin.


def bfloat16(file: Path, names: set[str] | None = None) -> dict[str, np.ndarray]:
    """An .npz, with arrays of uint16 (or those named) as the bfloat16 they stand for."""
    with np.load(file) as z:
        arrays = {name: z[name] for name in z.files}
    return {
        n: x.view(ml_dtypes.bfloat16) if n in (names or arrays) else x for n, x in arrays.items()
    }


MASKS = {
    "transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8),
    "transformer.h.0.attn.masked_bias": np.array(-1e4, np.float32),
}
STATE = bfloat16(TORCH_BIN / "state_dict.npz", {"bf16.weight"})
BTLM = bfloat16(BTLM_BIN / "weights.npz") | MASKS
BTLM["lm_head.weight"] = BTLM["transformer.wte.weight"]


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


# Directories of .bin files made by torch, and what is in them.
BINS: dict[str, tuple[dict[str, bytes], Expected]] = {
    "state_dict": ({BIN: (TORCH_BIN / "state_dict.bin").read_bytes()}, STATE),
    "state_dict sharded": (files_of(TORCH_BIN / "sharded"), STATE),
    "btlm": (files_of(BTLM_BIN / "single"), BTLM),
    "btlm sharded": (files_of(BTLM_BIN / "sharded"), BTLM),
}


@pytest.mark.parametrize("form", BINS)
def test_untouched_bins(form):
    files, expected = BINS[form]
    arrays, errors = outcome(files)
    assert not errors and set(arrays) == set(expected)
    assert_same(arrays, expected)


@settings(max_examples=500)
@given(data=st.data())
def test_mutated_bins(data):
    """Checksums guard the description and every tensor that fills its storage."""
    files, expected = BINS[data.draw(st.sampled_from(sorted(BINS)))]
    name = data.draw(st.sampled_from(sorted(n for n in files if n.endswith(".bin"))))
    directory = files[name].index(b"PK\1\2"), len(files[name])
    arrays, errors = outcome(files | {name: data.draw(mutated(files[name], directory))})
    assert "" in errors or set(arrays) | set(errors) == set(expected)
    assert_same({n: x for n, x in arrays.items() if n not in SHARED}, expected)


def payload(raw: bytes) -> list[tuple[int, int]]:
    """The spans of the storages in a zip."""
    with zipfile.ZipFile(io.BytesIO(raw)) as z:
        infos = [i for i in z.infolist() if "/data/" in i.filename]
        starts = [i.header_offset for i in infos]
        lengths = [struct.unpack("<HH", raw[at + 26 : at + 30]) for at in starts]
    begins = [at + 30 + sum(pair) for at, pair in zip(starts, lengths, strict=True)]
    return [(b, b + i.file_size) for b, i in zip(begins, infos, strict=True) if i.file_size]


@settings(max_examples=200)
@given(data=st.data())
def test_any_flipped_bit_of_the_payload_is_found(data):
    form = data.draw(st.sampled_from(["state_dict", "btlm", "btlm sharded"]))
    files, expected = BINS[form]
    name = data.draw(st.sampled_from(sorted(n for n in files if n.endswith(".bin"))))
    raw = bytearray(files[name])
    begin, end = data.draw(st.sampled_from(payload(files[name])))
    at = data.draw(places(begin, end - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    arrays, errors = outcome(files | {name: bytes(raw)})
    assert all("checksum mismatch" in message for message in errors.values())
    different = {n for n, x in arrays.items() if x.tobytes() != expected[n].tobytes()}
    if different:  # it hit the storage that three tensors share: none of them fills it
        assert different <= SHARED and not errors
    else:
        tied = {"transformer.wte.weight", "lm_head.weight"}
        hit_shared = form == "state_dict" and not errors  # between the three
        assert hit_shared or len(errors) == 1 or set(errors) == tied
    assert set(arrays) | set(errors) == set(expected)


@settings(max_examples=250)
@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    data=st.data(),
    offset=st.integers(0, 6),
    held=st.integers(0, 24),
    declared=st.integers(-1, 1),
)
def test_any_shape_strides_and_offset(shape, data, offset, held, declared):
    """A tensor is what its description selects from its storage; refused if that is not there."""
    strides = tuple(data.draw(st.integers(0, 12)) for _ in shape)
    bytes_held = np.arange(held, dtype=np.float32).tobytes()
    numel = max(held + data.draw(st.sampled_from([0, 0, 0, declared])), 0)
    pkl = pickled(a=tensor(storage(numel=numel), offset, tuple(shape), strides))
    raw = zipped(pkl, {"m/data/0": bytes_held})
    places = [
        offset + sum(i * s for i, s in zip(at, strides, strict=True)) for at in np.ndindex(*shape)
    ]
    fine = numel == held and len(places) <= held
    fine &= all(p < held for p in places) if places else offset <= held
    arrays, errors = outcome({BIN: raw})
    assert bool(arrays) == fine
    if fine:
        expected = np.array(places, np.float32).reshape(shape)
        assert not errors
        assert_same(arrays, {"a": expected})


def zipped(pkl: bytes, members: Mapping[str, bytes] | None = None, **kwargs: Any) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        return archive(Path(name) / "x", pkl, members and dict(members), **kwargs).read_bytes()


class Call:
    """Pickles as a call, which unpickling would make."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self._call = function, args

    def __reduce__(self):
        return self._call


def payloads(flag: Path) -> dict[str, bytes]:
    """Pickles that would create `flag`, exhaust memory, hang or crash the standard unpickler."""
    touch, code = f"touch {flag}", f"open({str(flag)!r}, 'w')"
    call = {
        "os.system": Call(os.system, touch),
        "posix.system": Call(posix.system, touch),
        "builtins.eval": Call(builtins.eval, code),
        "builtins.exec": Call(builtins.exec, code),
        "builtins.open": Call(open, str(flag), "w"),
        "shutil.rmtree": Call(shutil.rmtree, str(flag.parent)),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
        "nested": {"a": [({"b": (Call(posix.system, touch),)},)]},
        "key": {Call(posix.system, touch): 1},
    }
    out = {f"{n} {p}": pickle.dumps(x, p) for n, x in call.items() for p in (0, 1, 2, 4, 5)}
    system = b"cposix\nsystem\n"
    argument = text(touch)
    out |= {
        "reduce in a dict": pickled(a=system + b"(" + argument + b"tR"),
        "as hooks": pickled(a=tensor(hooks=system + b"(" + argument + b"tR")),
        "as storage": pickled(a=tensor(at=system + b"(" + argument + b"tR")),
        "as shape": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + b"K\0"
        + system + argument + b"\x85R" + numbers((1,)) + b"\x89}tR.",
        "in a persistent id": b"\x80\x02" + system + argument + b"\x85RQ.",
        "in a text persistent id": b"\x80\x02Pposix.system\n.",
        "inst": b"(" + argument + b"iposix\nsystem\n.",
        "obj": b"(" + system + argument + b"o.",
        "newobj": system + argument + b"\x85\x81.",
        "newobj_ex": system + argument + b"\x85}\x92.",
        "stack_global": b"\x80\x04" + text("posix") + text("system") + b"\x93" + argument
        + b"\x85R.",
        "dotted": b"\x80\x04" + text("torch._utils")
        + text("_rebuild_tensor_v2.__globals__") + b"\x93.",
        "global of a global": b"\x80\x04" + system + text("x") + b"\x93.",
        "build": b"\x80\x02ccollections\nOrderedDict\n)R}" + text("x") + system + b"sb.",
        "build an OrderedDict": b"\x80\x02ccollections\nOrderedDict\n}b.",
        "setstate": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + system + b"tb.",
        "ext1": b"\x80\x02\x82\x01.", "ext2": b"\x80\x02\x83\1\1.",
        "ext4": b"\x80\x02\x84\1\1\1\1.",
        "long4": b"\x80\x02\x8b\xff\xff\xff\x7f.", "long4 < 0": b"\x80\x02\x8b\xff\xff\xff\xff.",
        "long1": b"\x80\x02\x8a\xff.", "binunicode": b"\x80\x02X\xff\xff\xff\xff.",
        "binunicode8": b"\x80\x04\x8d" + b"\xff" * 8 + b".",
        "binbytes": b"\x80\x03B\xff\xff\xff\xff.",
        "binbytes8": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
        "bytearray8": b"\x80\x05\x96" + b"\xff" * 8 + b".", "binstring": b"T\xff\xff\xff\xff.",
        "frame": b"\x80\x04\x95" + b"\xff" * 8 + b".", "next_buffer": b"\x80\x05\x97.",
        "long_binput": b"\x80\x02]r\xff\xff\xff\xff.", "put": b"]p99999999999999999999\n.",
        "get": b"g1\n.", "pop": b"0.", "pop_mark": b"1.", "dup": b"]2.", "mark": b"(.",
        "int": b"I" + b"9" * 10_000 + b"\n.", "long": b"L" + b"9" * 10_000 + b"L\n.",
        "float": b"Fnan\n.", "string": b"S'\\x'\n.", "unicode": b"V\\ud800\n.",
        "long numbers": pickled(a=tensor(offset=1 << 2000)),
        "list in itself": b"\x80\x02]q\0h\0a.",
        "dict in itself": b"\x80\x02}q\0" + text("a") + b"h\0s.",
        "cyclic hooks": pickled(a=tensor(hooks=b"}q\x07" + text("x") + b"h\x07s")),
        "deep list": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "deep hooks": pickled(a=tensor(hooks=b"]" * 50_000 + b"a" * 49_999)),
        "deep dict": b"\x80\x02" + (b"}" + text("a")) * 50_000 + b"}" + b"s" * 50_000 + b".",
        "deep tuple as a key": b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\1s.",
        "many marks": b"\x80\x02" + b"(" * 1_000_000 + b".",
        "many strings": b"\x80\x02" + text("x") * 200_000 + b".",
        "tuple of tuples": b"\x80\x02)" + b"\x94\x94\x86".join([b"h\0"] * 1000) + b".",
        "no opcodes": b"", "only a stop": b".", "zeros": bytes(1000), "ones": b"\xff" * 1000,
    }  # fmt: skip
    return out


def test_hostile_pickles(tmp_path):
    flag = tmp_path / "ran"
    found = payloads(flag)
    assert len(found) > 100
    for name, pkl in found.items():
        raw = zipped(pkl)
        message = refusal({BIN: raw})
        assert BIN in message and len(message) < 1000 and "\n" not in message, name
    assert os.listdir(tmp_path) == []


def test_hostile_pickles_do_not_convert(tmp_path):
    config = (BTLM_BIN / "single/config.json").read_bytes()
    flag = tmp_path / "ran"
    hostile = payloads(flag)
    for name in ("os.system 2", "nested 4", "as hooks", "stack_global", "inst"):
        assert "refused" in unconverted({"config.json": config, BIN: zipped(hostile[name])})
    assert not flag.exists()


@settings(max_examples=400)
@given(data=st.data())
def test_mutated_pickles(data):
    """The description itself, under a valid checksum: what it states is in the storages."""
    with zipfile.ZipFile(TORCH_BIN / "state_dict.bin") as z:
        members = {i.filename.replace("state_dict/", "m/"): z.read(i) for i in z.infolist()}
    pkl = data.draw(mutated(members.pop("m/data.pkl")))
    arrays, errors = outcome({BIN: zipped(pkl, members)})
    assert set(errors) <= {""}
    held = sum(len(x) for n, x in members.items() if "/data/" in n)
    assert sum(x.nbytes for n, x in arrays.items() if n not in SHARED) <= 10 * held


# Zip archives.

PKL = pickled(a=tensor())
FLOATS = np.arange(4, dtype=np.float32)


def patched(raw: bytes, name: str, at: int, value: bytes, *, local: int | None = None) -> bytes:
    """`raw` with bytes of a member's entry in the central directory (and local header) replaced."""
    data, signature, length = bytearray(raw), b"PK\1\2", 46
    position = raw.index(signature)
    while raw[position + length : position + length + len(name)] != name.encode():
        position = raw.index(signature, position + 1)
    data[position + at : position + at + len(value)] = value
    if local is not None:
        header = int.from_bytes(raw[position + 42 : position + 46], "little")
        data[header + local : header + local + len(value)] = value
    return bytes(data)


def test_the_zip_made_here_is_read():
    arrays, errors = outcome({BIN: zipped(PKL)})
    assert not errors
    assert_same(arrays, {"a": FLOATS})
    comment = zipped(PKL)[:-2] + b"\5\0hello"
    assert not outcome({BIN: comment})[1]


HUGE = b"\xff\xff\xff\x7f"
ZIPS = {
    "deflated": lambda: zipped(PKL, compression=zipfile.ZIP_DEFLATED),
    "bzip2": lambda: zipped(PKL, compression=zipfile.ZIP_BZIP2),
    "lzma": lambda: zipped(PKL, compression=zipfile.ZIP_LZMA),
    "bomb": lambda: zipped(
        pickled(a=tensor(storage(numel=1 << 24), shape=(1 << 24,))),
        {"m/data/0": bytes(1 << 26)}, compression=zipfile.ZIP_DEFLATED,
    ),
    "bomb of a pickle": lambda: zipped(b"\x80\x02" + bytes(1 << 24), compression=zipfile.ZIP_LZMA),
    "unknown method": lambda: patched(zipped(PKL), "m/data/0", 10, b"\x63\0", local=8),
    "encrypted": lambda: patched(zipped(PKL), "m/data/0", 8, b"\1\0", local=6),
    "larger than stored": lambda: patched(zipped(PKL), "m/data/0", 24, HUGE, local=22),
    "larger than the file": lambda: patched(
        patched(zipped(PKL), "m/data/0", 24, HUGE, local=22), "m/data/0", 20, HUGE, local=18
    ),
    "pickle larger than the file": lambda: patched(
        patched(zipped(PKL), "m/data.pkl", 24, HUGE), "m/data.pkl", 20, HUGE
    ),
    "shorter": lambda: patched(
        patched(zipped(PKL), "m/data/0", 24, b"\4\0\0\0"), "m/data/0", 20, b"\4\0\0\0"
    ),
    "elsewhere": lambda: patched(zipped(PKL), "m/data/0", 42, HUGE),
    "at the pickle": lambda: patched(zipped(PKL), "m/data/0", 42, bytes(4)),
    "wrong checksum of the pickle": lambda: patched(zipped(PKL), "m/data.pkl", 16, b"\1\2\3\4"),
    "no such storage": lambda: zipped(PKL, {"m/data/1": FLOATS.tobytes()}),
    "storage elsewhere": lambda: zipped(PKL, {"n/data/0": FLOATS.tobytes()}),
    "empty archive": lambda: b"PK\5\6" + bytes(18),
    "only a directory": lambda: zipped(PKL)[zipped(PKL).index(b"PK\1\2") :],
    "two archives": lambda: zipped(PKL) + zipped(b"\x80\x02]."),
    "big-endian": lambda: zipped(PKL, {"m/data/0": FLOATS.tobytes(), "m/byteorder": b"big"}),
}  # fmt: skip


@pytest.mark.parametrize("make", ZIPS.values(), ids=list(ZIPS))
def test_hostile_zips(make):
    raw = make()
    assert len(raw) < 100_000
    arrays, errors = outcome({BIN: raw})
    assert errors and not arrays


def test_a_wrong_checksum_of_a_tensor():
    _, errors = outcome({BIN: patched(zipped(PKL), "m/data/0", 16, b"\1\2\3\4")})
    assert "checksum mismatch" in errors["a"]


@pytest.mark.parametrize(
    "name", ["../x", "m/../../x", "/etc/x", "m\\x", "C:/x", "..", "m/data/../../../x", "x/.."]
)
def test_tricks_with_paths(name):
    assert "points outside" in refusal({BIN: zipped(PKL, {"m/data/0": bytes(16), name: b""})})
    evil = zipped(pickled(a=tensor(storage(key=name))), {"m/data/0": bytes(16)})
    assert "persistent id" in refusal({BIN: evil})


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice():
    raw = io.BytesIO(zipped(PKL))
    with zipfile.ZipFile(raw, "a") as z:
        z.writestr("m/data/0", bytes(16))
    assert "occurs twice" in refusal({BIN: raw.getvalue()})


def test_many_tensors_of_one_storage():
    """A small file may name its storage often, but is read one tensor at a time."""
    many = {f"t{i}": tensor(storage(numel=1 << 18), shape=(1 << 18,)) for i in range(500)}
    raw = zipped(pickled(**many), {"m/data/0": bytes(1 << 20)})
    with folder({BIN: raw}) as path, bounded():
        source = open_hf(path)
        assert len(source.tensors) == 500
        assert not source.read_tensor("t499").any()


# Whole conversions.

CONFIG = (BTLM_BIN / "single/config.json").read_bytes()
PLAIN = {n: x for n, x in BTLM.items() if n not in MASKS and n != "lm_head.weight"}


def unconverted(files: Mapping[str, bytes]) -> str:
    """The message with which a conversion is refused; nothing is left that could be loaded."""
    message = attempt(files)
    assert message is not None
    return message


def attempt(files: Mapping[str, bytes]) -> str | None:
    """Converts: refused with a message, or equal to the source, tensor by tensor."""
    with folder(files) as path, bounded(20):
        target = path.parent / "c"
        try:
            convert(path, target)
        except (ValueError, FileNotFoundError) as error:
            assert not target.exists()
            assert {p.name for p in path.parent.iterdir()} <= {"hf", ".c.partial"}
            with pytest.raises(FileNotFoundError, match="no such checkpoint"):
                btlm.load(target)
            return str(error)
        assert verify(target) and verify(path, target)
        export(target, path.parent / "back")
        source, back = open_hf(path), open_hf(path.parent / "back")
        found = {n: back.read_tensor(n) for n in back.tensors}
        assert set(found) - {"lm_head.weight"} == set(PLAIN)
        assert_same(found, {n: source.read_tensor(n) for n in found})
        return None


@settings(max_examples=80)
@given(data=st.data())
def test_conversions_of_mutated_files(data):
    form = data.draw(st.sampled_from(["btlm", "btlm sharded", "safetensors"]))
    if form == "safetensors":
        files = {"config.json": CONFIG, MODEL: save(PLAIN)}
        hot = (0, 8 + int.from_bytes(files[MODEL][:8], "little"))
        files[MODEL] = data.draw(mutated(files[MODEL], hot))
        attempt(files)
        return
    files, expected = BINS[form]
    name = data.draw(st.sampled_from(sorted(n for n in files if n != "config.json")))
    hot = (files[name].index(b"PK\1\2"), len(files[name])) if name.endswith(".bin") else None
    changed = files | {name: data.draw(mutated(files[name], hot))}
    message = attempt(changed)
    # The mask buffers are not converted, so damage there may pass.
    assert message is not None or set(outcome(changed)[0]) >= set(expected) - set(MASKS)


VALUES = [
    None, True, False, "", "x", "gelu", "alibi", "learned", "jais", [], [1], {}, {"type": "linear"},
    {"type": "linear", "factor": 2.0}, {"type": [], "factor": 2}, -1, 0, 1, 2, 3, 7, 8, 11, 12, 1.5,
    -0.0, 1e-320, 1e308, math.inf, math.nan, 2**31, 2**63, 10**30, 10**300, 10**400,
]  # fmt: skip
KEYS = [
    *json.loads(CONFIG), "alibi_scaling", "layer_norm_epsilon", "initializer_range", "rotary_dim",
    "tie_word_embeddings", "scale_attn_weights", "resid_pdrop", "pad_token_id", "width_scale",
    "output_logits_scale", "embeddings_scale", "scale_qk_dot_by_d", "quantization_config",
    "is_encoder_decoder", "something",
]  # fmt: skip


@settings(max_examples=100)
@given(data=st.data())
def test_conversions_with_an_odd_config(data):
    """Whatever config.json says: refused, or the same weights."""
    config = json.loads(CONFIG)
    for _ in range(data.draw(st.integers(1, 2))):
        key, value = data.draw(st.sampled_from(KEYS)), data.draw(st.sampled_from(VALUES))
        config[key] = value
    files = BINS["btlm"][0] | {"config.json": json.dumps(config).encode()}
    attempt(files)


@pytest.mark.parametrize("key", ["layer_norm_epsilon", "resid_pdrop", "mup_width_scale"])
def test_numbers_beyond_floats_in_a_config(key):
    config = json.dumps(json.loads(CONFIG) | {key: 10**400})
    assert key in unconverted(BINS["btlm"][0] | {"config.json": config.encode()})


def test_a_config_with_layers_without_end():
    config = json.dumps(json.loads(CONFIG) | {"n_layer": 10_000})
    message = unconverted(BINS["btlm"][0] | {"config.json": config.encode()})
    assert "n_layer" in message and len(message) < 100_000


def test_a_missing_or_foreign_shard_does_not_convert():
    files = BINS["btlm sharded"][0]
    first, second = sorted(n for n in files if n.endswith(".bin"))
    assert second in unconverted({n: x for n, x in files.items() if n != second})
    assert "disagree" in unconverted(files | {second: files[first]})
    other = json.loads(files["pytorch_model.bin.index.json"])
    other["weight_map"]["transformer.wte.weight"] = "../hf/" + first
    lying = {"pytorch_model.bin.index.json": json.dumps(other).encode()}
    assert "plain names" in unconverted(files | lying)


def test_a_repaired_file_converts(tmp_path):
    """What a refused conversion has kept does no harm once the file is whole."""
    files, path = BINS["btlm"][0], tmp_path / "hf"
    shutil.copytree(BTLM_BIN / "single", path)
    raw = bytearray(files[BIN])
    raw[raw.index(BTLM["transformer.h.1.mlp.c_fc.weight"].tobytes())] ^= 1
    (path / BIN).write_bytes(raw)
    with pytest.raises(ValueError, match="checksum mismatch"):
        convert(path, tmp_path / "c")
    (path / BIN).write_bytes(files[BIN])
    convert(path, tmp_path / "c")
    assert verify(tmp_path / "c", BTLM_BIN / "single")
    assert sorted(os.listdir(tmp_path)) == ["c", "hf"]


def test_wrong_shapes_and_dtypes_do_not_convert():
    name = "transformer.h.1.mlp.c_fc.weight"
    for odd in (PLAIN[name].T.copy(), PLAIN[name][:-1], PLAIN[name].astype(np.float64)):
        files = {"config.json": CONFIG, MODEL: save(PLAIN | {name: odd})}
        message = unconverted(files)
        assert f"{name}: found" in message and "unexpected" not in message
    assert attempt({"config.json": CONFIG, MODEL: save(PLAIN)}) is None
