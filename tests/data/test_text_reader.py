"""A reader of several files can start after any document."""

from __future__ import annotations

import gzip
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from btlm_jax.data import text_cutter, text_files, text_records
from btlm_jax.data.prepare import prepare_tokens
from btlm_jax.data.split import SplitPart
from btlm_jax.data.text_files import expand_inputs
from btlm_jax.data.text_reader import TextReader
from btlm_jax.data.tokenize import tokenize
from btlm_jax.data.train_tokenizer import sample_texts
from support.texts import DOCUMENTS, file_contents, jsonl, read_documents, write_all_kinds


def test_reading_can_begin_after_any_document(tmp_path):
    for kind in write_all_kinds(tmp_path):
        files = expand_inputs(str(tmp_path / kind))
        documents = list(TextReader(files, "text").pieces())
        assert [d.text for d in documents] == DOCUMENTS
        for i in range(0, len(documents), 4):
            before = [documents[j].counts for j in range(i + 1) if kind == "*.txt"]
            reader = TextReader(
                files, "text", begin=documents[i].next, counts=before or [documents[i].counts]
            )
            assert list(reader.pieces()) == documents[i + 1 :]
            assert reader.total.documents == 30


LARGE = "some words, a \u00e9 and 12 numbers. " * 60
KINDS = ("txt", "txt.xz", "jsonl", "jsonl.gz", "parquet")


@pytest.fixture
def small_limits(monkeypatch):
    """Documents of more than 500 bytes are large, and read in blocks of 64."""
    for module in (text_records, text_files):
        monkeypatch.setattr(module, "READ_BYTES", 64, raising=False)
    monkeypatch.setattr(text_records, "LARGE_BYTES", 500)
    monkeypatch.setattr(text_cutter, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(text_cutter, "_SURROUNDINGS", ((32, 32), (200, 4)))


def write_documents(folder, kind, documents):
    """Writes documents as one file of a kind (only the first as .txt)."""
    file = folder / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": documents}), file)
        return file
    data = documents[0].encode() if kind.startswith("txt") else jsonl(documents)
    compress = {"gz": gzip.compress, "xz": lzma.compress}.get(file.suffix[1:], bytes)
    file.write_bytes(compress(data))
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_large_documents_give_the_tokens_of_the_whole_text(
    kind, tmp_path, ascii_bpe, small_limits, monkeypatch
):
    documents = [LARGE.replace("\u00e9", "e"), "short", LARGE.replace("\u00e9", "?")]
    file = write_documents(tmp_path, kind, documents)
    report = tokenize(file, tmp_path / "t", ascii_bpe, shard_tokens=100)
    expected = documents[:1] if kind.startswith("txt") else documents
    assert read_documents(tmp_path / "t") == expected
    assert (report.documents, report.text_bytes) == (len(expected), len("".join(expected)))
    monkeypatch.undo()
    tokenize(file, tmp_path / "u", ascii_bpe, shard_tokens=100)
    assert file_contents(tmp_path / "t") == file_contents(tmp_path / "u")


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_of_large_documents_is_that_of_whole_texts(
    kind, tmp_path, ascii_bpe, small_limits, monkeypatch
):
    documents = [f"{i} " + LARGE.replace("\u00e9", "e") for i in range(12)]
    file = write_documents(tmp_path, kind, documents)
    options = dict(tokenizer=ascii_bpe, held_out=0.4)
    prepare_tokens(file, tmp_path / "t", **options)
    monkeypatch.undo()
    prepare_tokens(file, tmp_path / "u", **options)
    assert file_contents(tmp_path / "t") == file_contents(tmp_path / "u")


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_large_document_that_ends_badly_is_taken_back(kind, tmp_path, ascii_bpe, small_limits):
    good = write_documents(tmp_path, "jsonl.gz", ["before"])
    file = tmp_path / f"b.{kind}"
    data = LARGE.replace("\u00e9", "e").encode()
    file.write_bytes(data + b"\xff" if kind == "txt" else jsonl([data.decode()])[:-3])
    with pytest.raises(ValueError, match=r"b\.(txt: not UTF-8|jsonl:1: not JSON)"):
        tokenize([good, file], tmp_path / "t", ascii_bpe)
    report = tokenize([good, file], tmp_path / "t", ascii_bpe, on_error="skip", overwrite=True)
    assert read_documents(tmp_path / "t") == ["before"]
    assert (report.documents, report.skipped) == (1, 1)


def test_new_tokenizers_do_not_see_large_held_out_documents(tmp_path, small_limits):
    documents = [f"{chr(97 + i)}{i} " * 200 for i in range(20)]
    files = expand_inputs(write_documents(tmp_path, "jsonl", documents))
    part = SplitPart(0.4, held_out=False, one_document=False)
    text = "".join(sample_texts(files, "text", part=part))
    assert text == "".join(d for d in documents if part.select(d)) != "".join(documents)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    file = write_documents(tmp_path, "jsonl", DOCUMENTS)
    pieces = TextReader(expand_inputs(file), "text").pieces()
    next(pieces)
    with file.open("ab") as stream:
        stream.write(jsonl(["more"]))
    with pytest.raises(ValueError, match="it changed while it was read"):
        list(pieces)
