"""Tokenizing that was killed or failed: resumed, to the same bytes."""

from __future__ import annotations

import errno
import io
import itertools
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from btlm_jax.data import encoder as encoder_lib
from btlm_jax.data import tokenize as tokenize_lib
from btlm_jax.data.token_shards import TokenShards
from btlm_jax.data.tokenize import tokenize
from support.kill_and_resume import KillAndResume
from support.texts import DOCUMENTS, file_contents, jsonl, read_documents

TOKENIZE_SLOWLY = """
import sys, time
from btlm_jax.data.tokenize import tokenize
from btlm_jax.utils import atomic
record = atomic.StagedDirectory.record
def record_slowly(*args):
    time.sleep(0.004)
    record(*args)
    time.sleep(0.004)
atomic.StagedDirectory.record = record_slowly
report = tokenize(sys.argv[3:], sys.argv[1], sys.argv[2], shard_tokens=400)
print(report.resumed, report.shards)
"""


def test_killed_at_random_moments_it_resumes_to_the_same_bytes(ascii_bpe, tmp_path):
    """Finished shards are not written again."""
    documents = [d + str(i) for i, d in enumerate(DOCUMENTS * 40)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents[:400]))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd.compress(jsonl(documents[400:800])))
    table = pa.table({"text": documents[800:]})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=50)
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text {i} " * 5)
    names = ("a.jsonl", "*.txt", "b.jsonl.zst", "c.parquet")
    inputs, files_before = [str(tmp_path / name) for name in names], os.listdir(tmp_path)
    tokenize(inputs, tmp_path / "expected", ascii_bpe, shard_tokens=400)
    total = len(list((tmp_path / "expected").glob("*.bin")))
    assert total > 100
    work, shards = tmp_path / ".t.partial", {}

    def finished() -> list[str]:
        return [p.name.removesuffix(".json") for p in work.glob("finished/*.json")]

    def check_finished_shards(_: str) -> None:
        now = {name: (work / "t" / name).stat() for name in finished()}
        identity = {name: (s.st_ino, s.st_mtime_ns) for name, s in now.items()}
        assert shards.items() <= identity.items()
        shards.update(identity)

    command = [sys.executable, "-c", TOKENIZE_SLOWLY, tmp_path / "t", ascii_bpe, *inputs]
    output, killed = KillAndResume(
        command=[str(x) for x in command],
        progress=lambda: len(finished()),
        pieces=(total // 16, total // 7),
        kills=6,
    ).run(check_finished_shards)
    assert killed == 6
    assert output.splitlines()[-1] == f"{len(shards)} {total}"
    assert file_contents(tmp_path / "t") == file_contents(tmp_path / "expected")
    assert sorted(os.listdir(tmp_path)) == sorted([*files_before, "t", "expected"])


def test_a_bad_record_can_be_skipped_by_the_next_run(ascii_bpe, tmp_path, caplog, monkeypatch):
    """Shards that were finished before the bad record are kept."""
    monkeypatch.setattr(encoder_lib, "PIECE_CHARACTERS", 2000)
    bad = b'{"text": "cut\n{"txt": "other"}\n'
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS * 100) + bad + jsonl(["last"]) + bad)
    arguments = tmp_path / "a.jsonl", tmp_path / "t", ascii_bpe
    with pytest.raises(ValueError, match=r"a\.jsonl:3001: not JSON \(.*pass on_error='skip'"):
        tokenize(*arguments, shard_tokens=5000, threads=1)
    report = tokenize(*arguments, shard_tokens=5000, on_error="skip")
    assert report.resumed > 20 and report.skipped == 4
    assert read_documents(tmp_path / "t")[-1] == "last" and report.documents == 3001
    assert "skipped " in caplog.text and "4 UNUSABLE RECORDS SKIPPED" in caplog.text
    assert "4 UNUSABLE RECORDS SKIPPED" in str(report)
    assert TokenShards(tmp_path / "t").metadata.sources[0].skipped == 4
    options = dict(shard_tokens=5000, on_error="skip")
    tokenize(tmp_path / "a.jsonl", tmp_path / "u", ascii_bpe, **options)
    assert file_contents(tmp_path / "t") == file_contents(tmp_path / "u")


def test_a_resumed_run_says_what_it_does_again(ascii_bpe, tmp_path, caplog, monkeypatch):
    """A shard holds whole documents, so that a large one is tokenized again from its beginning."""
    (tmp_path / "a.txt").write_text("one two three. " * 5000)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenize_lib._ShardContent, "add", interrupt)
        tokenize(tmp_path / "a.txt", tmp_path / "t", ascii_bpe)
    caplog.set_level("INFO")
    report = tokenize(tmp_path / "a.txt", tmp_path / "t", ascii_bpe)
    assert f"0 shards were finished; {report.tokens:,} tokens of the next one are" in caplog.text


@pytest.mark.parametrize("source", ["a.jsonl", "-"])
def test_a_full_disk_says_what_was_kept_and_how_to_continue(
    ascii_bpe, tmp_path, monkeypatch, source
):
    data, count = jsonl(DOCUMENTS * 40), itertools.count()
    (tmp_path / "a.jsonl").write_bytes(data)
    arguments = source if source == "-" else tmp_path / source, tmp_path / "t", ascii_bpe

    def open_full_after_three(path, mode):
        return open(path if next(count) < 3 else "/dev/full", mode)

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(tokenize_lib, "open", open_full_after_three, raising=False)
        tokenize(*arguments, shard_tokens=5000)
    message, resumed = ("nothing of it is kept", 0) if source == "-" else ("same command again", 3)
    assert error.value.errno == errno.ENOSPC and message in str(error.value)
    assert f"no space left while writing {tmp_path / 't'}" in str(error.value)
    assert not (tmp_path / "t").exists()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert tokenize(*arguments, shard_tokens=5000).resumed == resumed
    assert read_documents(tmp_path / "t") == DOCUMENTS * 40


def test_a_changed_input_starts_over(ascii_bpe, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(encoder_lib, "PIECE_CHARACTERS", 2000)  # shards end before the error
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl(DOCUMENTS * 100) + b"{")
    with pytest.raises(ValueError, match="not JSON"):
        tokenize(file, tmp_path / "t", ascii_bpe, shard_tokens=5000)
    file.write_bytes(jsonl(["new", *DOCUMENTS]))
    report = tokenize(file, tmp_path / "t", ascii_bpe, shard_tokens=5000)
    assert report.resumed == 0 and read_documents(tmp_path / "t")[:2] == ["new", DOCUMENTS[0]]
    assert "starting over" in caplog.text
