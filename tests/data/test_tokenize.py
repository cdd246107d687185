"""Text files to token shards: every format gives the same tokens, threads change nothing."""

from __future__ import annotations

import gzip
import hashlib
import io
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btlm_jax.data.token_shards import TokenShards
from btlm_jax.data.tokenize import tokenize
from support.texts import DOCUMENTS, file_contents, jsonl, read_documents, write_all_kinds

ascii_texts = st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126)), max_size=12)


@settings(max_examples=30)
@given(documents=ascii_texts.filter(any), shard_tokens=st.integers(1, 200), data=st.data())
def test_documents_survive(ascii_bpe, tmp_path_factory, documents, shard_tokens, data):
    folder = tmp_path_factory.mktemp("t")
    cut = data.draw(st.integers(0, len(documents)))
    for name, texts in (("a", documents[:cut]), ("b", documents[cut:])):
        (folder / f"{name}.jsonl").write_bytes(jsonl(texts))
    options = dict(shard_tokens=shard_tokens, on_error="skip")
    one, many = folder / "one", folder / "many"
    report = tokenize(f"{folder}/*.jsonl", one, ascii_bpe, threads=1, **options)
    tokenize(f"{folder}/*.jsonl", many, ascii_bpe, threads=3, **options)
    with_text = [d for d in documents if d]
    assert read_documents(one) == with_text
    assert file_contents(one) == file_contents(many)
    metadata = TokenShards(one).metadata
    assert report.documents == metadata.documents == len(with_text)
    assert report.empty == len(documents) - len(with_text)
    assert report.tokens == metadata.tokens == sum(map(len, with_text)) + len(with_text)
    assert metadata.text_bytes == sum(map(len, with_text))
    assert [s.documents for s in metadata.sources] == [
        sum(map(bool, documents[:cut])), sum(map(bool, documents[cut:]))
    ]  # fmt: skip
    check_shards(metadata, file_contents(one), shard_tokens)


def check_shards(metadata, files: dict[str, bytes], shard_tokens: int) -> None:
    """Checks that shards are full, and that the checksums are those of the files."""
    for shard in metadata.shards[:-1]:
        assert shard.tokens >= shard_tokens  # and fewer without the last document
    for shard in metadata.shards:
        assert shard.sha256 == hashlib.sha256(files[shard.name]).hexdigest()
    tokenizer_json = files["tokenizer/tokenizer.json"]
    assert metadata.tokenizer_sha256 == hashlib.sha256(tokenizer_json).hexdigest()


def test_all_kinds_give_the_same_tokens(ascii_bpe, tmp_path):
    shards = []
    for i, kind in enumerate(write_all_kinds(tmp_path)):
        report = tokenize(tmp_path / kind, tmp_path / f"t{i}", ascii_bpe, shard_tokens=300)
        assert read_documents(tmp_path / f"t{i}") == DOCUMENTS, kind
        assert report.shards > 3
        shards.append(TokenShards(tmp_path / f"t{i}").metadata.shards)
        assert shards[i] == shards[0]


@pytest.mark.parametrize("form", ["jsonl", "txt"])
def test_standard_input_is_read_among_files(ascii_bpe, tmp_path, monkeypatch, caplog, form):
    data = jsonl(DOCUMENTS) if form == "jsonl" else b"\xef\xbb\xbfone\ntwo"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    (tmp_path / "z.txt").write_text("last")
    tokenize(["-", tmp_path / "z.txt"], tmp_path / "t", ascii_bpe, stdin_format=form)
    first = DOCUMENTS if form == "jsonl" else ["onetwo"]  # the tokenizer has no line ends
    assert read_documents(tmp_path / "t") == [*first, "last"]
    assert "standard input cannot be read twice" in caplog.text


def test_progress_counts_bytes_of_the_files(ascii_bpe, tmp_path, caplog):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(DOCUMENTS * 50)))
    with caplog.at_level("INFO"):
        report = tokenize(tmp_path / "a.jsonl.gz", tmp_path / "t", ascii_bpe)
    lines = [r.message for r in caplog.records if r.message.startswith("tokenize: ")]
    assert len(lines) == 1 and "(100%)" in lines[0]
    assert "tokens of 1,500 documents in 1 shards, 0.98 bytes per token" in str(report)


def test_bad_options_are_refused(ascii_bpe, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
    for options, message in (
        (dict(shard_tokens=0), "shard_tokens: found 0"),
        (dict(threads=0), "threads: found 0"),
        (dict(on_error="ignore"), "on_error: found 'ignore', expected 'raise' or 'skip'"),
        (dict(stdin_format="csv"), "stdin_format: found 'csv'"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize(tmp_path / "a.jsonl", tmp_path / "t", ascii_bpe, **options)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        tokenize(tmp_path / "a.jsonl", tmp_path / "t", tmp_path)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_only_token_directories_are_overwritten(ascii_bpe, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
    (tmp_path / "t").mkdir()
    with pytest.raises(FileExistsError, match="was not written by this command"):
        tokenize(tmp_path / "a.jsonl", tmp_path / "t", ascii_bpe, overwrite=True)
    (tmp_path / "t").rmdir()
    tokenize(tmp_path / "a.jsonl", tmp_path / "t", ascii_bpe)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        tokenize(tmp_path / "a.jsonl", tmp_path / "t", ascii_bpe)
    tokenize(tmp_path / "a.jsonl", tmp_path / "t", ascii_bpe, overwrite=True)
