"""lm-evaluation-harness over our checkpoints: offline tasks, resumption, refusals.

What needs lm-eval (extra `eval`) is skipped where it is not installed. Its numbers are tested in
test_evaluation_harness_parity, what is asked of the model in the end in test_evaluation_likelihood
and test_evaluation_until.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import btlm_jax as btlm
from btlm_jax import cli
from btlm_jax.checkpoint import unstacked
from btlm_jax.cli.harness_command import EvalHarness
from btlm_jax.evaluation import harness
from btlm_jax.generation import jsonl
from support import gpt2
from support.harness_tasks import TASKS, write_tasks


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval")


@pytest.fixture
def own_tasks_only(lm_eval, monkeypatch):
    """lm-eval's index of its own 15,000 tasks takes seconds."""
    from lm_eval import tasks

    fast = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", fast)


@pytest.fixture
def folder(tmp_path):
    return write_tasks(tmp_path / "tasks")


def run(checkpoint, folder, out, names=None, **named) -> dict:
    """What `btlm eval harness` writes; of all tasks by default."""
    names = ",".join(TASKS) if names is None else names
    EvalHarness(str(checkpoint), names, out, include_path=folder, **named).run()
    return json.loads(out.read_text())


# Without the harness -----------------------------------------------------------------------------


def requests(of_bytes, journal):
    model, params, tokenizer = of_bytes
    return harness.RequestAnswerer(
        model.config, tokenizer, lambda: (model, params), journal=journal
    )


def test_answers_are_kept_and_taken_up(of_bytes, tmp_path):
    """Killed amid its requests, a run goes on with those that are left, to the same answers."""
    asked = [(None, [1, 2, 3, i], [i, 7]) for i in range(6)]
    asked.append(asked[0])  # asked twice, answered once
    expected = requests(of_bytes, jsonl.ResultJournal())._loglikelihood_tokens(asked)
    assert expected[0] == expected[-1]

    def same(found):  # up to the shapes of batches
        np.testing.assert_allclose(found, expected, atol=1e-4)

    target = tmp_path / "out.json"

    class Killed(jsonl.ResultJournal):
        def add(self, number, fields):
            if len(self.known) == 4:
                raise KeyboardInterrupt
            super().add(number, fields)

    with (
        pytest.raises(KeyboardInterrupt),
        jsonl.open_journal(target, {}, overwrite=False) as journal,
    ):
        killed = Killed(journal.results, journal._file)
        requests(of_bytes, killed)._loglikelihood_tokens(asked)
    with jsonl.open_journal(target, {}, overwrite=False) as journal:
        added = []
        again = requests(of_bytes, journal)
        own = journal.add
        object.__setattr__(journal, "add", lambda *x: (added.append(x), own(*x)))
        assert len(journal.results) == 4
        same(again._loglikelihood_tokens(asked))
        assert len(added) == 2
        # Now that all is known, nothing is loaded.
        idle = dataclasses.replace(again, load=lambda: pytest.fail("loaded"))
        same(idle._loglikelihood_tokens(asked))
        jsonl.finish_journal(target, b"done\n")
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_encoding_and_prefix(of_bytes):
    model, _, tokenizer = of_bytes
    found = requests(of_bytes, jsonl.ResultJournal())
    assert found.prefix_token_id == found.eot_token_id == 256
    assert found.tok_encode("a<|endoftext|>") == [*tokenizer.encode("a").ids, 256]
    for value, prefix in ((None, 256), (258, 256), (7, 7)):  # one outside the vocabulary is none
        config = dataclasses.replace(model.config, bos_token_id=value)
        assert dataclasses.replace(found, config=config).prefix_token_id == prefix


@pytest.mark.parametrize(
    "named, expected",
    [
        (dict(max_length=1), "max_length: found 1, expected at least 2"),
        (dict(batch_size=0), "batch_size: found 0"),
    ],
)
def test_sizes_that_are_refused(of_bytes, named, expected):
    model, params, tokenizer = of_bytes
    with pytest.raises(ValueError, match=expected):
        harness.RequestAnswerer(model.config, tokenizer, lambda: (model, params), **named)
    config = dataclasses.replace(model.config, eos_token_id=None)
    with pytest.raises(ValueError, match="eos_token_id: found none"):
        harness.RequestAnswerer(config, tokenizer, lambda: (model, params))
    config = dataclasses.replace(gpt2.ours()[0].config, eos_token_id=1)
    with pytest.raises(ValueError, match="at most the 64 learned positions"):
        harness.RequestAnswerer(config, tokenizer, lambda: (model, params), max_length=65)


# With it -----------------------------------------------------------------------------------------


def test_offline_tasks(lm_eval, bytes_checkpoint, folder, tmp_path, capsys):
    """Zero-shot and few-shot; the perplexity is that of `btlm eval perplexity`."""
    from btlm_jax.evaluation.documents import TokenizedDocument
    from btlm_jax.evaluation.perplexity import cross_entropy
    from btlm_jax.evaluation.rolling_windows import cut_rolling_windows

    found = run(bytes_checkpoint, folder, tmp_path / "0.json", max_length=40)
    assert found["results"].keys() == TASKS.keys() and "exact_match" in capsys.readouterr().out
    model, params = btlm.load(bytes_checkpoint)
    tokenizer = btlm.load_tokenizer(bytes_checkpoint)
    texts = [json.loads(x)["text"] for x in (folder / "test.jsonl").read_text().splitlines()]
    documents = [TokenizedDocument(np.array(tokenizer.encode(t).ids), len(t)) for t in texts]
    cut = cut_rolling_windows(model.config, documents, model.config.eos_token_id, length=40)
    expected = cross_entropy(model, params, cut).bits_per_byte
    assert found["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
    few = run(bytes_checkpoint, folder, tmp_path / "2.json", "local_choice", num_fewshot=2, limit=3)
    assert few["n-shot"] == {"local_choice": 2}
    assert few["n-samples"]["local_choice"] == {"original": 6, "effective": 3}


def test_a_task_answers_alike_beside_others(own_tasks_only, of_bytes, folder, tmp_path):
    """In bfloat16, which weights by layer are computed in on a CPU, whatever is asked."""
    model, params, tokenizer = of_bytes
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    btlm.save(tmp_path / "half", model.config, params, assets=[tmp_path / "tokenizer.json"])
    names = {"alone": "local_text", "both": "local_text,local_continue"}
    alone, both = (run(tmp_path / "half", folder, tmp_path / f"{out}.json", asked)
                   for out, asked in names.items())  # fmt: skip
    assert alone["results"]["local_text"] == both["results"]["local_text"]
    assert alone["compute_dtype"] == both["compute_dtype"] == "bfloat16"
    exact = run(tmp_path / "half", folder, tmp_path / "e.json", "local_text", dtype="float32")
    assert exact["compute_dtype"] == "float32"
    assert exact["results"]["local_text"] != alone["results"]["local_text"]


def test_what_is_computed_in_tells_runs_apart(
    own_tasks_only, bytes_checkpoint, folder, tmp_path, monkeypatch
):
    """As on another platform, whose numbers are others."""
    add, out = jsonl.ResultJournal.add, tmp_path / "out.json"

    def killed(self, number, fields):
        if self.known:
            raise KeyboardInterrupt
        add(self, number, fields)

    monkeypatch.setattr(jsonl.ResultJournal, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        run(bytes_checkpoint, folder, out, "local_text")
    monkeypatch.setattr(unstacked, "decoding_dtype", lambda *_: "bfloat16")
    with pytest.raises(ValueError, match="compute_dtype: found 'float32', expected 'bfloat16'"):
        run(bytes_checkpoint, folder, out, "local_text")


def test_killed_it_goes_on_to_the_same_file(
    own_tasks_only, bytes_checkpoint, folder, tmp_path, monkeypatch, caplog
):
    expected = run(bytes_checkpoint, folder, tmp_path / "whole.json")
    add, out = jsonl.ResultJournal.add, tmp_path / "out.json"
    for most in (5, 25, 30, 34):  # amid choices, texts to score, texts to generate

        def killed(self, number, fields, most=most):
            if len(self.known) == most:
                raise KeyboardInterrupt
            add(self, number, fields)

        monkeypatch.setattr(jsonl.ResultJournal, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            run(bytes_checkpoint, folder, out)
        assert not out.exists()
    monkeypatch.setattr(jsonl.ResultJournal, "add", add)
    with pytest.raises(ValueError, match="holds 34 results of another run"):
        run(bytes_checkpoint, folder, out, dtype="bfloat16")
    caplog.clear()
    caplog.set_level("INFO", "btlm_jax")
    assert run(bytes_checkpoint, folder, out) == expected
    assert "generate: 6 text/6 text (100%)" in caplog.text  # those that were known are counted
    assert not out.with_name("out.json.partial").exists()
    with pytest.raises(FileExistsError, match="overwrite"):
        run(bytes_checkpoint, folder, out)


def broken(name: str, before: str, after: str):
    """A task file with something else in it."""

    def change(folder: Path) -> str:
        text = (folder / f"{name}.yaml").read_text()
        assert before in text
        (folder / f"{name}.yaml").write_text(text.replace(before, after))
        return name

    return change


@pytest.mark.parametrize(
    "change, named, expected",
    [
        (lambda _: "", {}, "tasks: found none"),
        (lambda _: "local_choise", {}, r"no task 'local_choise': did you mean local_choice"),
        (lambda _: "local_text", dict(num_fewshot=-1), "num_fewshot: found -1, expected 0 or more"),
        (lambda _: "local_choice", dict(num_fewshot=7), "found 7, expected at most the 6 docu"),
        (lambda _: "local_text", dict(limit=0), "limit: found 0"),
        (lambda _: "local_text", dict(batch_size=0), "batch_size: found 0"),
        (lambda _: "local_continue", dict(max_length=16), "task local_continue: max_gen_toks"),
        (broken("local_choice", "doc_to_choice", "doc_to_choices"), {}, "did you mean doc_to_ch"),
        (broken("local_choice", "doc_to_choice: choices\n", ""), {}, "no field doc_to_choice"),
        (broken("local_choice", "test_split: test", ""), {}, "no field test_split or validation_"),
        (broken("local_choice", "dataset_path: json", ""), {}, "no field dataset_path or custom"),
        (broken("local_text", "doc_to_text: ", "# "), {}, "no field doc_to_text"),
        (broken("local_text", "{{text}}", "{{txt}}"), {}, "'txt' is undefined"),
        (broken("local_text", "test.jsonl", "no.jsonl"), {}, r"Unable to find '.*no\.jsonl'"),
        (broken("local_text", "test_split: test", "test_split: tset"), {}, "KeyError: 'tset'"),
        (broken("local_continue", "do_sample: false", "num_beams: 3"), {}, "num_beams = 3"),
        (broken("local_continue", "do_sample: false", "topp: 3"), {}, "did you mean top_p"),
        (broken("local_text", "loglikelihood_rolling", "rolling"), {}, "output_type 'rolling'"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(
    own_tasks_only, bytes_checkpoint, folder, tmp_path, monkeypatch, change, named, expected
):
    monkeypatch.setattr(btlm, "load", lambda *_, **__: pytest.fail("loaded"))
    name = change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        run(bytes_checkpoint, folder, tmp_path / "out.json", name, **named)
    assert not list(tmp_path.glob("out.json*"))


@pytest.mark.parametrize(
    "split, expected", [("test", "task local_choice: doc"), ("train", "few-shot examples: doc")]
)
def test_a_document_that_does_not_fit_is_named(
    own_tasks_only, bytes_checkpoint, folder, tmp_path, split, expected
):
    file = folder / f"{split}.jsonl"
    lines = file.read_text().splitlines()
    lines[4] = json.dumps(json.loads(lines[4]) | {"answer": 3})
    file.write_text("\n".join(lines) + "\n")
    broken("local_choice", "doc_to_target: answer", 'doc_to_target: "{{choices[answer]}}"')(folder)
    with pytest.raises(
        ValueError, match=rf"{expected}_to_target does not fit document 4 .* answer"
    ):
        run(bytes_checkpoint, folder, tmp_path / "out.json", "local_choice", num_fewshot=1)


def test_files_that_are_no_tasks(own_tasks_only, bytes_checkpoint, folder, tmp_path):
    (folder / "broken.yaml").write_text("task: [")
    with pytest.raises(ValueError, match=r"define none: .*broken.yaml \(pass one as a task"):
        run(bytes_checkpoint, folder, tmp_path / "out.json", "brokn")
    with pytest.raises(ValueError, match=r"broken\.yaml: ParserError"):
        run(bytes_checkpoint, folder, tmp_path / "out.json", str(folder / "broken.yaml"))
    with pytest.raises(FileNotFoundError, match="include_path: found no folder"):
        run(bytes_checkpoint, folder / "none", tmp_path / "out.json", "local_text")


def test_a_checkpoint_without_tokenizer(lm_eval, of_bytes, folder, tmp_path):
    model, params, _ = of_bytes
    btlm.save(tmp_path / "bare", model.config, params)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        run(tmp_path / "bare", folder, tmp_path / "out.json")


def test_lm_eval_is_not_installed(bytes_checkpoint, folder, tmp_path, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'btlm-jax\[eval\]'"):
        run(bytes_checkpoint, folder, tmp_path / "out.json")


def test_the_command_says_what_is_wrong(own_tasks_only, bytes_checkpoint, folder, tmp_path, capsys):
    """As a message, without a traceback, and with exit code 2."""
    import unittest.mock

    args = [str(bytes_checkpoint), "--tasks", "local_texts", "--json", str(tmp_path / "out.json")]
    with unittest.mock.patch.object(cli, "Command", EvalHarness):
        assert cli.main([*args, "--include-path", str(folder)]) == 2
    assert "btlm: error: tasks: found no task 'local_texts'" in capsys.readouterr().err
