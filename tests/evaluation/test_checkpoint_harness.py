"""`btlm eval harness` over local tasks: numbers and resumption; skipped without lm-eval."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import btlm_jax as btlm
from btlm_jax import cli
from btlm_jax.checkpoint import unstacked
from btlm_jax.generation import result_journal
from support.harness_tasks import TASKS, run_harness


def test_zero_shot_and_few_shot_tasks_run_offline(
    lm_eval, bytes_checkpoint, tasks, tmp_path, capsys
):
    """The perplexity is that of `btlm eval perplexity`."""
    from btlm_jax.evaluation.documents import TokenizedDocument
    from btlm_jax.evaluation.perplexity import cross_entropy
    from btlm_jax.evaluation.rolling_windows import cut_rolling_windows

    report = run_harness(bytes_checkpoint, tasks, tmp_path / "0.json", max_length=40)
    assert report["results"].keys() == TASKS.keys() and "exact_match" in capsys.readouterr().out
    model, params = btlm.load(bytes_checkpoint)
    tokenizer = btlm.load_tokenizer(bytes_checkpoint)
    texts = [json.loads(x)["text"] for x in (tasks / "test.jsonl").read_text().splitlines()]
    documents = [TokenizedDocument(np.array(tokenizer.encode(t).ids), len(t)) for t in texts]
    cut = cut_rolling_windows(model.config, documents, model.config.eos_token_id, length=40)
    expected = cross_entropy(model, params, cut).bits_per_byte
    assert report["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(
        expected, rel=1e-5
    )
    few = run_harness(
        bytes_checkpoint, tasks, tmp_path / "2.json", "local_choice", num_fewshot=2, limit=3
    )
    assert few["n-shot"] == {"local_choice": 2}
    assert few["n-samples"]["local_choice"] == {"original": 6, "effective": 3}


def test_answers_of_a_task_do_not_depend_on_other_tasks(
    only_local_tasks, of_bytes, tasks, tmp_path
):
    """Unstacked weights are computed in bfloat16 on a CPU, for every kind of request."""
    model, params, tokenizer = of_bytes
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    btlm.save(tmp_path / "half", model.config, params, assets=[tmp_path / "tokenizer.json"])
    alone, both = (
        run_harness(tmp_path / "half", tasks, tmp_path / f"{names}.json", names)
        for names in ("local_text", "local_text,local_continue")
    )
    assert alone["results"]["local_text"] == both["results"]["local_text"]
    assert alone["compute_dtype"] == both["compute_dtype"] == "bfloat16"
    exact = run_harness(
        tmp_path / "half", tasks, tmp_path / "e.json", "local_text", dtype="float32"
    )
    assert exact["compute_dtype"] == "float32"
    assert exact["results"]["local_text"] != alone["results"]["local_text"]


def test_a_run_is_not_resumed_with_another_compute_dtype(
    only_local_tasks, bytes_checkpoint, tasks, tmp_path, monkeypatch
):
    """As on another platform, which computes other numbers."""
    add, out = result_journal.ResultJournal.add, tmp_path / "out.json"

    def add_until_killed(self, number, fields):
        if self.results:
            raise KeyboardInterrupt
        add(self, number, fields)

    monkeypatch.setattr(result_journal.ResultJournal, "add", add_until_killed)
    with pytest.raises(KeyboardInterrupt):
        run_harness(bytes_checkpoint, tasks, out, "local_text")
    monkeypatch.setattr(unstacked, "decoding_dtype", lambda *_: "bfloat16")
    with pytest.raises(ValueError, match="compute_dtype: found 'float32', expected 'bfloat16'"):
        run_harness(bytes_checkpoint, tasks, out, "local_text")


def test_a_killed_run_resumes_to_the_same_file(
    only_local_tasks, bytes_checkpoint, tasks, tmp_path, monkeypatch, caplog
):
    expected = run_harness(bytes_checkpoint, tasks, tmp_path / "expected.json")
    add, out = result_journal.ResultJournal.add, tmp_path / "out.json"
    for count in (5, 25, 30, 34):  # during choices, texts to score, texts to generate

        def add_until_killed(self, number, fields, count=count):
            if len(self.results) == count:
                raise KeyboardInterrupt
            add(self, number, fields)

        monkeypatch.setattr(result_journal.ResultJournal, "add", add_until_killed)
        with pytest.raises(KeyboardInterrupt):
            run_harness(bytes_checkpoint, tasks, out)
        assert not out.exists()
    monkeypatch.setattr(result_journal.ResultJournal, "add", add)
    with pytest.raises(ValueError, match="holds 34 results of another run"):
        run_harness(bytes_checkpoint, tasks, out, dtype="bfloat16")
    caplog.clear()
    caplog.set_level("INFO", "btlm_jax")
    assert run_harness(bytes_checkpoint, tasks, out) == expected
    assert "generate: 6 text/6 text (100%)" in caplog.text  # known answers are counted
    assert not out.with_name("out.json.partial").exists()
    with pytest.raises(FileExistsError, match="overwrite"):
        run_harness(bytes_checkpoint, tasks, out)


def test_a_checkpoint_without_a_tokenizer_is_refused(lm_eval, of_bytes, tasks, tmp_path):
    model, params, _ = of_bytes
    btlm.save(tmp_path / "bare", model.config, params)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        run_harness(tmp_path / "bare", tasks, tmp_path / "out.json")


def test_a_missing_lm_eval_is_named(bytes_checkpoint, tasks, tmp_path, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'btlm-jax\[eval\]'"):
        run_harness(bytes_checkpoint, tasks, tmp_path / "out.json")


def test_errors_are_messages_without_a_traceback(
    only_local_tasks, bytes_checkpoint, tasks, tmp_path, capsys
):
    """The exit code is 2."""
    out = str(tmp_path / "out.json")
    args = ["eval", "harness", str(bytes_checkpoint), "--tasks", "local_texts", "--json", out]
    assert cli.main([*args, "--include-path", str(tasks)]) == 2
    assert "btlm: error: --tasks: found no task 'local_texts'" in capsys.readouterr().err
