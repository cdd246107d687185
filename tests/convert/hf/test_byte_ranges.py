"""Parts of tensors are read exactly, and files that are damaged or change are reported."""

from __future__ import annotations

import io
import itertools
import math
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from btlm_jax.convert.hf import source as hf_source
from btlm_jax.convert.hf.byte_ranges import contiguous_runs, read_into
from btlm_jax.convert.hf.source import HFSource, open_hf
from support import golden

BIN = golden.GOLDEN / "torch_bin"
VIEWS = ("transposed", "shared.strided")  # not one run of the file in C order
NUMBERS = np.random.default_rng(0).standard_normal(120).astype(np.float32)
SAFETENSORS = {
    "f32": NUMBERS.reshape(2, 3, 4, 5),
    "bf16": NUMBERS[:60].astype(ml_dtypes.bfloat16).reshape(3, 4, 5),
    "f16": NUMBERS[:35].astype(np.float16).reshape(7, 5),
    "i64": np.arange(12).reshape(1, 12),
    "ones": NUMBERS[:6].reshape(1, 6, 1, 1),
    "u8": np.arange(11, dtype=np.uint8),
    "scalar": np.array(3, np.int16),
    "empty": np.zeros((2, 0, 3), np.float32),
}


def torch_tensors() -> dict[str, np.ndarray]:
    """Returns the tensors of state_dict.bin, of which some are transposed, strided or shared."""
    arrays = dict(np.load(BIN / "state_dict.npz"))
    return arrays | {"bf16.weight": arrays["bf16.weight"].view(ml_dtypes.bfloat16)}


TENSORS = {"safetensors": SAFETENSORS, "bin": torch_tensors()}
NAMES = [(form, name) for form, tensors in TENSORS.items() for name in tensors]


def write(path: Path, form: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    if form == "bin":
        shutil.copy(BIN / "state_dict.bin", path / "pytorch_model.bin")
    else:
        save_file(SAFETENSORS, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> dict[str, HFSource]:
    folder = tmp_path_factory.mktemp("forms")
    return {form: open_hf(write(folder / form, form)) for form in TENSORS}


def equal_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes()


def slices(n: int) -> st.SearchStrategy[slice]:
    bound = st.none() | st.integers(-n - 2, n + 2)
    return st.builds(slice, bound, bound, st.sampled_from([None, 1]))


def indices(shape: tuple[int, ...]) -> st.SearchStrategy[tuple[slice, ...]]:
    """Indices of parts of an array that cover half of all axes completely, for long runs."""
    return st.tuples(*(st.just(slice(0, n)) | slices(n) for n in shape))


@st.composite
def reshaped(draw, size: int) -> tuple[int, ...]:
    """A shape of `size` elements."""
    shape = []
    for _ in range(draw(st.integers(0, 4))):
        divisors = [n for n in range(1, size + 1) if size % n == 0] or [1]
        shape.append(draw(st.sampled_from(divisors)))
        size //= shape[-1]
    return (*shape, size)


@settings(max_examples=max(200, settings.default.max_examples))  # microseconds each
@given(st.data(), st.lists(st.integers(0, 5), max_size=5).map(tuple))
def test_runs_cover_a_part_exactly_once_in_order_and_are_maximal(data, shape):
    index = data.draw(indices(shape))
    found = list(contiguous_runs(shape, index))
    elements = np.arange(math.prod(shape)).reshape(shape)[index].reshape(-1)
    assert [e for start, length in found for e in range(start, start + length)] == list(elements)
    assert all(length > 0 for _, length in found)
    # Two runs that touch would be one.
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(found))


def test_runs_of_the_released_shapes():
    """A device reads one run of rows, or one run per row of a slice of columns."""
    whole = slice(None)
    assert list(contiguous_runs((50304, 2560), (slice(12576, 25152), whole))) == [
        (12576 * 2560, 12576 * 2560)
    ]
    columns = list(contiguous_runs((2560, 6912), (slice(320, 640), slice(3456, 6912))))
    assert len(columns) == 320 and columns[0] == (320 * 6912 + 3456, 3456)
    heads = list(contiguous_runs((2560, 3, 32, 80), (slice(0, 320), whole, slice(16, 32), whole)))
    assert len(heads) == 320 * 3 and {n for _, n in heads} == {16 * 80}
    assert list(contiguous_runs((), ())) == [(0, 1)]


@given(data=st.data())
def test_reading_a_part_equals_slicing(opened, data):
    form, name = data.draw(st.sampled_from(NAMES))
    expected = TENSORS[form][name]
    shape = data.draw(st.just(expected.shape) | reshaped(expected.size))
    index = data.draw(indices(shape))
    got = opened[form].read_tensor(name, index, shape)
    assert got.flags.c_contiguous and equal_bits(got, np.asarray(expected.reshape(shape)[index]))


@pytest.mark.parametrize("form, name", NAMES)
def test_whole_tensors_are_read_exactly(opened, form, name):
    source, expected = opened[form], TENSORS[form][name]
    assert source.tensors[name].shape == expected.shape
    assert source.tensors[name].dtype == expected.dtype
    assert equal_bits(source.read_tensor(name), expected)
    for shape in (expected.shape, (expected.size,)):
        for index in (None, (slice(None),) * len(shape)):
            assert equal_bits(source.read_tensor(name, index, shape), expected.reshape(shape))


@given(data=st.data())
def test_blocks_concatenate_to_the_tensor(opened, data):
    form, name = data.draw(st.sampled_from(NAMES))
    expected = TENSORS[form][name]
    size = data.draw(st.integers(1, expected.size + 2))
    blocks = list(opened[form].blocks(name, size))
    assert all(b.dtype == expected.dtype and b.ndim == 1 and b.size for b in blocks)
    assert all(len(b) == size for b in blocks[:-1]) and all(len(b) <= size for b in blocks)
    assert b"".join(b.tobytes() for b in blocks) == expected.tobytes()


def test_only_views_have_no_offset(opened):
    offsets = {name for name, info in opened["bin"].tensors.items() if info.offset is None}
    assert offsets == {*VIEWS, "empty"}


def test_no_other_bytes_are_read(opened, monkeypatch):
    counted = []

    def counting(file, offset, out):
        counted.append(out.nbytes)
        read_into(file, offset, out)

    monkeypatch.setattr(hf_source, "read_into", counting)
    for form, name in NAMES:
        if name in VIEWS:
            continue
        expected = TENSORS[form][name]
        for index in ((slice(1, None),) * expected.ndim, (slice(0, 1),) * expected.ndim):
            counted.clear()
            part = opened[form].read_tensor(name, index)
            assert sum(counted) == part.nbytes == expected[index].nbytes


def test_unknown_names_are_reported(opened):
    for read in (lambda s: s.read_tensor("nope"), lambda s: list(s.blocks("nope", 1))):
        with pytest.raises(KeyError, match="holds no tensor 'nope'"):
            read(opened["bin"])


class Trickle(io.RawIOBase):
    """A file that returns at most three bytes per read, as a pipe or a network disk may."""

    name = "trickle"

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._data.seek(offset, whence)

    def readinto(self, buffer) -> int:
        data = self._data.read(min(3, len(buffer)))
        buffer[: len(data)] = data
        return len(data)


def test_short_reads_are_continued():
    file, data = Trickle(bytes(range(100))), np.arange(100, dtype=np.uint8)
    for out in (np.empty((4, 4), np.uint32), np.empty((), np.float64), np.empty((0, 3), np.int8)):
        read_into(file, 7, out)
        assert out.tobytes() == data[7 : 7 + out.nbytes].tobytes()
    with pytest.raises(ValueError, match="trickle ends 6 bytes early"):
        read_into(file, 90, np.empty(2, np.float64))


def damaged_bin(path: Path, name: str) -> HFSource:
    """Opens a copy of state_dict.bin in which the first byte of a tensor is changed."""
    source = write(path, "bin")
    file = source / "pytorch_model.bin"
    raw = bytearray(file.read_bytes())
    raw[raw.index(TENSORS["bin"][name].tobytes())] ^= 1
    file.write_bytes(raw)
    return open_hf(source)


@pytest.mark.parametrize("name", ["f32.weight", "bf16.weight", "f16.bias", "param", "scalar"])
def test_a_wrong_checksum_is_found_after_the_last_block(tmp_path, name):
    source = damaged_bin(tmp_path / "hf", name)
    message = rf"pytorch_model\.bin: tensor '{name}': checksum mismatch"
    for size in (1, 3, 1000):
        blocks, found = source.blocks(name, size), 0
        with pytest.raises(ValueError, match=message):
            for block in blocks:
                found += block.size
        assert found == TENSORS["bin"][name].size
    with pytest.raises(ValueError, match=message):
        source.read_tensor(name)
    for other in set(TENSORS["bin"]) - {name}:
        assert equal_bits(source.read_tensor(other), TENSORS["bin"][other])


def test_the_checksum_of_a_view_is_checked(tmp_path):
    source = write(tmp_path / "hf", "bin")
    file = source / "pytorch_model.bin"
    raw = bytearray(file.read_bytes())
    raw[raw.index(np.ascontiguousarray(TENSORS["bin"]["transposed"].T).tobytes())] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*checksum mismatch"):
        open_hf(source).read_tensor("transposed", (slice(0, 1), slice(0, 1)))


@pytest.mark.parametrize("form, name", [("safetensors", "f32"), ("bin", "f32.weight")])
def test_a_file_truncated_while_reading_is_reported(tmp_path, form, name):
    folder = write(tmp_path / "hf", form)
    source = open_hf(folder)
    info = source.tensors[name]
    blocks, part = source.blocks(name, 2), (slice(1),) * len(info.shape)
    assert len(next(blocks)) == 2
    os.truncate(info.file, info.offset + 9)
    with pytest.raises(ValueError, match=f"{info.file} ends 7 bytes early"):
        list(blocks)
    for read in (lambda: source.read_tensor(name), lambda: source.read_tensor(name, part)):
        with pytest.raises(ValueError, match=f"{info.file} has changed since it was opened"):
            read()


@pytest.mark.parametrize("change", ["longer", "rewritten", "replaced"])
@pytest.mark.parametrize(
    "form, name",
    [
        ("safetensors", "f32"),
        ("bin", "f32.weight"),
        *(("bin", n) for n in VIEWS),
    ],
)
def test_a_changed_file_is_refused(tmp_path, form, name, change):
    source = open_hf(write(tmp_path / "hf", form))
    file = source.tensors[name].file
    raw = file.read_bytes()
    if change == "replaced":
        file.rename(tmp_path / "old")
    file.write_bytes(raw + b" " * (change == "longer"))
    os.utime(file, ns=(0, source.identities[file][1] + 1))
    part = (slice(0, 1),) * len(source.tensors[name].shape)
    for read in (
        lambda: source.read_tensor(name),
        lambda: source.read_tensor(name, part),
        lambda: list(source.blocks(name, 1)),
    ):
        with pytest.raises(ValueError, match=f"{file} has changed since it was opened"):
            read()


@pytest.mark.parametrize("form", TENSORS)
def test_a_removed_file_is_reported(tmp_path, form):
    source = open_hf(write(tmp_path / "hf", form))
    name = next(iter(source.tensors))
    source.tensors[name].file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.(safetensors|bin)"):
        source.read_tensor(name)
