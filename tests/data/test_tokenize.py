"""Text files to token ids: every format alike, the same bytes however often it was killed."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from btlm_jax.data import encoder as encoder_lib
from btlm_jax.data import text_files, text_reader
from btlm_jax.data import tokenize as tokenize_lib
from btlm_jax.data.token_shards import TokenShards
from btlm_jax.data.tokenize import tokenize
from support import golden
from support.texts import contents, jsonl, texts

EOS = "<|endoftext|>"
DOCUMENTS = [f"Document {i}: " + "words and more " * (i % 7) for i in range(30)]
ascii_texts = st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126)), max_size=12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of printable ASCII: a token per character, and EOS."""
    home = tmp_path_factory.mktemp("tokenizer")
    golden.write_tokenizer(home, 96)
    return home


# What comes out ---------------------------------------------------------------------------------


@settings(max_examples=30)
@given(documents=ascii_texts.filter(any), shard_tokens=st.integers(1, 200), data=st.data())
def test_documents_survive(tokenizer, tmp_path_factory, documents, shard_tokens, data):
    home = tmp_path_factory.mktemp("t")
    cut = data.draw(st.integers(0, len(documents)))
    for name, part in (("a", documents[:cut]), ("b", documents[cut:])):
        (home / f"{name}.jsonl").write_bytes(jsonl(part))
    options = dict(shard_tokens=shard_tokens, on_error="skip")
    report = tokenize(f"{home}/*.jsonl", home / "one", tokenizer, threads=1, **options)
    tokenize(f"{home}/*.jsonl", home / "many", tokenizer, threads=3, **options)
    kept = [d for d in documents if d]
    assert texts(home / "one") == kept
    assert contents(home / "one") == contents(home / "many")
    metadata = TokenShards(home / "one").metadata
    assert report.documents == metadata.documents == len(kept)
    assert report.empty == len(documents) - len(kept)
    assert report.tokens == metadata.tokens == sum(map(len, kept)) + len(kept)
    assert metadata.text_bytes == sum(map(len, kept))
    assert [s.documents for s in metadata.sources] == [
        sum(map(bool, documents[:cut])), sum(map(bool, documents[cut:]))
    ]  # fmt: skip
    for shard in metadata.shards[:-1]:
        assert shard.tokens >= shard_tokens  # and not without its last document
    written = contents(home / "one")
    for shard in metadata.shards:
        assert shard.sha256 == hashlib.sha256(written[shard.name]).hexdigest()
    tokenizer_json = written["tokenizer/tokenizer.json"]
    assert metadata.tokenizer_sha256 == hashlib.sha256(tokenizer_json).hexdigest()


def write_all_kinds(home: Path) -> list[str]:
    """The same documents as files of every kind."""
    data = jsonl(DOCUMENTS)
    (home / "a.jsonl").write_bytes(data.replace(b"\n", b"\r\n\r\n"))  # blank lines are nothing
    (home / "a.jsonl.gz").write_bytes(gzip.compress(data[:500]) + gzip.compress(data[500:]))
    frames = [zstd.compress(part) for part in (data[:700], b"", data[700:])]
    (home / "a.jsonl.zst").write_bytes(b"".join(frames))
    table = pa.table({"meta": list(range(30)), "text": DOCUMENTS})
    pq.write_table(table, home / "a.parquet", row_group_size=7)
    large = table.set_column(1, "text", table["text"].cast(pa.large_string()))
    pq.write_table(large, home / "large.parquet")
    coded = table.set_column(1, "text", table["text"].dictionary_encode())
    pq.write_table(coded, home / "coded.parquet", row_group_size=11)
    for i, text in enumerate(DOCUMENTS):
        (home / f"{i:02}.txt").write_text(text)
    kinds = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "large.parquet", "coded.parquet"]
    return [*kinds, "*.txt"]


def test_all_kinds_give_the_same_tokens(tokenizer, tmp_path):
    shards = []
    for i, kind in enumerate(write_all_kinds(tmp_path)):
        report = tokenize(tmp_path / kind, tmp_path / f"t{i}", tokenizer, shard_tokens=300)
        assert texts(tmp_path / f"t{i}") == DOCUMENTS, kind
        assert report.shards > 3
        shards.append(TokenShards(tmp_path / f"t{i}").metadata.shards)
        assert shards[i] == shards[0]


def test_reading_can_begin_after_any_document(tmp_path):
    for kind in write_all_kinds(tmp_path):
        files = text_files.expand_inputs(str(tmp_path / kind))
        whole = list(text_reader.TextReader(files, "text").documents())
        assert [d.text for d in whole] == DOCUMENTS
        for i in range(0, len(whole), 4):
            before = [whole[j].counts for j in range(i + 1) if kind == "*.txt"]
            again = text_reader.TextReader(
                files, "text", begin=whole[i].next, counts=before or [whole[i].counts]
            )
            assert list(again.documents()) == whole[i + 1 :]
            assert again.total.documents == 30


@pytest.mark.parametrize("form", ["jsonl", "txt"])
def test_standard_input(tokenizer, tmp_path, monkeypatch, caplog, form):
    data = jsonl(DOCUMENTS) if form == "jsonl" else b"\xef\xbb\xbfone\ntwo"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    (tmp_path / "z.txt").write_text("last")
    inputs = ["-", tmp_path / "z.txt"]
    tokenize(inputs, tmp_path / "t", tokenizer, stdin_format=form)
    first = DOCUMENTS if form == "jsonl" else ["onetwo"]  # the tokenizer knows no line ends
    assert texts(tmp_path / "t") == [*first, "last"]
    assert "standard input cannot be read twice" in caplog.text


def bpe(home: Path, **special) -> Path:
    """A byte-level BPE without merges, with `special` token -> id added."""
    home.mkdir()
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    # What a tokenizer.json made for other purposes may ask for.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=4)
    name, index = next(iter(special.items()))
    tokenizer.post_processor = processors.TemplateProcessing(f"{name} $A", None, [(name, index)])
    tokenizer.save(str(home / "tokenizer.json"))
    return home


def test_text_is_only_text(tmp_path):
    """Marker tokens, truncation, padding and templates have no place in training data."""
    home = bpe(tmp_path / "bpe", **{EOS: 256})
    text = f"a {EOS} in the text is no end: ünïcode"
    (tmp_path / "a.jsonl").write_bytes(jsonl([text, "b"]))
    tokenize(tmp_path / "a.jsonl", tmp_path / "t", home)
    opened = TokenShards(tmp_path / "t", vocab_size=257)
    assert len(opened) == len(text.encode()) + 3 and opened.metadata.documents == 2
    assert np.flatnonzero(opened.read(0, len(opened)) == 256).tolist() == [
        len(text.encode()), len(opened) - 1
    ]  # fmt: skip


def test_end_of_document(tmp_path, tokenizer):
    home = bpe(tmp_path / "bpe", **{"</s>": 256, "<end>": 257})
    (tmp_path / "a.jsonl").write_bytes(jsonl(["b"]))
    with pytest.raises(ValueError, match=r"no token '<\|endoftext\|>' to end documents with"):
        tokenize(tmp_path / "a.jsonl", tmp_path / "t", home)
    (home / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    tokenize(tmp_path / "a.jsonl", tmp_path / "t", home)
    assert TokenShards(tmp_path / "t").metadata.eos_id == 256
    assert sorted(f.name for f in TokenShards(tmp_path / "t").tokenizer_files) == [
        "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    tokenize(tmp_path / "a.jsonl", tmp_path / "t", home, eos="<end>", overwrite=True)
    assert TokenShards(tmp_path / "t").metadata.eos_id == 257
    # The directory serves as a tokenizer, as a checkpoint does.
    tokenize(tmp_path / "a.jsonl", tmp_path / "u", tmp_path / "t")
    assert TokenShards(tmp_path / "u").metadata.eos_id == 256


def test_vocabulary(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["b"]))
    with pytest.raises(ValueError, match="ids up to 95, the model's vocab_size is 50"):
        tokenize(tmp_path / "a.jsonl", tmp_path / "t", tokenizer, vocab_size=50)
    for vocab, width in ((None, 2), (1 << 16, 2), (70_000, 4)):
        tokenize(tmp_path / "a.jsonl", tmp_path / "t", tokenizer, vocab_size=vocab, overwrite=True)
        assert (tmp_path / "t/tokens-00000.bin").stat().st_size == 2 * width
        assert TokenShards(tmp_path / "t").metadata.vocab_size == vocab or 96


def test_few_documents_are_held(tokenizer):
    """Reading is ahead of writing by a few batches, whatever the size of the input."""
    read = 0

    def documents():
        nonlocal read
        for i in range(10_000):
            read += 1
            position = text_reader.ReadPosition(0, i)
            yield text_reader.TextDocument("word " * 20_000, position, text_reader.DocumentCounts())

    encoder = encoder_lib.Encoder(tokenizer, None, None)
    encoded = encoder_lib.encode_documents(documents(), encoder, 2)
    for _ in range(10):
        next(encoded)
    encoded.close()
    assert read < 10 + 5 * 3  # batches of three such documents


def test_progress_counts_bytes_of_the_files(tokenizer, tmp_path, caplog):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(DOCUMENTS * 50)))
    with caplog.at_level("INFO"):
        report = tokenize(tmp_path / "a.jsonl.gz", tmp_path / "t", tokenizer)
    lines = [r.message for r in caplog.records if r.message.startswith("tokenize: ")]
    assert len(lines) == 1 and "(100%)" in lines[0]
    assert "tokens of 1,500 documents in 1 shards, 0.98 bytes per token" in str(report)


# Interrupted ------------------------------------------------------------------------------------

SLOWLY = """
import sys, time
from btlm_jax.data.tokenize import tokenize
from btlm_jax.utils import atomic
record = atomic.StagedDirectory.record
def slowly(*args):
    time.sleep(0.004)
    record(*args)
    time.sleep(0.004)
atomic.StagedDirectory.record = slowly
report = tokenize(sys.argv[3:], sys.argv[1], sys.argv[2], shard_tokens=400)
print(report.resumed, report.shards)
"""


def test_killed_and_continued(tokenizer, tmp_path):
    """Six times, anywhere; finished shards are not made again, and the bytes are the same."""
    documents = [d + str(i) for i, d in enumerate(DOCUMENTS * 40)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents[:400]))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd.compress(jsonl(documents[400:800])))
    table = pa.table({"text": documents[800:]})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=50)
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text {i} " * 5)
    names = ("a.jsonl", "*.txt", "b.jsonl.zst", "c.parquet")
    inputs, before = [str(tmp_path / name) for name in names], os.listdir(tmp_path)
    tokenize(inputs, tmp_path / "whole", tokenizer, shard_tokens=400)
    work = tmp_path / ".t.partial"
    command = [sys.executable, "-c", SLOWLY, str(tmp_path / "t"), str(tokenizer), *inputs]
    rng, kills, made = random.Random(0), 0, {}
    total = len(list((tmp_path / "whole").glob("*.bin")))
    assert total > 100
    while kills < 6:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        goal = len(made) + rng.randint(total // 16, total // 7)
        while len(list(work.glob("finished/*.json"))) < goal:
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        for name, (inode, mtime) in made.items():
            status = (work / "t" / name).stat()
            assert (status.st_ino, status.st_mtime_ns) == (inode, mtime)
        names = [p.name.removesuffix(".json") for p in work.glob("finished/*.json")]
        stats = {name: (work / "t" / name).stat() for name in names}
        made = {name: (s.st_ino, s.st_mtime_ns) for name, s in stats.items()}
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(out[0]) == len(made) and int(out[1]) == total
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "t", "whole"])


def test_bad_record_can_be_skipped_later(tokenizer, tmp_path, caplog, monkeypatch):
    """What was finished before the bad record is kept."""
    monkeypatch.setattr(encoder_lib, "_BATCH_CHARACTERS", 1000)
    bad = b'{"text": "cut\n{"txt": "other"}\n'
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS * 100) + bad + jsonl(["last"]) + bad)
    arguments = tmp_path / "a.jsonl", tmp_path / "t", tokenizer
    with pytest.raises(ValueError, match=r"a\.jsonl:3001: not JSON \(.*pass on_error='skip'"):
        tokenize(*arguments, shard_tokens=5000, threads=1)
    report = tokenize(*arguments, shard_tokens=5000, on_error="skip")
    assert report.resumed > 20 and report.skipped == 4
    assert texts(tmp_path / "t")[-1] == "last" and report.documents == 3001
    assert "skipped " in caplog.text and "4 UNUSABLE RECORDS SKIPPED" in caplog.text
    assert "4 UNUSABLE RECORDS SKIPPED" in str(report)
    assert TokenShards(tmp_path / "t").metadata.sources[0].skipped == 4
    tokenize(tmp_path / "a.jsonl", tmp_path / "u", tokenizer, shard_tokens=5000, on_error="skip")
    assert contents(tmp_path / "t") == contents(tmp_path / "u")


@pytest.mark.parametrize("source", ["a.jsonl", "-"])
def test_full_disk(tokenizer, tmp_path, monkeypatch, source):
    """It says what is kept, and what to do; the same call does it."""
    data, count = jsonl(DOCUMENTS * 40), itertools.count()
    (tmp_path / "a.jsonl").write_bytes(data)
    arguments = source if source == "-" else tmp_path / source, tmp_path / "t", tokenizer

    def full_after_three(path, mode):
        return open(path if next(count) < 3 else "/dev/full", mode)

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(tokenize_lib, "open", full_after_three, raising=False)
        tokenize(*arguments, shard_tokens=5000)
    said, kept = ("nothing of it is kept", 0) if source == "-" else ("same command again", 3)
    assert error.value.errno == errno.ENOSPC and said in str(error.value)
    assert f"no space left while writing {tmp_path / 't'}" in str(error.value)
    assert not (tmp_path / "t").exists()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert tokenize(*arguments, shard_tokens=5000).resumed == kept
    assert texts(tmp_path / "t") == DOCUMENTS * 40


def test_changed_input_starts_over(tokenizer, tmp_path, caplog):
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl(DOCUMENTS * 100) + b"{")
    with pytest.raises(ValueError, match="not JSON"):
        tokenize(file, tmp_path / "t", tokenizer, shard_tokens=5000)
    file.write_bytes(jsonl(["new", *DOCUMENTS]))
    report = tokenize(file, tmp_path / "t", tokenizer, shard_tokens=5000)
    assert report.resumed == 0 and texts(tmp_path / "t")[:2] == ["new", DOCUMENTS[0]]
    assert "starting over" in caplog.text


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, said",
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
def test_unusable_lines(tokenizer, tmp_path, line, said):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["one"]) + line + b"\n" + jsonl(["two"]))
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{said}.*on_error='skip'"):
        tokenize(tmp_path / "a.jsonl", tmp_path / "t", tokenizer)
    report = tokenize(tmp_path / "a.jsonl", tmp_path / "t", tokenizer, on_error="skip")
    assert report.skipped == 1 and texts(tmp_path / "t") == ["one", "two"]


def test_many_unusable_lines_are_named_only_at_first(tokenizer, tmp_path, caplog):
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 50 + jsonl(["one"]))
    assert tokenize(tmp_path / "a.jsonl", tmp_path / "t", tokenizer, on_error="skip").skipped == 50
    assert len([r for r in caplog.records if r.message.startswith("skipped ")]) == 5
    assert "further unusable records" in caplog.text


def test_unusable_rows_and_texts(tokenizer, tmp_path):
    raw = pa.array([b"one", b"\xff\xfe", None, b"two"]).cast(pa.binary())
    column = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet:row 2: not UTF-8"):
        tokenize(tmp_path / "a.parquet", tmp_path / "t", tokenizer)
    report = tokenize(tmp_path / "a.parquet", tmp_path / "t", tokenizer, on_error="skip")
    assert report.skipped == 2 and texts(tmp_path / "t") == ["one", "two"]
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 \(.*at byte 3\)"):
        tokenize(tmp_path / "latin.txt", tmp_path / "u", tokenizer)


def test_columns(tokenizer, tmp_path):
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'text', found \['body', 'n'\]"):
        tokenize(tmp_path / "a.parquet", tmp_path / "t", tokenizer)
    with pytest.raises(ValueError, match=r"column 'n' is int64, expected strings"):
        tokenize(tmp_path / "a.parquet", tmp_path / "t", tokenizer, field="n")
    tokenize(tmp_path / "a.parquet", tmp_path / "t", tokenizer, field="body")
    assert texts(tmp_path / "t") == ["a"]


def test_damaged_files(tokenizer, tmp_path):
    data = jsonl([d + random.Random(i).randbytes(40).hex() for i, d in enumerate(DOCUMENTS)])
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "whole.parquet")
    checked = zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})
    parquet = (tmp_path / "whole.parquet").read_bytes()

    def flipped(data: bytes) -> bytes:
        return (
            data[: len(data) // 2]
            + bytes([data[len(data) // 2] ^ 255])
            + data[len(data) // 2 + 1 :]
        )

    for name, damaged in {
        "cut.jsonl.zst": checked[:-20],
        "flipped.jsonl.zst": flipped(checked),
        "none.jsonl.zst": data,
        "cut.jsonl.gz": gzip.compress(data)[:-20],
        "flipped.jsonl.gz": flipped(gzip.compress(data)),
        "none.jsonl.gz": data,
        "cut.parquet": parquet[:-20],
        "none.parquet": data,
    }.items():
        (tmp_path / name).write_bytes(damaged)
        # Never skipped: what follows in the file is lost.
        with pytest.raises(ValueError, match=rf"{name}: damaged or truncated \(.*fetch it again"):
            tokenize(tmp_path / name, tmp_path / "t", tokenizer, on_error="skip")


def test_inputs_that_are_none(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
    for name in ("empty.jsonl", "empty.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "a.csv").touch()
    (tmp_path / "a").touch()
    for inputs, error, said in (
        ([], ValueError, "inputs: found none"),
        ("b.jsonl", FileNotFoundError, r"b\.jsonl: no such file"),
        ("*.txt", FileNotFoundError, r"\*\.txt: no file matches"),
        (".", ValueError, r"is a directory: name its files, such as '.*/\*\.jsonl'"),
        ("a.csv", ValueError, r"found a file of kind '\.csv', expected \.jsonl, \.txt, \.parquet"),
        ("a", ValueError, "found a file of kind 'without suffix'"),
        ("empty.jsonl", ValueError, "is empty: remove it"),
        ("blank.jsonl", ValueError, "no documents with text; remove it"),
        (["a.jsonl", "a.json*"], ValueError, r"a\.jsonl is given twice"),
    ):
        given_ = [inputs] if isinstance(inputs, str) else inputs
        with pytest.raises(error, match=said):
            tokenize([tmp_path / name for name in given_], tmp_path / "t", tokenizer)
    both = [tmp_path / name for name in ("empty.jsonl", "empty.parquet", "blank.jsonl")]
    with pytest.raises(ValueError, match=r"no documents with text$"):
        tokenize(both, tmp_path / "t", tokenizer, on_error="skip")
    tokenize([*both, tmp_path / "a.jsonl"], tmp_path / "t", tokenizer, on_error="skip")
    assert [s.documents for s in TokenShards(tmp_path / "t").metadata.sources] == [0, 0, 0, 1]


def test_bad_options(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
    for options, said in (
        (dict(shard_tokens=0), "shard_tokens: found 0"),
        (dict(threads=0), "threads: found 0"),
        (dict(on_error="ignore"), "on_error: found 'ignore', expected 'raise' or 'skip'"),
        (dict(stdin_format="csv"), "stdin_format: found 'csv'"),
    ):
        with pytest.raises(ValueError, match=said):
            tokenize(tmp_path / "a.jsonl", tmp_path / "t", tokenizer, **options)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        tokenize(tmp_path / "a.jsonl", tmp_path / "t", tmp_path)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_existing_targets(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
    (tmp_path / "t").mkdir()
    with pytest.raises(FileExistsError, match="was not written by this command"):
        tokenize(tmp_path / "a.jsonl", tmp_path / "t", tokenizer, overwrite=True)
    (tmp_path / "t").rmdir()
    tokenize(tmp_path / "a.jsonl", tmp_path / "t", tokenizer)
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        tokenize(tmp_path / "a.jsonl", tmp_path / "t", tokenizer)
    tokenize(tmp_path / "a.jsonl", tmp_path / "t", tokenizer, overwrite=True)


@pytest.mark.parametrize(
    "package, name", [("backports.zstd", "a.jsonl.zst"), ("pyarrow", "a.parquet")]
)
def test_missing_packages(tokenizer, tmp_path, monkeypatch, package, name):
    write_all_kinds(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}: pip install 'btlm-jax\[data\]'"):
        tokenize(tmp_path / name, tmp_path / "t", tokenizer)
