"""Text to training and held-out tokens: every document in one part, also after a kill."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from btlm_jax import cli
from btlm_jax.data import sample_text
from btlm_jax.data.prepare import prepare_tokens
from btlm_jax.data.split import SplitPart
from btlm_jax.data.token_shards import TokenShards
from btlm_jax.data.tokenize import tokenize
from btlm_jax.data.tokenizer import load_tokenizer
from btlm_jax.train import recipe_file
from support.kill_and_resume import KillAndResume
from support.texts import file_contents, jsonl, read_documents

DOCUMENTS = [f"Document {i}: " + "words and more " * (i % 7) for i in range(100)]
ascii_texts = st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126)), max_size=12)


# Results ----------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(documents=ascii_texts, fraction=st.floats(0.1, 0.9), data=st.data())
def test_every_document_is_in_one_part(ascii_bpe, tmp_path_factory, documents, fraction, data):
    """Parts are disjoint, hold everything together, and keep the order."""
    part = SplitPart(fraction, held_out=True, one_document=False)
    held = [d for d in documents if d and part.select(d)]
    train = [d for d in documents if d and not part.select(d)]
    assume(held and train)
    root = tmp_path_factory.mktemp("t")
    cut = data.draw(st.integers(0, len(documents)))
    for name, texts in (("a", documents[:cut]), ("b", documents[cut:])):
        (root / f"{name}.jsonl").write_bytes(jsonl(texts))
    options = dict(on_error="skip", shard_tokens=data.draw(st.integers(1, 200)))
    reports = prepare_tokens(
        f"{root}/*.jsonl", root / "t", tokenizer=ascii_bpe, held_out=fraction, **options
    )
    assert list(reports) == [root / "t/held_out", root / "t/train"]
    for name, expected in (("train", train), ("held_out", held)):
        assert read_documents(root / "t" / name) == expected
        report, metadata = reports[root / "t" / name], TokenShards(root / "t" / name).metadata
        assert report.documents == metadata.documents == len(expected)
        assert report.text_bytes == metadata.text_bytes == sum(map(len, expected))
        assert report.empty == len(documents) - len(held) - len(train)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_the_end_of_a_single_text_is_held_out(ascii_bpe, tmp_path, name):
    text = "".join(DOCUMENTS)
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    prepare_tokens(tmp_path / name, tmp_path / "t", tokenizer=ascii_bpe, held_out=0.25)
    (train,), (held,) = (
        read_documents(tmp_path / "t/train"),
        read_documents(tmp_path / "t/held_out"),
    )
    assert train + held == text and len(held) == round(len(text) / 4)
    assert TokenShards(tmp_path / "t/held_out").metadata.text_bytes == len(held)


def test_several_texts_are_not_cut(ascii_bpe, tmp_path):
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / f"{i:02}.txt").write_text(document)
    prepare_tokens(tmp_path / "*.txt", tmp_path / "t", tokenizer=ascii_bpe, held_out=0.2)
    part = SplitPart(0.2, held_out=True, one_document=False)
    assert read_documents(tmp_path / "t/held_out") == [d for d in DOCUMENTS if part.select(d)]
    assert read_documents(tmp_path / "t/train") == [d for d in DOCUMENTS if not part.select(d)]


def test_without_a_split_it_tokenizes_everything(ascii_bpe, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    (report,) = prepare_tokens(tmp_path / "a.jsonl", tmp_path / "t", tokenizer=ascii_bpe).values()
    again = tokenize(tmp_path / "a.jsonl", tmp_path / "u", ascii_bpe)
    assert file_contents(tmp_path / "t") == file_contents(tmp_path / "u")
    assert report.tokens == again.tokens


def test_a_new_tokenizer_is_trained_on_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    prepare_tokens(tmp_path / "a.jsonl", tmp_path / "t", new_tokenizer=300)
    assert read_documents(tmp_path / "t") == DOCUMENTS
    metadata = TokenShards(tmp_path / "t").metadata
    assert (metadata.vocab_size, metadata.eos_id) == (300, 0)
    assert " words" in "".join(load_tokenizer(tmp_path / "t").get_vocab()).replace("Ġ", " ")


def test_a_new_tokenizer_has_not_seen_the_held_out_text(tmp_path):
    part = SplitPart(0.2, held_out=True, one_document=False)
    documents = [d + (" xyzzy" * 50 if part.select(d) else " plugh" * 5) for d in DOCUMENTS]
    # The added words change the hash: select the documents again.
    held = [d for d in documents if part.select(d)]
    train = [d for d in documents if not part.select(d) and "xyzzy" not in d]
    assert any("xyzzy" in d for d in held)
    (tmp_path / "a.jsonl").write_bytes(jsonl([*held, *train]))
    prepare_tokens(tmp_path / "a.jsonl", tmp_path / "t", new_tokenizer=400, held_out=0.2)
    for name in ("train", "held_out"):
        known = load_tokenizer(tmp_path / "t" / name).get_vocab()
        assert "Ġplugh" in known and not any("xyz" in token for token in known)
    assert read_documents(tmp_path / "t/held_out") == held


# Interrupted ------------------------------------------------------------------------------------

PREPARE_SLOWLY = """
import sys, time
from btlm_jax.data.prepare import prepare_tokens
from btlm_jax.utils import atomic
record = atomic.StagedDirectory.record
def record_slowly(*args):
    time.sleep(0.01)
    record(*args)
    time.sleep(0.01)
atomic.StagedDirectory.record = record_slowly
options = dict(new_tokenizer=300, held_out=0.3, shard_tokens=150)
reports = prepare_tokens(sys.argv[2], sys.argv[1], **options)
print(*(r.resumed for r in reports.values()))
"""


def test_killed_in_either_part_it_resumes_to_the_same_bytes(tmp_path):
    """Finished shards are not written again."""
    documents = [d + str(i) for i, d in enumerate(DOCUMENTS * 12)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents))
    options = dict(new_tokenizer=300, held_out=0.3, shard_tokens=150)
    reports = prepare_tokens(tmp_path / "a.jsonl", tmp_path / "expected", **options)
    held, train = (report.shards for report in reports.values())
    assert held > 20 and train > 40
    work, kills, held_out_files = tmp_path / ".t.partial", [], {}

    def finished_shards() -> tuple[int, int]:
        """Returns the number of finished shards (held out, to train on)."""
        if (work / "finished/held_out.json").exists():
            return held, len(list(work.glob("t/.train.partial/finished/*.json")))
        return len(list(work.glob("t/.held_out.partial/finished/*.json"))), 0

    def check_held_out_files(_: str) -> None:
        assert not (tmp_path / "t").exists()
        for path, mtime in held_out_files.items():
            assert path.stat().st_mtime_ns == mtime
        kills.append(finished_shards())
        if (work / "finished/held_out.json").exists():
            files = (work / "t/held_out").glob("*.bin")
            held_out_files.update({p: p.stat().st_mtime_ns for p in files})

    command = [sys.executable, "-c", PREPARE_SLOWLY, str(tmp_path / "t"), str(tmp_path / "a.jsonl")]
    output, killed = KillAndResume(
        command=command,
        progress=lambda: sum(finished_shards()),
        pieces=(2 * held // 5, 3 * held // 5),
        kills=4,
    ).run(check_held_out_files)
    assert killed == 4 and kills[0][0] < held and kills[-1][1] > 0
    assert output.splitlines()[-1] == f"{held} {kills[-1][1]}"
    assert file_contents(tmp_path / "t") == file_contents(tmp_path / "expected")
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "expected", "t"]


def test_a_changed_input_starts_over(ascii_bpe, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl(DOCUMENTS) + b"{")
    with pytest.raises(ValueError, match="not JSON"):
        prepare_tokens(file, tmp_path / "t", tokenizer=ascii_bpe, held_out=0.2)
    file.write_bytes(jsonl(DOCUMENTS[:50]))
    prepare_tokens(file, tmp_path / "t", tokenizer=ascii_bpe, held_out=0.2)
    assert (
        len(read_documents(tmp_path / "t/train")) + len(read_documents(tmp_path / "t/held_out"))
        == 50
    )


@pytest.mark.parametrize("changed", [dict(held_out=0.4), dict(field="other"), dict(eos="!")])
def test_changed_options_start_over(ascii_bpe, tmp_path, monkeypatch, changed):
    """Held-out text of other options is not combined with the new training text."""
    lines = [json.dumps({"text": d, "other": d[::-1]}) for d in DOCUMENTS]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    def fails_at_train(inputs, target, *args, **options):
        if target.name == "train":
            raise ValueError("killed")
        return tokenize(inputs, target, *args, **options)

    monkeypatch.setattr("btlm_jax.data.prepare.tokenize", fails_at_train)
    options = dict(tokenizer=ascii_bpe, held_out=0.2)
    with pytest.raises(ValueError, match="killed"):
        prepare_tokens(tmp_path / "a.jsonl", tmp_path / "t", **options)
    monkeypatch.undo()
    prepare_tokens(tmp_path / "a.jsonl", tmp_path / "t", **options | changed)
    prepare_tokens(tmp_path / "a.jsonl", tmp_path / "fresh", **options | changed)
    assert file_contents(tmp_path / "t") == file_contents(tmp_path / "fresh")


# Bad input --------------------------------------------------------------------------------------


def test_bad_options_are_refused(ascii_bpe, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    (tmp_path / "two.jsonl").write_bytes(jsonl(["one", "two"]))
    (tmp_path / "b.txt").write_text("b")
    reuse = dict(tokenizer=ascii_bpe)
    for name, options, message in (
        ("a.jsonl", {}, "tokenizer, new_tokenizer: found neither, expected one"),
        ("a.jsonl", dict(reuse, new_tokenizer=300), "found both, expected one"),
        ("a.jsonl", dict(new_tokenizer=256), "new_tokenizer: found 256, expected at least 257"),
        ("a.jsonl", dict(reuse, held_out=0.0), "held_out: found 0.0, expected more than 0"),
        ("a.jsonl", dict(reuse, held_out=1.0), "held_out: found 1.0"),
        ("a.jsonl", dict(reuse, held_out=float("nan")), "held_out: found nan"),
        ("two.jsonl", dict(reuse, held_out=0.01),
         r"two\.jsonl: held_out: found 0\.01, at which nothing of 2 .* is held out; pass another "
         r"fraction, or join them into one \.txt"),
        ("two.jsonl", dict(reuse, held_out=0.99), "is left to train on; pass another fraction"),
        ("b.txt", dict(reuse, held_out=0.1), r"held out; pass another .*or give more text"),
        ("-", dict(reuse, held_out=0.1), "standard input cannot be read twice"),
        ("-", dict(new_tokenizer=300), "standard input cannot be read twice"),
    ):  # fmt: skip
        source = name if name == "-" else tmp_path / name
        with pytest.raises(ValueError, match=message):
            prepare_tokens(source, tmp_path / "t", **options)
        assert not (tmp_path / "t").exists()
    with pytest.raises(ValueError, match=r"target: found 'gs://.*', expected a local path"):
        prepare_tokens(tmp_path / "a.jsonl", "gs://bucket/t", tokenizer=ascii_bpe, held_out=0.1)


def test_only_directories_of_the_same_kind_are_overwritten(ascii_bpe, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS))
    arguments = tmp_path / "a.jsonl", tmp_path / "t"
    prepare_tokens(*arguments, tokenizer=ascii_bpe)
    options = dict(tokenizer=ascii_bpe, held_out=0.2)
    with pytest.raises(FileExistsError, match="was not written by this command"):
        prepare_tokens(*arguments, **options, overwrite=True)
    prepare_tokens(tmp_path / "a.jsonl", tmp_path / "u", **options)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        prepare_tokens(tmp_path / "a.jsonl", tmp_path / "u", **options)
    before = file_contents(tmp_path / "u")
    prepare_tokens(
        tmp_path / "a.jsonl",
        tmp_path / "u",
        tokenizer=ascii_bpe,
        held_out=0.4,
        overwrite=True,
    )
    assert file_contents(tmp_path / "u") != before
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "t", "u"]


def test_unusable_records_are_skipped_in_both_parts(ascii_bpe, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS) + b"{\n")
    reports = prepare_tokens(
        tmp_path / "a.jsonl",
        tmp_path / "t",
        tokenizer=ascii_bpe,
        held_out=0.2,
        on_error="skip",
    )
    assert [report.skipped for report in reports.values()] == [1, 1]
    assert sum(report.documents for report in reports.values()) == 100


def test_a_file_may_lie_entirely_in_one_part(ascii_bpe, tmp_path):
    part = SplitPart(0.2, held_out=True, one_document=False)
    (tmp_path / "a.jsonl").write_bytes(jsonl([d for d in DOCUMENTS if not part.select(d)]))
    (tmp_path / "b.jsonl").write_bytes(jsonl([d for d in DOCUMENTS if part.select(d)]))
    prepare_tokens(tmp_path / "*.jsonl", tmp_path / "t", tokenizer=ascii_bpe, held_out=0.2)
    assert [s.documents for s in TokenShards(tmp_path / "t/train").metadata.sources][1] == 0
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"c\.jsonl: no documents with text"):
        prepare_tokens(tmp_path / "*.jsonl", tmp_path / "u", tokenizer=ascii_bpe, held_out=0.2)


# The command ------------------------------------------------------------------------------------


def test_the_commands_in_the_tiny_recipe_work(tmp_path, monkeypatch, capsys):
    """Runs the commands in tiny.toml, with fewer steps."""
    comment = (recipe_file.RECIPES_FOLDER / "tiny.toml").read_text()
    commands = re.findall(r"^#   btlm (.*)$", comment, re.MULTILINE)
    assert [c.split()[0] for c in commands] == ["tokenize", "train", "generate"]
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(sample_text.read_sample_text())
    few = "--set phases.0.steps=2 --set optimizer.warmup_tokens=0 --set model.fields.n_layer=1"
    for command in commands:
        argv = shlex.split(command) + (few.split() if command.startswith("train") else [])
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        if argv[0] == "tokenize":
            data = "--set data.train=tokens/train --set data.held_out=tokens/held_out"
            assert f"next: btlm train RECIPE RUN_DIR {data}" in out and data in commands[1]
            assert re.search(r"^tokens/held_out: .* tokens of 1 documents", out, re.MULTILINE)
        elif argv[0] == "train":
            assert "held out " in out and "next: btlm generate run" in out


def test_the_command_needs_one_tokenizer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("a text " * 9)
    assert cli.main(["tokenize", "text.txt", "--target", "t"]) == 2
    assert "found neither, expected one" in capsys.readouterr().err
    assert cli.main(["tokenize", "text.txt", "--target", "t", "--new-tokenizer", "260"]) == 0
    assert "next: btlm train RECIPE RUN_DIR --set data.train=t\n" in capsys.readouterr().out
    assert json.loads(Path("t/manifest.json").read_text())["documents"] == 1
