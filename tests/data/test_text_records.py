"""Records that cannot be used: refused by line or row, or skipped and counted."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from btlm_jax.data.tokenize import tokenize
from support.texts import jsonl, read_documents


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"content": "a", "id": 1}', "no field 'text', found 'content', 'id'"),
        (b"{}", "no field 'text', found none"),
        (b'["a"]', "found list, expected an object with the field 'text'"),
        (b'{"text": null}', "field 'text': found NoneType, expected a string"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (rb'{"text": "\ud800"}', "not valid Unicode"),
        (b'{"text":' + b"[" * 100_000, "not JSON"),
    ],
)
def test_unusable_lines_are_refused_or_skipped(ascii_bpe, tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one"]) + line + b"\n" + jsonl(["two"]))
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{message}.*on_error='skip'"):
        tokenize(tmp_path / "a.jsonl", tmp_path / "t", ascii_bpe)
    report = tokenize(tmp_path / "a.jsonl", tmp_path / "t", ascii_bpe, on_error="skip")
    assert report.skipped == 1 and read_documents(tmp_path / "t") == ["one", "two"]


def test_only_the_first_unusable_lines_are_logged(ascii_bpe, tmp_path, caplog):
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 50 + jsonl(["one"]))
    report = tokenize(tmp_path / "a.jsonl", tmp_path / "t", ascii_bpe, on_error="skip")
    assert report.skipped == 50
    assert len([r for r in caplog.records if r.message.startswith("skipped ")]) == 5
    assert "further unusable records" in caplog.text


def test_rows_and_texts_that_are_not_utf8_are_refused_or_skipped(ascii_bpe, tmp_path):
    raw = pa.array([b"one", b"\xff\xfe", None, b"two"]).cast(pa.binary())
    column = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet:row 2: not UTF-8"):
        tokenize(tmp_path / "a.parquet", tmp_path / "t", ascii_bpe)
    report = tokenize(tmp_path / "a.parquet", tmp_path / "t", ascii_bpe, on_error="skip")
    assert report.skipped == 2 and read_documents(tmp_path / "t") == ["one", "two"]
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 \(.*at byte 3\)"):
        tokenize(tmp_path / "latin.txt", tmp_path / "u", ascii_bpe)


def test_parquet_columns_must_exist_and_hold_strings(ascii_bpe, tmp_path):
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'text', found \['body', 'n'\]"):
        tokenize(tmp_path / "a.parquet", tmp_path / "t", ascii_bpe)
    with pytest.raises(ValueError, match=r"column 'n' is int64, expected strings"):
        tokenize(tmp_path / "a.parquet", tmp_path / "t", ascii_bpe, field="n")
    tokenize(tmp_path / "a.parquet", tmp_path / "t", ascii_bpe, field="body")
    assert read_documents(tmp_path / "t") == ["a"]
