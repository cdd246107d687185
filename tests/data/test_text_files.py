"""Inputs that are missing, of an unknown kind, empty, damaged or without a package to read them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from btlm_jax.data.prepare import prepare_tokens
from btlm_jax.data.text_files import expand_inputs
from btlm_jax.data.text_reader import TextReader
from btlm_jax.data.token_shards import TokenShards
from btlm_jax.data.tokenize import tokenize
from support.texts import DOCUMENTS, jsonl, write_all_kinds


def flip_middle_byte(data: bytes) -> bytes:
    i = len(data) // 2
    return data[:i] + bytes([data[i] ^ 255]) + data[i + 1 :]


def test_damaged_files_are_refused_even_when_records_are_skipped(ascii_bpe, tmp_path):
    data = jsonl([d + random.Random(i).randbytes(40).hex() for i, d in enumerate(DOCUMENTS)])
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "whole.parquet")
    zst = zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})
    parquet = (tmp_path / "whole.parquet").read_bytes()
    for name, damaged in {
        "cut.jsonl.zst": zst[:-20],
        "flipped.jsonl.zst": flip_middle_byte(zst),
        "none.jsonl.zst": data,
        "cut.jsonl.gz": gzip.compress(data)[:-20],
        "flipped.jsonl.gz": flip_middle_byte(gzip.compress(data)),
        "none.jsonl.gz": data,
        "cut.parquet": parquet[:-20],
        "none.parquet": data,
    }.items():
        (tmp_path / name).write_bytes(damaged)
        # Never skipped: the rest of the file is lost.
        with pytest.raises(ValueError, match=rf"{name}: damaged or truncated \(.*fetch it again"):
            tokenize(tmp_path / name, tmp_path / "t", ascii_bpe, on_error="skip")


@pytest.mark.parametrize("size", [1, 50_000, -1])
def test_a_zstd_file_cut_within_any_frame_is_refused(tmp_path, size):
    frame = zstd.compress(random.Random(0).randbytes(100_000).hex().encode())
    (tmp_path / "a.txt.zst").write_bytes(zstd.compress(b"first ") + frame[:size])
    reader = TextReader(expand_inputs(tmp_path / "a.txt.zst"), "text")
    with pytest.raises(ValueError, match="damaged or truncated"):
        list(reader.pieces())


def test_garbage_after_a_zstd_frame_is_refused(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zstd.compress(b"text") + b"and something else")
    with pytest.raises(ValueError, match="damaged or truncated"):
        list(TextReader(expand_inputs(tmp_path / "a.txt.zst"), "text").pieces())


def test_zstd_frames_may_have_windows_of_up_to_two_gigabytes(tmp_path):
    options = {
        zstd.CompressionParameter.window_log: 31,
        zstd.CompressionParameter.enable_long_distance_matching: 1,
    }
    compressor = zstd.ZstdCompressor(options=options)  # size unknown, so the window stays large
    data = compressor.compress(b"some text") + compressor.flush()
    (tmp_path / "a.txt.zst").write_bytes(data)
    (document,) = TextReader(expand_inputs(tmp_path / "a.txt.zst"), "text").pieces()
    assert document.text == "some text"


def test_missing_empty_and_unknown_inputs_are_refused(ascii_bpe, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
    for name in ("empty.jsonl", "empty.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "a.csv").touch()
    (tmp_path / "a").touch()
    for inputs, error, message in (
        ([], ValueError, "inputs: found none"),
        (["b.jsonl"], FileNotFoundError, r"b\.jsonl: no such file"),
        (["*.txt"], FileNotFoundError, r"\*\.txt: no file matches"),
        (["."], ValueError, r"is a directory: name its files, such as '.*/\*\.jsonl'"),
        (["a.csv"], ValueError, r"found a file of kind '\.csv', expected \.jsonl, \.txt, \.parq"),
        (["a"], ValueError, "found a file of kind 'without suffix'"),
        (["empty.jsonl"], ValueError, "is empty: remove it"),
        (["blank.jsonl"], ValueError, "no documents with text; remove it"),
        (["a.jsonl", "a.json*"], ValueError, r"a\.jsonl is given twice"),
    ):
        with pytest.raises(error, match=message):
            tokenize([tmp_path / name for name in inputs], tmp_path / "t", ascii_bpe)
    empty = [tmp_path / name for name in ("empty.jsonl", "empty.parquet", "blank.jsonl")]
    with pytest.raises(ValueError, match=r"no documents with text$"):
        tokenize(empty, tmp_path / "t", ascii_bpe, on_error="skip")
    tokenize([*empty, tmp_path / "a.jsonl"], tmp_path / "t", ascii_bpe, on_error="skip")
    assert [s.documents for s in TokenShards(tmp_path / "t").metadata.sources] == [0, 0, 0, 1]


def test_files_of_an_earlier_run_in_the_target_are_not_read_as_text(ascii_bpe, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    inputs, target = f"{tmp_path}/**/*.txt", tmp_path / "t"
    tokenize(inputs, target, ascii_bpe)
    (target / "tokenizer/merges.txt").write_text("a b")
    message = r"merges\.txt lies in .*, the directory to write: name the inputs without it"
    with pytest.raises(ValueError, match=message):
        tokenize(inputs, target, ascii_bpe, overwrite=True)
    with pytest.raises(ValueError, match=message):
        prepare_tokens(inputs, target, new_tokenizer=300, overwrite=True)


def test_pipes_and_files_without_permission_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"found a pipe or a device.*as standard input, '-'"):
        expand_inputs(tmp_path / "pipe.txt")
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read everything
    with pytest.raises(PermissionError, match="chmod"):
        expand_inputs(tmp_path / "a.txt")


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    for name in ("~/a.txt", "~/*.txt"):
        assert [f.name for f in expand_inputs(name)] == [str(tmp_path / "a.txt")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_named_and_other_nul_bytes_are_text(tmp_path, encoding):
    """Without a byte order mark it is valid UTF-8, of letters and NULs."""
    (tmp_path / "a.txt").write_bytes("Some words, 12 of them.\n".encode(encoding))
    with pytest.raises(ValueError, match=r"UTF-16: iconv -f UTF-16 -t UTF-8 converts it"):
        list(TextReader(expand_inputs(tmp_path / "a.txt"), "text").pieces())
    (tmp_path / "b.txt").write_bytes(b"one\x00two" + b"\x00" * 20)
    (piece,) = TextReader(expand_inputs(tmp_path / "b.txt"), "text").pieces()
    assert piece.text == "one\x00two" + "\x00" * 20


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_a_cut_file_of_any_compression_is_refused(tmp_path, compress):
    file = tmp_path / ("a.txt.bz2" if compress is bz2.compress else "a.txt.xz")
    data = compress(random.Random(0).randbytes(10_000).hex().encode())
    for content in (data[:-100], b"not compressed"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or truncated"):
            list(TextReader(expand_inputs(file), "text").pieces())


@pytest.mark.parametrize(
    "package, name", [("backports.zstd", "a.jsonl.zst"), ("pyarrow", "a.parquet")]
)
def test_a_missing_package_is_named(ascii_bpe, tmp_path, monkeypatch, package, name):
    write_all_kinds(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}: pip install 'btlm-jax\[data\]'"):
        tokenize(tmp_path / name, tmp_path / "t", ascii_bpe)
