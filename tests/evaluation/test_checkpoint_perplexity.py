"""`btlm eval perplexity`: its numbers, its options and what it refuses."""

from __future__ import annotations

import gzip
import json
import re

import numpy as np
import pytest

from btlm_jax import cli, load_tokenizer, save
from btlm_jax.checkpoint import trained_documents
from btlm_jax.evaluation.documents import TokenizedDocument
from btlm_jax.evaluation.perplexity import cross_entropy
from btlm_jax.evaluation.rolling_windows import cut_rolling_windows


def run_perplexity(capsys, *argv):
    code = cli.main(["eval", "perplexity", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_report_holds_the_metrics_and_compares_quantizations(capsys, trained, tmp_path):
    folder, model, params, text, _ = trained
    report = tmp_path / "out" / "report.json"
    argv = (folder / "run", "--text", folder / "page.txt", "--length", 32, "--stride", 16)
    code, out, _ = run_perplexity(capsys, *argv, "--quantize", "int8, int4:32", "--json", report)
    assert code == 0
    ids = np.array(load_tokenizer(folder).encode(text).ids)
    windows = cut_rolling_windows(
        model.config, [TokenizedDocument(ids, len(text.encode()))], 95, length=32, stride=16
    )
    expected = cross_entropy(model, params, windows)
    numbers = json.loads(report.read_text())
    assert numbers["tokens"] == len(ids) and numbers["text_bytes"] == len(text.encode())
    assert (numbers["length"], numbers["stride"]) == (32, 16)
    for name, value in expected.metrics().items():
        assert numbers[name] == pytest.approx(value, rel=1e-6)
    assert [row["weights"] for row in numbers["compared"]] == ["float32", "int8", "int4:32"]
    assert f"cross-entropy: {expected.nats_per_token:.5f} nats" in out
    assert re.search(r"^int4:32 .*%$", out, re.MULTILINE)
    # Bits of all weights, including vectors in fp32.
    bits = [row["bits_per_weight"] for row in numbers["compared"]]
    assert bits[0] == 32 and 8 < bits[1] < 9 and 4.5 < bits[2] < 6.5


def test_json_lines_are_evaluated_on_a_mesh(capsys, trained, tmp_path):
    folder, model, params, text, _ = trained
    lines = [text[:100], text[100:350]]
    file = tmp_path / "d.json.gz"
    file.write_bytes(gzip.compress("\n".join(json.dumps({"body": x}) for x in lines).encode()))
    report = tmp_path / "r.json"
    argv = (folder / "run", "--jsonl", file, "--field", "body", "--json", report)
    code, out, _ = run_perplexity(capsys, *argv, "--set", "mesh.fsdp=4", "--set", "mesh.tensor=2")
    assert code == 0 and "2 documents, 350 tokens, 350 bytes; 6 windows of 64 tokens" in out
    encode = load_tokenizer(folder).encode
    texts = [TokenizedDocument(np.array(encode(x).ids), len(x)) for x in lines]
    expected = cross_entropy(model, params, cut_rolling_windows(model.config, texts, 95))
    loss = json.loads(report.read_text())["nats_per_token"]
    assert loss == pytest.approx(expected.nats_per_token, rel=1e-5)


def test_documents_are_read_as_in_training_unless_told_otherwise(capsys, trained, tmp_path):
    """Also which token precedes them."""
    folder, model, params, text, _ = trained
    origin = trained_documents.describe(mask_documents=False, eos_id=3)
    assets = [folder / "tokenizer.json"]
    save(tmp_path / "run", model.config, params, assets=assets, origin=origin)
    file, report = tmp_path / "d.jsonl", tmp_path / "r.json"
    lines = [text[:100], text[100:350]]
    file.write_text("\n".join(json.dumps({"text": x}) for x in lines))
    encode = load_tokenizer(folder).encode
    texts = [TokenizedDocument(np.array(encode(x).ids), len(x)) for x in lines]

    def measure(path, *options):
        run_perplexity(capsys, path, "--jsonl", file, "--json", report, *options)
        numbers = json.loads(report.read_text())
        expected = cut_rolling_windows(
            model.config, texts, 3 if path == tmp_path / "run" else 95,
            joined=numbers["read_documents"] == "joined",
        )  # fmt: skip
        loss = cross_entropy(model, params, expected).nats_per_token
        assert numbers["nats_per_token"] == pytest.approx(loss, rel=1e-5)
        return numbers["read_documents"], numbers["trained_documents"]

    assert measure(tmp_path / "run") == ("joined", "joined")
    assert measure(tmp_path / "run", "--documents", "separate") == ("separate", "joined")
    assert measure(folder / "run") == ("separate", None)
    assert measure(folder / "run", "--documents", "joined") == ("joined", None)


def test_a_quantized_checkpoint_equals_quantization_in_memory(capsys, trained, tmp_path):
    folder, *_ = trained
    quantized = tmp_path / "int4"
    assert cli.main(["convert", str(folder / "run"), str(quantized), "--quantize", "int4"]) == 0
    report = tmp_path / "r.json"
    # By default it would compute in bfloat16 on a CPU, as decoding does.
    argv = ("--text", folder / "page.txt", "--json", report, "--dtype", "float32")
    code, out, _ = run_perplexity(capsys, quantized, *argv)
    assert "(computed in float32)" in out
    alone = json.loads(report.read_text())["nats_per_token"]
    run_perplexity(capsys, folder / "run", *argv, "--quantize", "int4")
    in_memory = json.loads(report.read_text())["compared"][1]["nats_per_token"]
    assert code == 0 and alone == pytest.approx(in_memory, rel=1e-6)
    code, _, err = run_perplexity(capsys, quantized, *argv, "--quantize", "int8")
    assert code == 2 and "is quantized already (int4 in groups of 64" in err


def test_bad_input_is_refused_before_weights_are_read(capsys, trained, tmp_path, refuse_to_load):
    folder, model, params, _, _ = trained
    save(tmp_path / "bare", model.config, params)
    files = {"empty.txt": b"", "latin.txt": b"caf\xe9", "one.txt": b"a", "two.txt": b"ab" * 40}
    files["fields.jsonl"] = b'{"text": "fine"}\n{"body": "x"}\n'
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    text = ("--text", tmp_path / "two.txt")
    for argv, message in {
        (tmp_path / "bare", *text): "no tokenizer.json",
        (folder / "run",): "found neither --text nor --jsonl",
        (folder / "run", "--text", tmp_path / "nowhere.txt"): "no such file",
        (folder / "run", "--text", tmp_path / "empty.txt"): "empty.txt is empty",
        (folder / "run", "--text", tmp_path / "latin.txt"): "latin.txt: not UTF-8",
        (folder / "run", "--text", tmp_path / "one.txt"): "found 1 tokens, expected at least 2",
        (folder / "run", "--text", tmp_path / "fields.jsonl"): "kind '.jsonl', expected '.txt'",
        (folder / "run", "--jsonl", tmp_path / "fields.jsonl"): "fields.jsonl:2: no field 'text'",
        (folder / "run", *text, "--field", "body"): "--field: found 'body' without --jsonl",
        (folder / "run", *text, "--length", "1"): "length: found 1",
        (folder / "run", *text, "--length", "8", "--stride", "9"): "stride: found 9",
        (folder / "run", *text, "--quantize", "int3"): "quantize: found 'int3'",
        (folder / "run", *text, "--quantize", "int8", "--set", "mesh.fsdp=8"): "found a mesh",
        (folder / "run", *text, "--eos", "</s>"): "no token '</s>'",
        (folder / "run", *text, "--batch-size", "0"): "batch-size: found 0, expected at least 1",
        (
            folder / "run",
            *text,
            "--batch-size",
            "3",
            "--set",
            "mesh.fsdp=2",
        ): "batch size 3 does",
        (folder / "run", *text, "--json", tmp_path): "is a directory: choose another name",
    }.items():
        code, out, err = run_perplexity(capsys, *argv)
        assert code == 2 and message in err and "Traceback" not in out + err, err
