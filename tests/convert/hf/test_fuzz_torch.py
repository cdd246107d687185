"""Damaged torch archives are refused, or read as they describe their tensors."""

from __future__ import annotations

import io
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from btlm_jax.convert.hf.source import open_hf
from support.hostile_files import (
    BIN,
    BINS,
    MANY_EXAMPLES,
    SHARED,
    assert_equal_tensors,
    checkpoint_directory,
    mutated_bytes,
    read_everything,
    refusal,
    time_limit,
    uniform_integers,
    zip_bytes,
)
from support.torch_pickles import (
    pickled,
    storage,
    tensor,
)


@pytest.mark.parametrize("form", BINS)
def test_files_of_torch_are_read_exactly(form):
    files, expected = BINS[form]
    arrays, errors = read_everything(files)
    assert not errors and set(arrays) == set(expected)
    assert_equal_tensors(arrays, expected)


@MANY_EXAMPLES
@given(data=st.data())
def test_mutated_archives_are_refused_or_read_exactly(data):
    """Checksums guard the description and every tensor that fills its storage."""
    files, expected = BINS[data.draw(st.sampled_from(sorted(BINS)))]
    name = data.draw(st.sampled_from(sorted(n for n in files if n.endswith(".bin"))))
    directory = files[name].index(b"PK\1\2"), len(files[name])
    arrays, errors = read_everything(
        files | {name: data.draw(mutated_bytes(files[name], directory))}
    )
    assert "" in errors or set(arrays) | set(errors) == set(expected)
    assert_equal_tensors({n: x for n, x in arrays.items() if n not in SHARED}, expected)


def storage_spans(raw: bytes) -> list[tuple[int, int]]:
    """Returns the spans of the storages in a zip."""
    with zipfile.ZipFile(io.BytesIO(raw)) as z:
        infos = [i for i in z.infolist() if "/data/" in i.filename]
        starts = [i.header_offset for i in infos]
        lengths = [struct.unpack("<HH", raw[at + 26 : at + 30]) for at in starts]
    begins = [at + 30 + sum(pair) for at, pair in zip(starts, lengths, strict=True)]
    return [(b, b + i.file_size) for b, i in zip(begins, infos, strict=True) if i.file_size]


@MANY_EXAMPLES
@given(data=st.data())
def test_every_flipped_bit_of_a_storage_is_found(data):
    form = data.draw(st.sampled_from(["state_dict", "btlm", "btlm sharded"]))
    files, expected = BINS[form]
    name = data.draw(st.sampled_from(sorted(n for n in files if n.endswith(".bin"))))
    raw = bytearray(files[name])
    begin, end = data.draw(st.sampled_from(storage_spans(files[name])))
    at = data.draw(uniform_integers(begin, end - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    arrays, errors = read_everything(files | {name: bytes(raw)})
    assert all("checksum mismatch" in message for message in errors.values())
    different = {n for n, x in arrays.items() if x.tobytes() != expected[n].tobytes()}
    if different:  # it hit the storage that three tensors share: none of them fills it
        assert different <= SHARED and not errors
    else:
        tied = {"transformer.wte.weight", "lm_head.weight"}
        hit_shared = form == "state_dict" and not errors  # between the three
        assert hit_shared or len(errors) == 1 or set(errors) == tied
    assert set(arrays) | set(errors) == set(expected)


@MANY_EXAMPLES
@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    data=st.data(),
    offset=st.integers(0, 6),
    held=st.integers(0, 24),
    declared=st.integers(-1, 1),
)
def test_any_shape_strides_and_offset_select_the_right_elements(
    shape, data, offset, held, declared
):
    """Descriptions that reach outside the storage are refused."""
    strides = tuple(data.draw(st.integers(0, 12)) for _ in shape)
    bytes_held = np.arange(held, dtype=np.float32).tobytes()
    numel = max(held + data.draw(st.sampled_from([0, 0, 0, declared])), 0)
    pkl = pickled(a=tensor(storage(numel=numel), offset, tuple(shape), strides))
    raw = zip_bytes(pkl, {"m/data/0": bytes_held})
    places = [
        offset + sum(i * s for i, s in zip(at, strides, strict=True)) for at in np.ndindex(*shape)
    ]
    fine = numel == held and len(places) <= held
    fine &= all(p < held for p in places) if places else offset <= held
    arrays, errors = read_everything({BIN: raw})
    assert bool(arrays) == fine
    if fine:
        expected = np.array(places, np.float32).reshape(shape)
        assert not errors
        assert_equal_tensors(arrays, {"a": expected})


PKL = pickled(a=tensor())


FLOATS = np.arange(4, dtype=np.float32)


def patched(raw: bytes, name: str, at: int, value: bytes, *, local: int | None = None) -> bytes:
    """Replaces bytes of a member's entry in the central directory (and local header)."""
    data, signature, length = bytearray(raw), b"PK\1\2", 46
    position = raw.index(signature)
    while raw[position + length : position + length + len(name)] != name.encode():
        position = raw.index(signature, position + 1)
    data[position + at : position + at + len(value)] = value
    if local is not None:
        header = int.from_bytes(raw[position + 42 : position + 46], "little")
        data[header + local : header + local + len(value)] = value
    return bytes(data)


def test_an_assembled_zip_is_read():
    arrays, errors = read_everything({BIN: zip_bytes(PKL)})
    assert not errors
    assert_equal_tensors(arrays, {"a": FLOATS})
    comment = zip_bytes(PKL)[:-2] + b"\5\0hello"
    assert not read_everything({BIN: comment})[1]


HUGE = b"\xff\xff\xff\x7f"


ZIPS = {
    "deflated": lambda: zip_bytes(PKL, compression=zipfile.ZIP_DEFLATED),
    "bzip2": lambda: zip_bytes(PKL, compression=zipfile.ZIP_BZIP2),
    "lzma": lambda: zip_bytes(PKL, compression=zipfile.ZIP_LZMA),
    "bomb": lambda: zip_bytes(
        pickled(a=tensor(storage(numel=1 << 24), shape=(1 << 24,))),
        {"m/data/0": bytes(1 << 26)}, compression=zipfile.ZIP_DEFLATED,
    ),
    "bomb of a pickle": lambda: zip_bytes(
        b"\x80\x02" + bytes(1 << 24), compression=zipfile.ZIP_LZMA
    ),
    "unknown method": lambda: patched(zip_bytes(PKL), "m/data/0", 10, b"\x63\0", local=8),
    "encrypted": lambda: patched(zip_bytes(PKL), "m/data/0", 8, b"\1\0", local=6),
    "larger than stored": lambda: patched(zip_bytes(PKL), "m/data/0", 24, HUGE, local=22),
    "larger than the file": lambda: patched(
        patched(zip_bytes(PKL), "m/data/0", 24, HUGE, local=22), "m/data/0", 20, HUGE, local=18
    ),
    "pickle larger than the file": lambda: patched(
        patched(zip_bytes(PKL), "m/data.pkl", 24, HUGE), "m/data.pkl", 20, HUGE
    ),
    "shorter": lambda: patched(
        patched(zip_bytes(PKL), "m/data/0", 24, b"\4\0\0\0"), "m/data/0", 20, b"\4\0\0\0"
    ),
    "elsewhere": lambda: patched(zip_bytes(PKL), "m/data/0", 42, HUGE),
    "at the pickle": lambda: patched(zip_bytes(PKL), "m/data/0", 42, bytes(4)),
    "wrong checksum of the pickle": lambda: patched(zip_bytes(PKL), "m/data.pkl", 16, b"\1\2\3\4"),
    "no such storage": lambda: zip_bytes(PKL, {"m/data/1": FLOATS.tobytes()}),
    "storage elsewhere": lambda: zip_bytes(PKL, {"n/data/0": FLOATS.tobytes()}),
    "empty archive": lambda: b"PK\5\6" + bytes(18),
    "only a directory": lambda: zip_bytes(PKL)[zip_bytes(PKL).index(b"PK\1\2") :],
    "two archives": lambda: zip_bytes(PKL) + zip_bytes(b"\x80\x02]."),
    "big-endian": lambda: zip_bytes(PKL, {"m/data/0": FLOATS.tobytes(), "m/byteorder": b"big"}),
}  # fmt: skip


@pytest.mark.parametrize("make", ZIPS.values(), ids=list(ZIPS))
def test_hostile_zips_are_refused(make):
    raw = make()
    assert len(raw) < 100_000
    arrays, errors = read_everything({BIN: raw})
    assert errors and not arrays


def test_a_wrong_checksum_of_a_tensor_is_found():
    _, errors = read_everything({BIN: patched(zip_bytes(PKL), "m/data/0", 16, b"\1\2\3\4")})
    assert "checksum mismatch" in errors["a"]


@pytest.mark.parametrize(
    "name", ["../x", "m/../../x", "/etc/x", "m\\x", "C:/x", "..", "m/data/../../../x", "x/.."]
)
def test_paths_that_leave_the_archive_are_refused(name):
    assert "points outside" in refusal({BIN: zip_bytes(PKL, {"m/data/0": bytes(16), name: b""})})
    evil = zip_bytes(pickled(a=tensor(storage(key=name))), {"m/data/0": bytes(16)})
    assert "persistent id" in refusal({BIN: evil})


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_repeated_member_is_refused():
    raw = io.BytesIO(zip_bytes(PKL))
    with zipfile.ZipFile(raw, "a") as z:
        z.writestr("m/data/0", bytes(16))
    assert "occurs twice" in refusal({BIN: raw.getvalue()})


def test_many_tensors_of_one_storage_are_read_one_at_a_time():
    many = {f"t{i}": tensor(storage(numel=1 << 18), shape=(1 << 18,)) for i in range(500)}
    raw = zip_bytes(pickled(**many), {"m/data/0": bytes(1 << 20)})
    with checkpoint_directory({BIN: raw}) as path, time_limit():
        source = open_hf(path)
        assert len(source.tensors) == 500
        assert not source.read_tensor("t499").any()
