"""Token shards on disk: read back exactly, and refused if damaged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from btlm_jax.data.token_shards import TokenShards, is_token_directory
from btlm_jax.data.token_shards_metadata import tokenizer_fingerprint
from support.tokens import EOS, write_tokens


@pytest.fixture
def directory(tmp_path):
    return write_tokens(tmp_path / "t", np.arange(100) % 50, shard_tokens=40)


@given(st.data())
def test_tokens_are_read_back(tmp_path_factory, data):
    vocab = data.draw(st.sampled_from([300, 1 << 16, (1 << 16) + 1, 250_000]))
    tokens = data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=40))
    size = data.draw(st.integers(1, 40))
    path = write_tokens(
        tmp_path_factory.mktemp("t") / "t", tokens, vocab_size=vocab, shard_tokens=size
    )
    shards = TokenShards(path, vocab_size=vocab)
    assert len(shards) == shards.metadata.tokens == len(tokens)
    assert shards.metadata.max_id == max(tokens)
    assert shards.metadata.documents == tokens.count(EOS)
    start = data.draw(st.integers(0, len(tokens)))
    n = data.draw(st.integers(0, len(tokens) - start))
    ids = shards.read(start, n)
    assert ids.dtype == np.int32 and ids.tolist() == tokens[start : start + n]


def test_ids_have_the_width_of_the_vocabulary(tmp_path):
    for vocab, width in ((1 << 16, 2), ((1 << 16) + 1, 4)):
        path = write_tokens(tmp_path / str(vocab), [1, vocab - 1, 0], vocab_size=vocab)
        assert (path / "tokens-00000.bin").stat().st_size == 3 * width
        assert TokenShards(path).read(0, 3).tolist() == [1, vocab - 1, 0]


def test_the_fingerprint_follows_the_metadata(directory):
    before = TokenShards(directory).fingerprint
    assert TokenShards(directory).fingerprint == before
    edit(directory, eos_id=1)
    assert TokenShards(directory).fingerprint != before


def test_reading_beyond_the_end_is_refused(directory):
    for start, n in ((90, 11), (-1, 2), (101, 0)):
        with pytest.raises(ValueError, match="it holds 100"):
            TokenShards(directory).read(start, n)


def test_ids_outside_the_vocabulary_are_refused(directory):
    TokenShards(directory, vocab_size=50)
    with pytest.raises(ValueError, match=r"tokens-00000\.bin holds token 39.*vocab_size is 39"):
        TokenShards(directory, vocab_size=39)
    with pytest.raises(ValueError, match=r"tokens-00001\.bin holds token 49.*vocab_size is 49"):
        TokenShards(directory, vocab_size=49)


def test_missing_files_are_named(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory, expected tokens made by"):
        TokenShards(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json in it"):
        TokenShards(tmp_path)
    (tmp_path / ".u.partial").mkdir()
    with pytest.raises(FileNotFoundError, match="the same command continues it"):
        TokenShards(tmp_path / "u")
    (directory / "tokens-00001.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokens-00001\.bin is missing"):
        TokenShards(directory)


def test_shards_of_another_size_are_refused(directory):
    shard = directory / "tokens-00002.bin"
    complete = shard.read_bytes()
    for data, message in (
        (b"", "found 0 bytes, expected 40: the file is truncated"),
        (complete[:-1], "found 39 bytes, expected 40: the file is truncated"),
        (complete + b"x", "not the one described"),
    ):
        shard.write_bytes(data)
        with pytest.raises(ValueError, match=rf"tokens-00002\.bin: .*{message}"):
            TokenShards(directory)


def test_the_fingerprint_covers_the_files_that_define_the_tokenizer():
    gpt2 = {"vocab.json": b"a", "merges.txt": b"b", "tokenizer_config.json": b"c"}
    assert tokenizer_fingerprint(gpt2) == hashlib.sha256(b"ab").hexdigest()
    both = gpt2 | {"tokenizer.json": b"d"}
    assert tokenizer_fingerprint(both) == hashlib.sha256(b"d").hexdigest()


def edit(directory: Path, **changes) -> None:
    file = directory / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(kind="other"), "kind: found 'other', expected .*: copy the directory again"),
        (dict(format=99), r"format: found 99, this version reads 1; it was written by btlm-jax"),
        (dict(tokens=99), "tokens: found 99, its shards add up to 100"),
        (dict(documents=None), "documents: found None"),
        (dict(dtype="uint32"), "dtype: found 'uint32', expected uint16"),
        (
            dict(vocab_size="many"),
            "vocab_size: found 'many', expected int; copy the directory again",
        ),
        (dict(eos_id=-1), "eos_id: found '-1'"),
        (dict(shards=7), "shards: found '7', expected a list; copy the directory"),
        (dict(shards=[7]), "found '7', expected an object"),
        (dict(sources=[{"name": 3}]), "name: found '3', expected str"),
    ],
)
def test_damaged_metadata_is_refused(directory, changes, message):
    edit(directory, **changes)
    with pytest.raises(ValueError, match=rf"manifest\.json: {message}"):
        TokenShards(directory)


def test_shards_cannot_leave_the_directory(directory):
    shards = json.loads((directory / "manifest.json").read_text())["shards"]
    shards[0]["name"] = "../tokens-00000.bin"
    edit(directory, shards=shards)
    with pytest.raises(ValueError, match=r"shard '\.\./tokens"):
        TokenShards(directory)


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"[]", b"", b"\0\0"])
def test_a_manifest_of_another_kind_is_refused(directory, data):
    assert is_token_directory(directory)
    (directory / "manifest.json").write_bytes(data)
    assert not is_token_directory(directory)
    with pytest.raises(ValueError, match=r"manifest\.json:? (is|not|holds) .*copy the directory"):
        TokenShards(directory)


@pytest.mark.parametrize("zeroed", ["beginning", "end"])
def test_a_shard_that_begins_or_ends_with_zero_bytes_is_refused(tmp_path, zeroed):
    count = 1 << 16
    write_tokens(tmp_path / "t", np.arange(1, count + 1) % 90 + 1)
    file = tmp_path / "t/tokens-00000.bin"
    data, half = file.read_bytes(), file.stat().st_size // 2
    zeros = bytes(len(data) - half)
    file.write_bytes(zeros + data[half:] if zeroed == "beginning" else data[:half] + zeros)
    with pytest.raises(ValueError, match=r"begins or ends with zero bytes.*copy it again"):
        TokenShards(tmp_path / "t")


def test_the_parent_of_token_directories_names_them(tmp_path):
    """`btlm tokenize --held-out` writes two directories of tokens."""
    for name in ("train", "held_out"):
        write_tokens(tmp_path / "t" / name, np.arange(10))
    with pytest.raises(FileNotFoundError, match=r"there are tokens in .*t/held_out, .*t/train"):
        TokenShards(tmp_path / "t")
