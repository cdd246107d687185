"""Torch .bin files written by torch are read; hostile and mutated ones are refused."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from btlm_jax.convert.hf import torch_zip
from btlm_jax.convert.hf.torch_pickle import TorchFile
from support.torch_pickles import DATA, ORDERED_DICT, pickled, storage, tensor, text, write_zip

GOLDEN = Path(__file__).parents[2] / "golden" / "torch_bin"
STATE_DICT = GOLDEN / "state_dict.bin"
EXPECTED = dict(np.load(GOLDEN / "state_dict.npz"))
SHARED = {"shared.head", "shared.tail", "shared.strided"}


def bits(array: np.ndarray) -> np.ndarray:
    """Returns bfloat16 as uint16, as the .npz stores it."""
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def refusal(path: Path) -> str:
    """Returns the message with which a file is refused, on opening or on reading."""
    with pytest.raises(ValueError) as caught:
        file = TorchFile(path)
        for name in file.tensors:
            file.read_tensor(name)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


# Files made by torch.


def test_a_state_dict_of_torch_is_read_exactly():
    file = TorchFile(STATE_DICT)
    assert list(file.tensors) == list(EXPECTED)
    for name, expected in EXPECTED.items():
        shape, dtype = file.tensors[name]
        array = file.read_tensor(name)
        assert (array.shape, array.dtype) == (shape, dtype)
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(bits(array), expected)
    assert file.tensors["bf16.weight"] == ((3, 4), np.dtype(ml_dtypes.bfloat16))
    assert file.tensors["scalar"][0] == ()
    assert file.tensors["empty"][0] == (0, 4)


def test_protocol_4_and_absent_checksums_are_read():
    np.testing.assert_array_equal(TorchFile(GOLDEN / "protocol4.bin").read_tensor("a"), [1, 1])
    np.testing.assert_array_equal(TorchFile(GOLDEN / "no_crc.bin").read_tensor("a"), [0, 1, 2])


@pytest.mark.parametrize(
    ("name", "message_part"),
    [
        ("nested.bin", "under 'state_dict'"),
        ("mixed.bin", "'lr': float, 'names': list"),
        ("float8.bin", "'a': float8_e4m3fn"),
        ("conj.bin", "'a': complex64"),
        ("expanded.bin", "an expanded tensor"),
        ("bare_tensor.bin", "holds a tensor, expected a dict"),
        ("legacy.bin", "before 1.6"),
    ],
)
def test_files_of_torch_without_a_plain_state_dict_are_refused(name, message_part):
    message = refusal(GOLDEN / name)
    assert message_part in message and "Fix: " in message


def test_read_touches_only_its_own_member(tmp_path):
    damaged = bytearray(STATE_DICT.read_bytes())
    at = damaged.index(EXPECTED["f32.weight"].tobytes())
    damaged[at] ^= 0xFF
    path = tmp_path / "damaged.bin"
    path.write_bytes(damaged)
    file = TorchFile(path)
    with pytest.raises(ValueError, match=r"damaged\.bin: checksum mismatch"):
        file.read_tensor("f32.weight")
    for name in set(EXPECTED) - {"f32.weight"}:
        np.testing.assert_array_equal(bits(file.read_tensor(name)), EXPECTED[name])


def test_unknown_names_and_missing_files_are_reported(tmp_path):
    with pytest.raises(KeyError, match="no tensor 'nope'"):
        TorchFile(STATE_DICT).read_tensor("nope")
    with pytest.raises(FileNotFoundError):
        TorchFile(tmp_path / "absent.bin")


def test_files_truncated_at_any_length_are_refused(tmp_path):
    content = STATE_DICT.read_bytes()
    for length in range(0, len(content), 61):
        path = tmp_path / "short.bin"
        path.write_bytes(content[:length])
        assert "Fix: " in refusal(path)


def test_a_file_truncated_after_opening_is_reported(tmp_path):
    path = tmp_path / "m.bin"
    path.write_bytes(STATE_DICT.read_bytes())
    file = TorchFile(path)
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match="ends inside a member"):
        file.read_tensor("scalar")


def test_other_kinds_of_files_are_recognized(tmp_path):
    for head, message_part in [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"x" * 257 + b"ustar", "before 1.6"),
    ]:
        path = tmp_path / "x.bin"
        path.write_bytes(head)
        assert message_part in refusal(path)


# Hostile files made here.


def test_assembled_pickles_are_read(tmp_path):
    file = TorchFile(write_zip(tmp_path / "ok.bin", pickled(a=tensor())))
    np.testing.assert_array_equal(file.read_tensor("a"), [0, 1, 2, 3])
    view = tensor(offset=1, shape=(1, 2), strides=(1 << 62, 2))
    file = TorchFile(write_zip(tmp_path / "view.bin", pickled(a=view)))
    np.testing.assert_array_equal(file.read_tensor("a"), [[1, 3]])


def test_negated_or_conjugated_views_are_refused(tmp_path):
    for flags, fine in [(b"}", True), (b"}" + text("neg") + b"\x88s", False), (b"}}", False)]:
        path = write_zip(tmp_path / "flags.bin", pickled(a=tensor(hooks=ORDERED_DICT + flags)))
        if fine:
            assert TorchFile(path).tensors["a"][0] == (4,)
        else:
            assert "arguments" in refusal(path)


def test_bytes_other_than_0_and_1_are_true(tmp_path):
    at = storage(cls="BoolStorage")
    path = write_zip(tmp_path / "bool.bin", pickled(a=tensor(at)), {"m/data/0": b"\0\1\2\xff"})
    array = TorchFile(path).read_tensor("a")
    assert array.dtype == np.bool_ and array.tobytes() == b"\0\1\1\1"


class Payload:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"a": x}, lambda x: {"a": [(x,)]}])
def test_payloads_are_refused_without_running(tmp_path, protocol, wrap):
    flag = tmp_path / "ran"
    for payload in (
        Payload(os.system, f"touch {flag}"),
        Payload(eval, f"open({str(flag)!r}, 'w')"),
        Payload(open, str(flag), "w"),
    ):
        path = write_zip(tmp_path / "evil.bin", pickle.dumps(wrap(payload), protocol))
        assert "refused" in refusal(path)
        assert not flag.exists()


def test_a_payload_inside_a_tensor_is_refused_without_running(tmp_path):
    flag = tmp_path / "ran"
    evil = pickle.dumps(Payload(os.system, f"touch {flag}"), 2)[2:-1]
    for pkl in (pickled(a=tensor(at=evil)), pickled(a=tensor(hooks=evil))):
        message = refusal(write_zip(tmp_path / "evil.bin", pkl))
        assert "refused" in message and "would run code" in message and "system" in message
    assert not flag.exists()


@pytest.mark.parametrize(
    ("pkl", "message_part"),
    [
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01tR.", "arguments"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n(K\x01\x88}tR.", "arguments"),
        (b"\x80\x02ccollections\nOrderedDict\n](\x5d\x65\x85R.", "arguments"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "arguments"),
        (b"\x80\x02ctorch\nFloatStorage\n}b.", "sets attributes"),
        (b"\x80\x02}K\x01b.", "sets attributes"),
        (pickled(a=tensor(hooks=b"}X\x01\x00\x00\x00xK\x01s")), "arguments"),
        (pickled(a=tensor(at=b"K\x01")), "needs a storage"),
        (pickled(a=tensor(at=b"K\x01Q")), "persistent id"),
        (pickled(a=tensor(at=storage(key="../../0"))), "persistent id"),
        (pickled(a=tensor(at=storage(numel=-4))), "persistent id"),
        (pickled(a=tensor(at=storage(key="7"))), "'m/data/7' is missing"),
        (pickled(a=tensor(at=storage(numel=5))), "declared with 5 elements"),
        (pickled(a=tensor(at=storage(numel=1 << 62))), "elements of float32"),
        (pickled(a=tensor(at=storage(cls="DoubleStorage"))), "declared with 4 elements"),
        (pickled(a=tensor(at=storage(cls="UntypedStorage"))), "torch.UntypedStorage"),
        (pickled(a=tensor(offset=1)), "reach past"),
        (pickled(a=tensor(offset=-1)), "non-negative"),
        (pickled(a=tensor(offset=1 << 70)), "non-negative"),
        (pickled(a=tensor(shape=(5,))), "reach past"),
        (pickled(a=tensor(shape=(1 << 40, 1 << 40), strides=(0, 0))), "too large"),
        (pickled(a=tensor(shape=(1 << 40,), strides=(0,))), "expanded"),
        (pickled(a=tensor(shape=(0, 1 << 62), strides=(1, 1))), "too large"),
        (pickled(a=tensor(shape=(1 << 80,))), "non-negative"),
        (pickled(a=tensor(shape=(-4,))), "non-negative"),
        (pickled(a=tensor(strides=(-1,))), "non-negative"),
        (pickled(a=tensor(strides=(2,))), "reach past"),
        (pickled(a=tensor(strides=(1, 1))), "needs a storage"),
        (pickled(a=tensor(shape=(1,) * 33, strides=(1,) * 33)), "dimensions"),
        (pickled(a=tensor())[:-2] + text("a") + tensor() + b"u.", "occurs twice"),
        (b"\x80\x02}K\x01" + tensor() + b"s.", "not named tensors"),
        (b"\x80\x02}(K\x01u.", "corrupt"),
        (b"\x80\x02}.", None),
        (b"\x80\x02R.", "stack underflow"),
        (b"\x80\x02h\x05.", "no memo 5"),
        (b"\x80\x02}", "exhausted"),
        (b"", "exhausted"),
        (b"\x80\x02}\xff.", "unknown"),
        (b"\x80\x02}K\x01K\x02a.", "stack underflow|appends to"),
    ],
)
def test_malformed_pickles_are_refused(tmp_path, pkl, message_part):
    path = write_zip(tmp_path / "odd.bin", pkl)
    if message_part is None:
        assert dict(TorchFile(path).tensors) == {}
        return
    message = refusal(path)
    assert any(part in message for part in message_part.split("|")), message


def test_pickles_that_crash_the_standard_unpickler_are_harmless(tmp_path):
    # A memo index of 2**32 - 1 (tens of GB), and a key whose hash overflows the C stack.
    TorchFile(write_zip(tmp_path / "memo.bin", b"\x80\x02}r\xff\xff\xff\xff."))
    deep = b")" + b"\x85" * 200_000
    assert "tuple as a dict key" in refusal(
        write_zip(tmp_path / "key.bin", b"\x80\x02}" + deep + b"K\x01s.")
    )
    assert "'a': tuple" in refusal(write_zip(tmp_path / "value.bin", pickled(a=deep)))
    long = b"\x80\x02}X\xff\xff\xff\xffabc"
    assert "expected 4294967295 bytes" in refusal(write_zip(tmp_path / "long.bin", long))


def test_pickle_size_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_zip, "_MAX_PICKLE_BYTES", 20)
    assert "at most 20 are read" in refusal(write_zip(tmp_path / "big.bin", pickled(a=tensor())))


def test_compressed_members_are_refused(tmp_path):
    bomb = {"m/data/0": bytes(4_000_000)}
    pkl = pickled(a=tensor(at=storage(numel=1_000_000), shape=(1_000_000,)))
    path = write_zip(tmp_path / "bomb.bin", pkl, bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    assert "is compressed" in refusal(path)
    with zipfile.ZipFile(tmp_path / "bomb2.bin", "w") as file:
        file.writestr("m/data.pkl", pkl)
        file.writestr("m/data/0", bomb["m/data/0"], zipfile.ZIP_DEFLATED)
    assert "'m/data/0' is compressed" in refusal(tmp_path / "bomb2.bin")


@pytest.mark.parametrize("name", ["../x", "m/../../x", "/etc/x", "m\\..\\x", "C:/x", "m/.."])
def test_member_paths_that_lead_out_are_refused(tmp_path, name):
    path = write_zip(tmp_path / "p.bin", pickled(a=tensor()), {"m/data/0": DATA, name: b""})
    assert "points outside" in refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_malformed_archives_are_refused(tmp_path):
    pkl = pickled(a=tensor())
    two = write_zip(tmp_path / "two.bin", pkl, {"m/data/0": DATA, "n/data.pkl": pkl})
    assert "found 2 members" in refusal(two)
    with zipfile.ZipFile(tmp_path / "none.bin", "w") as file:
        file.writestr("weights.txt", b"")
    assert "found 0 members" in refusal(tmp_path / "none.bin")
    with zipfile.ZipFile(tmp_path / "twice.bin", "w") as file:
        file.writestr("m/data.pkl", pkl)
        file.writestr("m/data.pkl", pkl)
    assert "occurs twice" in refusal(tmp_path / "twice.bin")
    big = write_zip(tmp_path / "big.bin", pkl, {"m/data/0": DATA, "m/byteorder": b"big"})
    assert "byte order b'big'" in refusal(big)


# Mutated files.


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_archives_are_refused_or_read_exactly(tmp_path, data):
    raw = bytearray(STATE_DICT.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "mutated.bin"
    path.write_bytes(raw)
    try:
        file = TorchFile(path)
    except ValueError:
        return
    assert set(file.tensors) == set(EXPECTED)
    for name, expected in EXPECTED.items():
        try:
            array = bits(file.read_tensor(name))
        except ValueError:
            continue
        assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
        # Tensors that share a storage are read without its checksum.
        if name not in SHARED:
            np.testing.assert_array_equal(array, expected)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_pickles_are_refused_or_read_as_described(tmp_path, data):
    with zipfile.ZipFile(STATE_DICT) as source:
        members = {i.filename.replace("state_dict", "m"): source.read(i) for i in source.infolist()}
    pkl = bytearray(members.pop("m/data.pkl"))
    for _ in range(data.draw(st.integers(1, 3))):
        pkl[data.draw(st.integers(0, len(pkl) - 1))] = data.draw(st.integers(0, 255))
    path = write_zip(tmp_path / "mutated.bin", bytes(pkl), members)
    try:
        file = TorchFile(path)
    except ValueError:
        return
    for name, (shape, dtype) in file.tensors.items():
        array = file.read_tensor(name)
        assert (array.shape, array.dtype) == (shape, dtype)
