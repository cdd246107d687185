"""Arrays on disk: reads return the bits that were written, in bounded blocks, or fail."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from etils import epath
from hypothesis import example, given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

import btlm_jax as btlm
from btlm_jax import BTLMConfig, make_mesh
from btlm_jax.checkpoint import metadata, zarr
from btlm_jax.model import weights
from btlm_jax.model.params import flatten_tree, unflatten_tree
from btlm_jax.utils import paths
from support.compare import same_bits

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), zarr.BF16]
BITS = {2: np.uint16, 4: np.uint32}
SIZES = [1, 2, 3, 4, 5, 7, 8, 12, 13, 29, 31, 61]  # primes have no fitting divisor
KINDS = ["random bits", "zeros", "negative zeros", "NaN payloads"]


@contextlib.contextmanager
def small(block: int, chunk: int):
    """Limits blocks and chunks to these sizes, in bytes, and does not wait for the disk."""
    quick = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})
    with (
        mock.patch.object(zarr, "_context", lambda: quick),
        mock.patch.object(zarr, "BLOCK_BYTES", block),
        mock.patch.object(zarr.block_rows, "__defaults__", (block,)),  # bound before
        mock.patch.object(zarr, "_CHUNK_BYTES", chunk),
    ):
        yield


@st.composite
def arrays(draw):
    """Draws an array, and limits that split it into 1 to 12 blocks of several chunks."""
    shape = tuple(draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=4)))
    while math.prod(shape) > 6000:
        shape = shape[:-1]
    dtype, kind = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(KINDS))
    unsigned, width = BITS[dtype.itemsize], 8 * dtype.itemsize
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits = rng.integers(0, 2**width, shape, unsigned)
    if kind == "zeros":
        bits[:] = 0
    elif kind == "negative zeros":
        bits &= unsigned(1 << (width - 1))
    elif kind == "NaN payloads":  # quiet and signalling ones, of either sign
        bits |= np.array(np.inf, dtype).view(unsigned)
    array = bits.view(dtype)
    block = max(1, array.nbytes // draw(st.integers(1, 12)))
    return array, block, max(1, block // draw(st.integers(1, 5)))


def write_array(folder: Path, array: np.ndarray) -> zarr.Digest:
    blocks = zarr.split_blocks(array)
    return zarr.write_blocks(epath.Path(folder), array.shape, array.dtype, blocks)


def read_array(folder: Path, rows: int = 3) -> list[np.ndarray]:
    return list(zarr.read_blocks(paths.kvstore(epath.Path(folder)), rows))


def joined(blocks) -> bytes:
    return b"".join(block.tobytes() for block in blocks)


def nonfinite(array: np.ndarray) -> int:
    with np.errstate(invalid="ignore"):  # signalling NaN
        return int((~np.isfinite(array.astype(np.float64))).sum())


def chunk_files(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "c").rglob("*") if p.is_file())


@given(arrays(), st.integers(1, 40))
@settings(max_examples=100)
def test_arrays_are_read_back_in_blocks_of_any_height(drawn, rows):
    array, block, chunk = drawn
    itemsize, row = array.dtype.itemsize, array.nbytes // array.shape[0]
    with tempfile.TemporaryDirectory() as folder, small(block, chunk):
        written_rows = zarr.block_rows(array.shape, itemsize)
        digest = write_array(Path(folder), array)
        for height in (written_rows, rows):
            parts = read_array(Path(folder), height)
            assert all(p.dtype == array.dtype and p.ndim == 1 for p in parts)
            assert all(p.nbytes <= height * row for p in parts)
            assert [p.nbytes for p in parts[:-1]] == [height * row] * (len(parts) - 1)
            assert joined(parts) == array.tobytes()
        # Every block has a file, even if it is zero: a missing file is damage.
        files = chunk_files(Path(folder))
        assert len(files) == math.ceil(array.shape[0] / written_rows)
        # A file holds a block, an index of 16 bytes per chunk and its checksum, and nothing else.
        stored = json.loads((Path(folder) / "zarr.json").read_text())
        inner = stored["codecs"][0]["configuration"]["chunk_shape"][0]
        most = written_rows * row + 16 * (written_rows // inner) + 4
        assert written_rows % inner == 0 and all(f.stat().st_size <= most for f in files)
        assert inner * row <= max(chunk, row) or inner == written_rows
    assert digest.sha256 == hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    assert digest.nonfinite == nonfinite(array)


@given(
    st.lists(st.integers(1, 60_000), min_size=1, max_size=4).map(tuple),
    st.sampled_from([2, 4]),
    st.sampled_from([1, 100, 4096, 2 << 20, 16 << 20]),
)
@settings(max_examples=200)
@example((50257, 2560), 2, 16 << 20)
def test_block_rows_are_a_divisor_unless_it_is_far_below_the_limit(shape, itemsize, limit):
    rows, row = zarr.block_rows(shape, itemsize, limit), math.prod(shape[1:]) * itemsize
    assert 1 <= rows <= shape[0]
    assert rows * row <= limit or rows == 1
    most = max(1, min(shape[0], limit // row))
    divisor = next(n for n in range(most, 0, -1) if shape[0] % n == 0)
    assert rows == (divisor if divisor >= most / 8 else most)
    assert zarr.block_size(shape, itemsize) % math.prod(shape[1:]) == 0


def test_blocks_of_the_released_model_are_neither_padded_nor_small():
    assert zarr.block_rows((50257, 2560), 2) == 1733  # 50257 = 29 · 1733: no padding
    assert zarr.block_rows((50257, 2560), 4) == 1638  # 1733 rows do not fit
    assert zarr.block_rows((2560, 3, 32, 80), 2) == 640
    assert zarr.block_rows((2560,), 4) == 2560
    assert zarr.block_rows((0, 3), 4) == 1
    config = BTLMConfig.preset("btlm-3b-8k")
    for w in weights.weight_table(config):
        for itemsize in (2, 4):
            nbytes = zarr.block_size(w.shape, itemsize) * itemsize
            assert nbytes <= zarr.BLOCK_BYTES
            # Small files would be slow: a block is the complete array or at least 2 MiB.
            assert nbytes >= min(math.prod(w.shape) * itemsize, 2 << 20)


@given(
    st.binary(min_size=0, max_size=400),
    st.sampled_from(DTYPES),
    st.integers(0, 3),
)
@settings(max_examples=200)
def test_count_nonfinite_agrees_with_numpy(raw, dtype, infinities):
    block = np.frombuffer(raw[: len(raw) // 4 * 4], dtype).copy()
    block[:infinities] = -np.inf
    assert zarr.count_nonfinite(block) == nonfinite(block)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_count_nonfinite_of_every_bit_pattern(dtype):
    """All 16-bit patterns; for 32 bits every upper half, with three lower halves."""
    unsigned, width = BITS[dtype.itemsize], 8 * dtype.itemsize
    top = np.arange(1 << 16).astype(unsigned)
    bits = top if width == 16 else np.concatenate([(top << 16) | low for low in (0, 1, 0xFFFF)])
    block = bits.view(dtype)
    assert zarr.count_nonfinite(block) == nonfinite(block) > 100
    # More elements than the scratch array.
    large = np.resize(block, (1 << 17) + 5)
    large[-1] = np.nan
    assert zarr.count_nonfinite(large) == nonfinite(large)


def test_digest_watches_blocks_that_split_and_join_an_array():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    array[2, 3] = np.nan
    digest = zarr.Digest()
    blocks = list(digest.watch(zarr.split_blocks(array, 7)))
    assert [len(block) for block in blocks] == [7, 7, 7, 3]
    joined_array = zarr.join_blocks(blocks, array.shape, array.dtype)
    assert joined_array.shape == array.shape and joined_array.tobytes() == array.tobytes()
    assert digest.sha256 == hashlib.sha256(array.tobytes()).hexdigest() and digest.nonfinite == 1


@pytest.fixture(params=["random", "zeros"])
def written(request, tmp_path):
    """Writes an array of three blocks of several chunks."""
    array = np.zeros((61, 3), np.float32)
    if request.param == "random":
        array += np.random.default_rng(0).standard_normal(array.shape, np.float32)
    with small(256, 64):
        write_array(tmp_path / "a", array)
    files = chunk_files(tmp_path / "a")
    assert len(files) == 3 and joined(read_array(tmp_path / "a")) == array.tobytes()
    return tmp_path / "a", files


def test_missing_files_are_errors(written):
    folder, files = written
    for file in [*files, folder / "zarr.json"]:
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError):
            read_array(folder)
        file.write_bytes(content)
    read_array(folder)


def test_truncated_files_are_errors(written):
    folder, files = written
    for file in [*files, folder / "zarr.json"]:
        content = file.read_bytes()
        for length in (0, 1, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:length])
            with pytest.raises(ValueError):
                read_array(folder)
        file.write_bytes(content)
    read_array(folder)


def test_flipped_bits_are_errors_or_change_the_bytes_except_in_padding(written):
    """Flips one bit in every byte of every file.

    Padding is not read: 1 of the 3 rows of the last chunk of the last block is within the array.
    """
    folder, files = written
    expected, undetected = joined(read_array(folder)), []
    for file in files:
        content = file.read_bytes()
        for i in range(len(content)):
            damaged = bytearray(content)
            damaged[i] ^= 1 << (i % 8)
            file.write_bytes(damaged)
            with contextlib.suppress(ValueError):
                if joined(read_array(folder, 21)) == expected:
                    undetected.append((file, i))
        file.write_bytes(content)
    assert [i for _, i in undetected] == list(range(19 * 12, 21 * 12))
    assert {file for file, _ in undetected} == {files[-1]}


def test_writing_replaces_every_file_of_an_interrupted_run(tmp_path):
    with small(64, 64):
        write_array(tmp_path / "a", np.ones((61, 3), np.float32))
        array = np.arange(8, dtype=np.float32)
        write_array(tmp_path / "a", array)
        assert len(chunk_files(tmp_path / "a")) == 1
        assert read_array(tmp_path / "a")[0].dtype == np.float32
    assert joined(read_array(tmp_path / "a")) == array.tobytes()


def test_files_are_byte_identical(tmp_path):
    array = np.random.default_rng(1).standard_normal((61, 5), np.float32)
    for name in ("a", "b"):
        with small(300, 90):
            write_array(tmp_path / name, array)
    names = [p.relative_to(tmp_path / "a") for p in chunk_files(tmp_path / "a")]
    assert len(names) > 4
    for name in [*names, "zarr.json"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    "lengths, message",
    [
        ([10, 10], "found 20 rows, expected"),
        ([10, 7, 10], "found a block of 7 rows, expected 10"),
        ([10, 10, 4], "found a block of 4 rows, expected 10"),
        ([], "found 0 rows, expected"),
    ],
)
def test_blocks_of_wrong_length_are_refused(tmp_path, lengths, message):
    with small(40, 40), pytest.raises(ValueError, match=message):
        parts = [np.ones(n, np.float32) for n in lengths]
        zarr.write_blocks(epath.Path(tmp_path / "a"), (61,), np.dtype(np.float32), parts)


def test_blocks_of_another_dtype_are_refused(tmp_path):
    parts = [np.ones(4, np.float16)]
    with pytest.raises(ValueError, match="found a block of float16, expected float32"):
        zarr.write_blocks(epath.Path(tmp_path / "a"), (4,), np.dtype(np.float32), parts)


# Read by Orbax ------------------------------------------------------------------------------------

# Rows that have no divisor (V 509), and rows that have one; padded on a mesh.
CONFIG = dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=509, n_layer=1)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def many_blocks(request, tmp_path_factory):
    """Returns a checkpoint of many files and chunks, and its weights."""
    path = tmp_path_factory.mktemp(request.param) / "c"
    rng = np.random.default_rng(0)
    shapes = {w.path: weights.stacked_shape(w, CONFIG) for w in weights.weight_table(CONFIG)}
    flat = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    params = unflatten_tree({path: jnp.asarray(x, request.param) for path, x in flat.items()})
    with small(8 << 10, 2 << 10):
        btlm.save(path, CONFIG, params)
    state = path / "state"
    assert len(chunk_files(state / "wte")) >= 7
    assert len(chunk_files(state / "blocks.0.mlp.c_fc.kernel")) >= 2
    inner = json.loads((state / "wte/zarr.json").read_text())
    outer = inner["chunk_grid"]["configuration"]["chunk_shape"][0]
    assert outer >= 4 * inner["codecs"][0]["configuration"]["chunk_shape"][0]
    return path, params


def test_orbax_reads_arrays_of_many_blocks(many_blocks):
    path, params = many_blocks
    tree, flat = flatten_tree(ocp.load(path)), flatten_tree(params)
    leaves = list(weights.disk_leaves(CONFIG))
    assert set(tree) == {leaf.path for leaf in leaves}
    for leaf in leaves:
        expected = flat[leaf.weight.path]
        expected = expected if leaf.layer is None else expected[leaf.layer]
        assert same_bits(tree[leaf.path], expected), leaf.path


def test_our_reader_agrees_with_orbax(many_blocks):
    path, _ = many_blocks
    meta, tree = metadata.read_metadata(path), flatten_tree(ocp.load(path))
    for leaf in weights.disk_leaves(CONFIG):
        for width in (None, 4):  # blocks as written, and others
            blocks = list(meta.blocks(leaf, width))
            assert joined(blocks) == np.asarray(tree[leaf.path]).tobytes(), leaf.path
            assert max(x.nbytes for x in blocks) <= zarr.BLOCK_BYTES


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(fsdp=4, tensor=2)], ids=str)
def test_arrays_of_many_blocks_are_loaded_onto_a_mesh(many_blocks, sizes):
    path, params = many_blocks
    _, loaded = btlm.load(path, mesh=make_mesh(**sizes))
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(loaded))
    for x, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        inner = tuple(slice(n) for n in expected.shape)
        assert same_bits(np.asarray(x)[inner], expected)
        padding = np.asarray(x).copy()
        padding[inner] = 0
        assert not jnp.any(padding)  # not the remainder of a block
