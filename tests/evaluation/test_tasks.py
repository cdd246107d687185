"""Tasks that are refused before weights are read; skipped without lm-eval."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import btlm_jax as btlm
from btlm_jax.evaluation.tasks import load_tasks
from support.harness_tasks import run_harness


def edit_task(name: str, before: str, after: str):
    """Returns a function that changes a task file and returns the name of the task."""

    def change(tasks: Path) -> str:
        text = (tasks / f"{name}.yaml").read_text()
        assert before in text
        (tasks / f"{name}.yaml").write_text(text.replace(before, after))
        return name

    return change


def empty_test_split(tasks: Path) -> str:
    (tasks / "test.jsonl").write_text("")
    return "local_text"


def group_of_unknown_task(tasks: Path) -> str:
    (tasks / "both.yaml").write_text("group: both\ntask: [local_text, nosuch]\n")
    return "both"


@pytest.mark.parametrize(
    "change, named, expected",
    [
        (lambda _: "", {}, "tasks: found none"),
        (lambda _: "local_choise", {}, r"no task 'local_choise': did you mean local_choice"),
        (lambda tasks: str(tasks / "none.yaml"), {}, "tasks: found no file .*none.yaml"),
        (lambda _: "local_text", dict(num_fewshot=-1), "num_fewshot: found -1, expected 0 or more"),
        (lambda _: "local_choice", dict(num_fewshot=7), "found 7, expected at most the 6 docu"),
        (lambda _: "local_text", dict(limit=0), "limit: found 0"),
        (lambda _: "local_text", dict(batch_size=0), "batch_size: found 0"),
        (lambda _: "local_continue", dict(max_length=16), "task local_continue: max_gen_toks"),
        (
            edit_task("local_choice", "doc_to_choice", "doc_to_choices"),
            {},
            "did you mean doc_to_ch",
        ),
        (edit_task("local_choice", "doc_to_choice: choices\n", ""), {}, "no field doc_to_choice"),
        (
            edit_task("local_choice", "test_split: test", ""),
            {},
            "no field test_split or validation_",
        ),
        (
            edit_task("local_choice", "dataset_path: json", ""),
            {},
            "no field dataset_path or custom",
        ),
        (edit_task("local_text", "doc_to_text: ", "# "), {}, "no field doc_to_text"),
        (edit_task("local_text", "{{text}}", "{{txt}}"), {}, "'txt' is undefined"),
        (edit_task("local_text", "test.jsonl", "no.jsonl"), {}, r"Unable to find '.*no\.jsonl'"),
        (
            edit_task("local_text", "test_split: test", "test_split: tset"),
            {},
            "test_split: found 'tset', which its data set does",
        ),
        (
            edit_task("local_text", "word_perplexity, agg", "word_perplxity, agg"),
            {},
            "metric: lm-eval has no 'word_perplxity', did you mean word_perp",
        ),
        (edit_task("local_text", "weighted_perplexity", "mode"), {}, "aggregation: lm-eval has no"),
        (empty_test_split, {}, "task local_text: found no documents"),
        (group_of_unknown_task, {}, "found no task 'nosuch' for both"),
        (edit_task("local_continue", "do_sample: false", "num_beams: 3"), {}, "num_beams = 3"),
        (edit_task("local_continue", "do_sample: false", "topp: 3"), {}, "did you mean top_p"),
        (
            edit_task("local_text", "loglikelihood_rolling", "rolling"),
            {},
            "output_type 'rolling'",
        ),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(
    only_local_tasks, bytes_checkpoint, tasks, tmp_path, monkeypatch, change, named, expected
):
    monkeypatch.setattr(btlm, "load", lambda *_, **__: pytest.fail("loaded"))
    name = change(tasks)
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        run_harness(bytes_checkpoint, tasks, tmp_path / "out.json", name, **named)
    assert not list(tmp_path.glob("out.json*"))


@pytest.mark.parametrize(
    "split, expected", [("test", "task local_choice: doc"), ("train", "few-shot examples: doc")]
)
def test_a_document_that_does_not_fit_a_template_is_named(
    only_local_tasks, bytes_checkpoint, tasks, tmp_path, split, expected
):
    file = tasks / f"{split}.jsonl"
    lines = file.read_text().splitlines()
    lines[4] = json.dumps(json.loads(lines[4]) | {"answer": 3})
    file.write_text("\n".join(lines) + "\n")
    edit_task("local_choice", "doc_to_target: answer", 'doc_to_target: "{{choices[answer]}}"')(
        tasks
    )
    with pytest.raises(
        ValueError, match=rf"{expected}_to_target does not fit document 4 .* answer"
    ):
        run_harness(bytes_checkpoint, tasks, tmp_path / "out.json", "local_choice", num_fewshot=1)


def change_document(tasks: Path, number: int, **fields) -> None:
    file = tasks / "test.jsonl"
    lines = file.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | fields)
    file.write_text("\n".join(lines) + "\n")


def test_an_answer_that_is_none_of_the_choices_is_pointed_out(only_local_tasks, tasks, caplog):
    change_document(tasks, 4, answer=7)
    load_tasks(["local_choice"], tasks)
    assert "doc_to_target of 1 of 6 documents is none of their choices" in caplog.text


def test_a_document_without_choices_is_refused(only_local_tasks, tasks):
    change_document(tasks, 4, choices=[])
    with pytest.raises(ValueError, match="task local_choice: document 4 has no choices"):
        load_tasks(["local_choice"], tasks)
    change_document(tasks, 0, choices=[])
    with pytest.raises(ValueError, match=r"IndexError.*on its first document: expected doc_to_ch"):
        load_tasks(["local_choice"], tasks)


def test_files_without_a_task_are_named(only_local_tasks, bytes_checkpoint, tasks, tmp_path):
    (tasks / "broken.yaml").write_text("task: [")
    with pytest.raises(ValueError, match=r"define none: .*broken.yaml \(pass one as a task"):
        run_harness(bytes_checkpoint, tasks, tmp_path / "out.json", "brokn")
    with pytest.raises(ValueError, match=r"broken\.yaml: ParserError"):
        run_harness(bytes_checkpoint, tasks, tmp_path / "out.json", str(tasks / "broken.yaml"))
    with pytest.raises(FileNotFoundError, match="include_path: found no folder"):
        run_harness(bytes_checkpoint, tasks / "none", tmp_path / "out.json", "local_text")
