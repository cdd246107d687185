"""`btlm generate --input`: lines in and out, bad lines named, killed runs resumed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from btlm_jax import cli, generate
from btlm_jax.generation import jsonl, result_journal

LINES = [
    {"id": 7, "prompt": "Hello wörld", "note": "世界"},
    {"input_ids": [240, 159, 152, 128]},
    {"prompt": "a", "id": None},
    {"prompt": "the same"},
    {"prompt": "the same"},
]
OPTIONS = ("--sample", "--seed", "3", "--max-new-tokens", "8", "--batch-size", "2", "--logprobs")


def write_lines(path: Path, lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(capsys, *argv):
    try:
        code = cli.main(["generate", *map(str, argv)])
    except SystemExit as e:
        code = e.code
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def source(tmp_path):
    return write_lines(tmp_path / "in.jsonl", LINES)


def test_lines_come_out_with_the_results_of_generate(
    capsys, of_bytes, bytes_checkpoint, source, tmp_path
):
    model, params, tokenizer = of_bytes
    target = tmp_path / "out.jsonl"
    code, out, err = run(capsys, bytes_checkpoint, "--input", source, "--output", target, *OPTIONS)
    assert code == 0 and out == f"{target}: 5 continuations\n"
    assert "5 text/5 text (100%)" in err and "tokens/s" in err
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert "世界" in target.read_text() and sorted(p.name for p in tmp_path.iterdir()) == [
        "in.jsonl", "out.jsonl"
    ]  # fmt: skip
    for i, (line, result) in enumerate(zip(LINES, lines, strict=True)):
        assert list(result)[: len(line)] == list(line) and line.items() <= result.items()
        ids = line.get("input_ids") or tokenizer.encode(line["prompt"]).ids
        options = dict(
            do_sample=True, seed=[(3, i)], max_new_tokens=8, return_dict_in_generate=True
        )
        out = generate(model, params, [ids], **options)
        new = out.sequences[0, len(ids) :].tolist()
        assert result["text"] == tokenizer.decode(new) and result["tokens"] == len(new)
        assert result.get("token_ids") == (new if "input_ids" in line else None)
        np.testing.assert_allclose(result["logprobs"], out.logprobs[0], atol=2e-4)
        assert result["finish_reason"] == ("eos" if new[-1] == 256 else "length")
    assert lines[3]["text"] != lines[4]["text"]  # each line has its own random stream


def test_a_file_that_is_too_large_for_memory_is_refused(
    capsys, bytes_checkpoint, source, tmp_path, monkeypatch
):
    monkeypatch.setattr(jsonl, "_MAX_FILE_BYTES", 100)
    code, _, err = run(capsys, bytes_checkpoint, "--input", source, "--output", tmp_path / "out")
    assert code == 2 and "expected at most 100 B, which are held in memory: divide it" in err


def test_a_killed_run_is_resumed(capsys, bytes_checkpoint, source, tmp_path, monkeypatch):
    """Whatever a kill leaves of the journal, the same command writes the same file."""
    target, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    command = (bytes_checkpoint, "--input", source, "--output", target, *OPTIONS)
    write_results, journals = jsonl.write_results, []

    def keep_journal(*arguments):
        journals.append(partial.read_bytes())
        write_results(*arguments)

    monkeypatch.setattr(jsonl, "write_results", keep_journal)
    assert run(capsys, *command)[0] == 0
    expected, rng = target.read_bytes(), random.Random(0)
    (journal,) = journals
    ends = [0, journal.index(b"\n") + 1, len(journal) - 1, len(journal)]
    for end in (*ends, *(rng.randrange(len(journal)) for _ in range(8))):
        target.unlink()
        partial.write_bytes(journal[:end])
        kept = max(journal[:end].count(b"\n") - 1, 0)
        code, _, err = run(capsys, *command)
        assert code == 0 and target.read_bytes() == expected and not partial.exists()
        assert (f"continuing an interrupted run: {kept} results are finished" in err) == (kept > 0)


def test_an_interrupted_run_is_not_mixed_with_another(
    capsys, bytes_checkpoint, source, tmp_path, monkeypatch
):
    target = tmp_path / "out.jsonl"
    command = (bytes_checkpoint, "--input", source, "--output", target, *OPTIONS)
    add = result_journal.ResultJournal.add

    def interrupted(journal, number, fields):
        if len(journal.results) == 2:
            raise KeyboardInterrupt
        add(journal, number, fields)

    with monkeypatch.context() as patch:
        patch.setattr(result_journal.ResultJournal, "add", interrupted)
        code, _, err = run(capsys, *command)
    assert code == 130 and f"2 results are kept in {target}.partial; the same command" in err
    assert not target.exists()
    code, _, err = run(capsys, *command, "--temperature", "0.5")
    assert code == 2 and "2 results of another run (--temperature: found None, expected 0.5)" in err
    write_lines(source, LINES[:4])
    code, _, err = run(capsys, *command)
    assert code == 2 and "another run (input: found " in err
    code, _, err = run(capsys, *command, "--overwrite")
    assert code == 0 and "belonged to another run: starting over" in err
    assert len(target.read_text().splitlines()) == 4
    code, _, err = run(capsys, *command)
    assert code == 2 and f"{target} exists: choose another name, or pass --overwrite" in err


def test_two_processes_cannot_write_the_same_file(tmp_path):
    target = tmp_path / "out.jsonl"
    with result_journal.open_journal(target, {}, overwrite=False) as first:
        with (
            pytest.raises(FileExistsError, match="being written by another process"),
            result_journal.open_journal(target, {}, overwrite=True),
        ):
            pass
        first.add(0, {})


def test_other_journals_are_refused_and_unchanged(tmp_path):
    partial = tmp_path / "out.jsonl.partial"
    for content in ("precious\n", "[1]\n", '{"a": 1}\nnonsense\n'):
        partial.write_text(content)
        with (
            pytest.raises(
                ValueError, match=r"results of another run|its first line, .*, is damaged"
            ),
            result_journal.open_journal(tmp_path / "out.jsonl", {"b": 2}, overwrite=False),
        ):
            pass
        assert partial.read_text() == content


def test_the_differences_from_another_run_are_cut_where_there_are_many(tmp_path):
    (tmp_path / "out.jsonl.partial").write_text("{}\n")
    with (
        pytest.raises(ValueError, match=r"\(k0: found None, expected 0, k1: .* and 7 more\)"),
        result_journal.open_journal(
            tmp_path / "out.jsonl", {f"k{i}": i for i in range(9)}, overwrite=False
        ),
    ):
        pass


def test_damaged_results_are_computed_again_and_the_others_kept(tmp_path, caplog):
    target, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with (
        pytest.raises(KeyboardInterrupt),
        result_journal.open_journal(target, {"a": 1}, overwrite=False) as journal,
    ):
        for number in range(3):
            journal.add(number, {"text": "b", "tokens": 1})
        raise KeyboardInterrupt
    header, kept, shorter, other = partial.read_text().splitlines(keepends=True)
    shorter = shorter.replace(', "tokens": 1', "")  # valid JSON that lacks a field
    other = other.replace('"b"', '"c"')
    partial.write_text(f'{header}[0, {{"te\n\0\0\0\n{kept}[2]\nnull\n{shorter}{other}')
    with result_journal.open_journal(target, {"a": 1}, overwrite=False) as journal:
        assert journal.results == {0: {"text": "b", "tokens": 1}}
    assert (
        "damaged lines (2, 3, 5, 6, 7 and 1 more); their results are computed again" in caplog.text
    )


def test_several_continuations_have_an_index(capsys, bytes_checkpoint, source, tmp_path):
    target = tmp_path / "out.jsonl"
    command = ("--input", source, "--output", target, *OPTIONS, "--num-return-sequences", "2")
    assert run(capsys, bytes_checkpoint, *command)[0] == 0
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [x["index"] for x in lines] == [0, 1] * 5
    assert [x.get("prompt") for x in lines[::2]] == [x.get("prompt") for x in LINES]
    assert lines[0]["text"] != lines[1]["text"]


def test_a_mesh_gives_the_same_text(capsys, bytes_checkpoint, source, tmp_path):
    texts = []
    for mesh in ((), ("--set", "mesh.data=2", "--set", "mesh.tensor=2")):
        target = tmp_path / f"out{len(mesh)}.jsonl"
        command = ("--input", source, "--output", target, *OPTIONS, *mesh)
        assert run(capsys, bytes_checkpoint, *command)[0] == 0
        texts.append([json.loads(x)["text"] for x in target.read_text().splitlines()])
    assert texts[0] == texts[1]


BAD = {
    '{"prompt": ""}': "prompt: found no text",
    "": "found no JSON",
    "[1]": "found [1], expected",
    '{"txt": "a"}': 'found fields ["txt"], expected {"prompt": "..."}',
    '{"prompt": 3}': "prompt: found 3, expected a string",
    '{"prompt": "a", "input_ids": [1]}': "found both prompt and input_ids",
    '{"input_ids": []}': "input_ids: found [], expected at least one integer, each from 0 to 257",
    '{"input_ids": [true]}': "input_ids: found [true]",
    '{"input_ids": [258]}': "input_ids: found [258]",
    '{"input_ids": [99999999999999999999]}': "input_ids: found [99999999999999999999]",
    '{"prompt": "a", "text": 3}': "found a field 'text', the name of a result field",
    '{"prompt": "\\ud800"}': "found no JSON ('utf-8' codec",
    '{"prompt": "a"': "found no JSON (Expecting",
}


def test_bad_lines_are_named_before_the_weights_are_loaded(
    capsys, bytes_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(jsonl, "_MAX_LISTED", len(BAD) - 1)
    monkeypatch.setattr("btlm_jax.load", lambda *a, **k: pytest.fail("loaded"), raising=False)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f"{line}\n" for line in ['{"prompt": "fine"}', *BAD]))
    code, out, err = run(capsys, bytes_checkpoint, "--input", source, "--output", target)
    assert code == 2 and not out and [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
    first, *lines, last = err.removeprefix("btlm: error: ").splitlines()
    assert first == f"{source}: lines that cannot be used:"
    for n, (line, message) in enumerate(zip(lines, BAD.values(), strict=False), 2):
        assert line.strip().startswith(f"{source}:{n}: {message}")
    assert last.strip() == "and 1 more" and len(lines) == len(BAD) - 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--input", "in.jsonl"), "found no --output"),
        (("--input", "no.jsonl", "--output", "o"), "no.jsonl: no such file"),
        (("--input", "empty", "--output", "o"), "empty: found no line"),
        (("--input", "in.jsonl", "--output", "no/o"), "there is no folder no"),
        (("--input", "in.jsonl", "--output", "."), "is a directory: choose another name"),
        (("--input", "in.jsonl", "--output", "o", "--prompt", "a"), "found both"),
        (("--input", "in.jsonl", "--output", "o", "--stream"), "--stream: found it with --input"),
        (("--input", "in.jsonl", "--output", "o", "--batch-size", "0"), "--batch-size: found 0"),
        (
            ("--input", "in.jsonl", "--output", "o", "--set", "mesh.data=9"),
            "needs 9 devices, found 8",
        ),
        (
            ("--input", "in.jsonl", "--output", "o", "--max-length", "9"),
            "in.jsonl:1: --max-length: found 9",
        ),
        (
            ("--input", "in.jsonl", "--output", "o", "--cache-length", "9"),
            "--cache-length: found it",
        ),
        ((), "--prompt and --input: found neither"),
        (("--prompt", "a", "--output", "o"), "--output: it needs --input"),
        (("--prompt", "a", "--batch-size", "2"), "--batch-size: it needs --input"),
        (("--prompt", "a", "--stream", "--num-beams", "2"), "--stream: found it with --num-beams"),
        (("--prompt", "a", "--stream", "--logprobs"), "--stream: found it with --logprobs"),
    ],
)
def test_bad_arguments_are_named_and_write_nothing(
    capsys, bytes_checkpoint, source, monkeypatch, argv, message
):
    monkeypatch.chdir(source.parent)
    Path("empty").write_text("")
    before = sorted(Path().iterdir())
    code, out, err = run(capsys, bytes_checkpoint, *argv)
    assert code == 2 and message in err and not out
    assert sorted(Path().iterdir()) == before


def test_streaming_prints_the_same_text(capsys, bytes_checkpoint):
    argv = (bytes_checkpoint, "--prompt", "Hé", "--sample", "--seed", "2", "--max-new-tokens", "9")
    plain, streamed = (run(capsys, *argv, *more) for more in ((), ("--stream",)))
    assert plain[0] == streamed[0] == 0 and streamed[1] == plain[1]


def test_an_interrupted_stream_has_printed_its_text(capsys, bytes_checkpoint, monkeypatch):
    def pieces(*_, **__):
        yield " there"
        raise KeyboardInterrupt

    monkeypatch.setattr("btlm_jax.stream", pieces, raising=False)
    code, out, err = run(capsys, bytes_checkpoint, "--prompt", "Hi", "--stream")
    assert code == 130 and out == "Hi there\n" and "interrupted" in err
