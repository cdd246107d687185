"""`btlm eval retrieval`: its answers, its options and what it refuses."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp

from btlm_jax import cli, save
from btlm_jax.config import AlibiScaling
from btlm_jax.evaluation import retrieval
from btlm_jax.evaluation.context_extension import with_scaling_kind
from support import golden


def run_retrieval(capsys, *argv):
    code = cli.main(["eval", "retrieval", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_report_holds_the_greedy_answers(capsys, of_bytes, bytes_checkpoint, tmp_path):
    model, params, tokenizer = of_bytes
    files = tmp_path / "out" / "r.json", tmp_path / "out" / "r.png"
    # Up to the trained length both kinds of scaling share a program.
    argv = [bytes_checkpoint, "--lengths", "700,600", "--trained-length", 600, "--samples", 3]
    options = ["--max-new-tokens", 6, "--scaling", "none", "fixed"]
    options += ["--json", files[0], "--plot", files[1]]
    code, out, _ = run_retrieval(capsys, *argv, *options)
    assert code == 0 and len(out.splitlines()) == 4
    assert files[1].stat().st_size > 10_000
    report = json.loads(files[0].read_text())
    assert [(x["scaling"], x["length"]) for x in report["outcomes"]] == [
        ("none", 700), ("fixed", 700), ("none", 600), ("fixed", 600)
    ]  # fmt: skip
    prompts = retrieval.retrieval_prompts("lines", tokenizer, 700, 3)
    for x in report["outcomes"][:2]:
        used = with_scaling_kind(model, x["scaling"], 600, 700)
        continued = retrieval.greedy_continuation(
            used, params, tokenizer, new_tokens=6, batch_size=4
        )
        assert [a["found"] for a in x["answers"]] == continued([p.ids for p in prompts])
        assert [a["expected"] for a in x["answers"]] == [p.text.answer for p in prompts]
    none, fixed = ([a["found"] for a in x["answers"]] for x in report["outcomes"][:2])
    assert none != fixed


def test_half_precision_weights_are_computed_in_their_dtype(
    capsys, of_bytes, bytes_checkpoint, tmp_path, monkeypatch
):
    """On a CPU every step would otherwise copy them to float32."""
    model, params, _ = of_bytes
    assets = [bytes_checkpoint / "tokenizer" / "tokenizer.json"]
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    save(tmp_path / "half", model.config, half, assets=assets)
    seen = []

    def greedy_continuation(used, params, *_, **__):
        seen.append((str(used.runtime(params).dtype), used.config.alibi_scaling))
        return lambda ids: [""] * len(ids)

    monkeypatch.setattr(retrieval, "greedy_continuation", greedy_continuation)
    argv = [tmp_path / "half", "--lengths", "600", "--samples", 1, "--json", tmp_path / "r.json"]
    for options, expected in (([], "bfloat16"), (["--dtype", "float32"], "float32")):
        assert run_retrieval(capsys, *argv, "--scaling", "none", "fixed", *options)[0] == 0
        (none, fixed), seen[:] = seen[:], []
        assert none == (expected, None) and fixed[0] == expected and fixed[1] is not None
        assert json.loads((tmp_path / "r.json").read_text())["compute_dtype"] == expected


def test_dynamic_scaling_counts_generated_tokens(capsys, bytes_checkpoint, monkeypatch):
    """A prompt of the trained length is answered beyond it."""
    used = []

    def greedy_continuation(model, *args, new_tokens, **options):
        used.append(model.config.alibi_scaling)
        return lambda ids: [""] * len(ids)

    monkeypatch.setattr(retrieval, "greedy_continuation", greedy_continuation)
    argv = [bytes_checkpoint, "--lengths", "640,700", "--trained-length", 700, "--samples", 1]
    code, _, err = run_retrieval(capsys, *argv, "--scaling", "dynamic", "--max-new-tokens", 8)
    assert code == 0, err
    assert used == [None, AlibiScaling(train_seq_len=700)]


def test_bad_input_is_refused_before_weights_are_read(
    capsys, of_bytes, bytes_checkpoint, tmp_path, refuse_to_load
):
    model, params, _ = of_bytes
    save(tmp_path / "bare", model.config, params)
    learned = golden.load("f_learned_gelu_mup")
    golden.write_tokenizer(tmp_path, learned.config.vocab_size)
    assets = [tmp_path / "tokenizer.json"]
    save(tmp_path / "learned", learned.config, learned.params, assets=assets)
    few = golden.load("a2_btlm_mup_h32")
    golden.write_tokenizer(tmp_path, 20)
    save(tmp_path / "few", few.config, few.params, assets=assets)
    for argv, message in {
        (tmp_path / "bare",): "no tokenizer.json",
        (tmp_path / "nowhere",): "nowhere",
        (tmp_path / "learned",): "found 'learned', expected 'alibi'",
        (tmp_path / "few",): "a vocabulary of all its characters",
        (bytes_checkpoint,): "lengths: found 64 tokens, expected at least",
        (bytes_checkpoint, "--lengths", "2000,9"): "lengths: found 9 tokens, expected at least",
        (bytes_checkpoint, "--samples", "0"): "samples: found 0",
        (bytes_checkpoint, "--batch-size", "0"): "batch-size: found 0, expected at least 1",
        (bytes_checkpoint, "--max-new-tokens", "0"): "max-new-tokens: found 0",
        (bytes_checkpoint, "--json", tmp_path): "is a directory: choose another name",
        (bytes_checkpoint, "--plot", tmp_path / "a.pdf"): "found the suffix '.pdf'",
    }.items():
        code, out, err = run_retrieval(capsys, *argv)
        assert code == 2 and message in err and "Traceback" not in out + err, err
