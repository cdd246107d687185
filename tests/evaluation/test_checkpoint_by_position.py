"""`btlm eval loss-by-position`: its numbers, its options and what it refuses."""

from __future__ import annotations

import json

import numpy as np

from btlm_jax import cli, save
from btlm_jax.evaluation.by_position import (
    loss_by_position,
)
from btlm_jax.evaluation.documents import TokenizedDocument
from btlm_jax.evaluation.long_windows import LongWindows
from support import golden

KINDS = ("none", "fixed", "dynamic")


def run_loss_by_position(capsys, *argv):
    code = cli.main(["eval", "loss-by-position", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def write_documents(path, *sizes: int):
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": "".join(map(chr, rng.integers(32, 127, n)))}) for n in sizes]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_report_holds_the_losses_also_from_a_mesh(capsys, of_bytes, bytes_checkpoint, tmp_path):
    model, params, tokenizer = of_bytes
    text = write_documents(tmp_path / "t.jsonl", 150, 20, 64, 400)
    files = tmp_path / "out" / "r.json", tmp_path / "out" / "r.png"
    argv = [bytes_checkpoint, "--jsonl", text, "--trained-length", 16, "--windows-per-document", 3]
    code, out, _ = run_loss_by_position(capsys, *argv, "--json", files[0], "--plot", files[1])
    assert code == 0 and "6 windows of 64 tokens from 3 documents; 1 shorter documents" in out
    report = json.loads(files[0].read_text())
    assert (report["length"], report["trained"], report["windows"]) == (64, 16, 6)
    assert files[1].stat().st_size > 10_000
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    ids = [TokenizedDocument(np.array(tokenizer.encode(x).ids), len(x)) for x in texts]
    expected = loss_by_position(
        model, params, LongWindows(ids, 256, 64, max_per_document=3), trained=16, kinds=KINDS
    )
    for curve, other in zip(report["curves"], expected.curves, strict=True):
        np.testing.assert_allclose(curve["mean"], other.nll / 6, atol=2e-6)
    # On a mesh, sequences split too; one kind.
    argv += ["--scaling", "fixed", "--set", "mesh.context=2"]
    argv += ["--set", "mesh.tensor=2", "--set", "mesh.data=2"]
    code, out, _ = run_loss_by_position(capsys, *argv, "--json", files[0])
    assert code == 0 and "dynamic" not in out
    (curve,) = json.loads(files[0].read_text())["curves"]
    np.testing.assert_allclose(curve["mean"], expected.curves[1].nll / 6, rtol=1e-4)


def test_bad_input_is_refused_before_weights_are_read(
    capsys, of_bytes, bytes_checkpoint, tmp_path, refuse_to_load
):
    model, params, _ = of_bytes
    save(tmp_path / "bare", model.config, params)
    learned = golden.load("f_learned_gelu_mup")
    save(tmp_path / "learned", learned.config, learned.params)
    text = ("--jsonl", write_documents(tmp_path / "t.jsonl", 90, 70))
    short = (*text, "--trained-length", 16)
    for argv, message in {
        (tmp_path / "bare", *text): "no tokenizer.json",
        (tmp_path / "learned", *text): "found 'learned', expected 'alibi'",
        (bytes_checkpoint,): "found neither --text nor --jsonl",
        (bytes_checkpoint, *text): "found 1024 tokens and documents of at most 90, 160 in all",
        (bytes_checkpoint, *text, "--length", 256): "expected more than the trained length of 256",
        (
            bytes_checkpoint,
            *text,
            "--documents",
            "joined",
            "--windows-per-document",
            2,
        ): "joined have no windows of their own",
        (bytes_checkpoint, *text, "--trained-length", 30): "or join them (--documents joined)",
        (bytes_checkpoint, *text, "--trained-length", 1): "trained length: found 1",
        (bytes_checkpoint, *text, "--trained-length", 9, "--windows", 0): "windows: found 0",
        (bytes_checkpoint, *short, "--batch-size", 0): "batch-size: found 0, expected at least 1",
        (
            bytes_checkpoint,
            *short,
            "--batch-size",
            3,
            "--set",
            "mesh.fsdp=2",
        ): "batch size 3 does not",
        (bytes_checkpoint, *short, "--json", tmp_path): "is a directory: choose another name",
        (bytes_checkpoint, *short, "--plot", tmp_path / "a.svg"): "found the suffix '.svg'",
    }.items():
        code, out, err = run_loss_by_position(capsys, *argv)
        assert code == 2 and message in err and "Traceback" not in out + err, err
