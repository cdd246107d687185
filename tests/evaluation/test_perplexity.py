"""Windows, cross-entropy and the cost of quantizing, against independent computations."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from btlm_jax import BTLM, BTLMConfig, cli, load_tokenizer, make_mesh, save
from btlm_jax.checkpoint import quantization
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.data import sample_text
from btlm_jax.evaluation import quantization_cost
from btlm_jax.evaluation.documents import TokenizedDocument
from btlm_jax.evaluation.perplexity import CrossEntropy, cross_entropy
from btlm_jax.evaluation.rolling_windows import RollingWindows, cut_rolling_windows
from btlm_jax.model import mup, packed, weights
from btlm_jax.model.loss import IGNORE
from btlm_jax.model.params import Params, flatten_tree, unflatten_tree
from btlm_jax.train.demo import quickstart
from btlm_jax.train.step import init_state, make_step
from btlm_jax.utils.compile_cache import count_compilations
from support import golden, reference_numpy

ALIBI = golden.load("a2_btlm_mup_h32").config


def documents(*lengths: int, vocab: int = 96) -> list[TokenizedDocument]:
    """Random ones; bytes that no count of tokens gives."""
    rng = np.random.default_rng(0)
    return [
        TokenizedDocument(rng.integers(0, vocab, n).astype(np.uint16), 3 * n + 1) for n in lengths
    ]


# Windows ------------------------------------------------------------------------------------------


def test_windows_are_the_harness_s():
    """Windows that lm-evaluation-harness documents or asserts, written down from there."""
    # Of its docstring: 9 tokens, max_seq_len 3, context_len 2, so that 2 are predicted at a time.
    found = list(RollingWindows((TokenizedDocument(np.arange(9), 9),), 99, 3, 2))
    assert [w.inputs.tolist() for w in found] == [[99, 0, 1], [1, 2, 3], [3, 4, 5], [5, 6, 7]]
    kept = [w.targets[w.targets != IGNORE].tolist() for w in found]
    assert kept == [[0, 1, 2], [3, 4], [5, 6], [7, 8]]
    # Of its tests: 34 tokens, max_seq_len 10, context_len 1; the last window reads 10 as well.
    found = list(RollingWindows((TokenizedDocument(np.arange(34), 34),), 99, 10, 10))
    inputs = [[99, *range(9)], [*range(9, 19)], [*range(19, 29)], [*range(23, 33)]]
    assert [w.inputs.tolist() for w in found] == inputs
    assert found[-1].targets.tolist() == [IGNORE] * 6 + [30, 31, 32, 33]


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.integers(2, 20),
    st.integers(1, 20),
    st.integers(1, 4),
)
def test_every_token_is_predicted_once(sizes, length, stride, rows):
    stride = min(stride, length)
    # Every token of every document is another one.
    starts = np.cumsum([0, *sizes])
    texts = [TokenizedDocument(np.arange(a, b), 1) for a, b in itertools.pairwise(starts)]
    of_document = {int(t): d for d in texts for t in d.ids}
    windows = RollingWindows(tuple(texts), 999, length, stride)
    seen = []
    for w in windows:
        assert w.inputs.shape == w.targets.shape and 1 <= len(w.inputs) <= length
        known = w.targets != IGNORE
        assert known.any() and known[known.argmax() :].all()
        ids = of_document[int(w.targets[-1])].ids
        for i in np.nonzero(known)[0]:
            token = int(w.targets[i])
            before = [999, *ids[: token - ids[0]].tolist()]
            # What is read up to there is what came before, with as much context as promised.
            assert w.inputs[: i + 1].tolist() == before[len(before) - i - 1 :]
            assert i + 1 >= min(len(before), length - stride + 1)
            seen.append(token)
        assert len(w.inputs) == min(length, len(ids))
    assert sorted(seen) == list(range(starts[-1])) and len(seen) == windows.tokens
    assert len(list(windows)) == len(windows)
    batches = list(windows.batches(rows, length + 3, ALIBI))
    assert all(b.inputs.shape == b.targets.shape == (rows, length + 3) for b in batches)
    filled = [t for b in batches for t in b.targets[b.targets != IGNORE].tolist()]
    assert filled == seen and len(batches) == -(-len(windows) // rows)


def test_lengths_and_strides_by_default():
    assert (
        cut_rolling_windows(ALIBI, documents(40), 0).length == 40
    )  # no longer than the longest document
    long = cut_rolling_windows(ALIBI, documents(1, 10_000), 0)
    assert long.length == long.stride == ALIBI.n_positions
    assert cut_rolling_windows(ALIBI, documents(500), 0, length=60).stride == 60
    assert cut_rolling_windows(ALIBI, documents(500), 0, length=60, stride=30).stride == 30
    short = cut_rolling_windows(ALIBI, documents(9), 0, length=60, stride=30)
    assert (short.length, short.stride) == (9, 9)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(length=1), "length: found 1, expected at least 2"),
        (dict(length=8, stride=9), "stride: found 9, expected from 1 to the length"),
        (dict(stride=0), "stride: found 0"),
        (dict(length=999), "length: found 999, expected at most .* learned positions"),
    ],
)
def test_windows_that_make_no_sense(options, message):
    learned = golden.load("f_learned_gelu_mup").config
    with pytest.raises(ValueError, match=message):
        cut_rolling_windows(learned, documents(20), 0, **options)


def test_too_little_text():
    for lengths in ((), (0,), (1, 0)):
        with pytest.raises(ValueError, match=r"found [01] tokens, expected at least 2"):
            cut_rolling_windows(ALIBI, documents(*lengths), 0)


def test_longer_windows_than_were_trained(caplog):
    caplog.set_level("WARNING", "btlm_jax")
    cut_rolling_windows(ALIBI, documents(20), 0, length=ALIBI.n_positions + 1)
    assert "exceed the trained context" in caplog.text


# The loss -----------------------------------------------------------------------------------------


def by_witness(case: golden.Case, texts, prefix: int, length: int, stride: int) -> float:
    """The summed nats in float64: each token from a forward pass of its own context alone."""
    total = 0.0
    for document in texts:
        tokens, done = [prefix, *document.ids.tolist()], 0
        while done < len(document.ids):
            end = min(done + (stride if done else length), len(document.ids))
            start = max(0, end - length)
            out = reference_numpy.forward(case.weights, case.hf_config, [tokens[start:end]])
            logits = out["logits"][0]
            targets = tokens[start + 1 : end + 1]
            log_p = log_softmax(logits, -1)[np.arange(len(targets)), targets]
            total -= log_p[done - start :].sum()
            done = end
    return total


@pytest.mark.parametrize("length, stride", [(16, 16), (16, 8), (16, 1), (61, 61)])
@pytest.mark.parametrize("name", ["a2_btlm_mup_h32", "f_learned_gelu_mup", "e_alibi_dynamic16"])
def test_is_the_float64_computation(name, length, stride):
    """With learned positions, and with slopes that depend on the length of every window."""
    case = golden.load(name)
    if not case.config.alibi:
        length, stride = min(length, case.config.n_positions), min(stride, case.config.n_positions)
    texts = documents(40, 7, 61, 1, vocab=case.config.vocab_size)
    windows = cut_rolling_windows(case.config, texts, 2, length=length, stride=stride)
    found = cross_entropy(case.model, case.params, windows, batch_size=3)
    expected = by_witness(case, texts, 2, length, stride)
    assert (found.tokens, found.text_bytes) == (109, 3 * 109 + 4)
    # The model's logits are off by up to 5e-5 (test_model), so each token by at most twice that.
    assert abs(found.nats - expected) < 109 * 1e-4


def test_overlap_helps_and_windows_matter():
    """Else the comparisons above would hold of windows that are all alike."""
    case = golden.load("a2_btlm_mup_h32")
    texts = documents(61)
    sums = {by_witness(case, texts, 2, 16, stride) for stride in (16, 8, 1)}
    sums.add(by_witness(case, texts, 3, 16, 16))
    assert np.diff(sorted(sums)).min() > 109 * 1e-4


def test_units():
    found = CrossEntropy(nats=30 * math.log(8), tokens=30, text_bytes=90)
    assert found.metrics() == pytest.approx(
        {"nats_per_token": math.log(8), "bits_per_token": 3, "bits_per_byte": 1, "perplexity": 8}
    )
    assert CrossEntropy(1e6, 2, 2).perplexity == math.inf


def test_one_program_and_any_batch():
    case = golden.load("a2_btlm_mup_h32")
    windows = cut_rolling_windows(case.config, documents(200, 31, 5), 2, length=32, stride=16)
    one = cross_entropy(case.model, case.params, windows, batch_size=4)
    with count_compilations() as found:
        cross_entropy(case.model, case.params, windows, batch_size=4)
        other = cut_rolling_windows(case.config, documents(9, 77), 2, length=30, stride=7)
        cross_entropy(case.model, case.params, other, batch_size=4)
    assert found.count == 0
    # fp32 sums of other rows: 200 tokens, each rounded by 2^-24 of the sum so far.
    for batch_size in (None, 1):
        several = cross_entropy(case.model, case.params, windows, batch_size=batch_size)
        np.testing.assert_allclose(several.nats, one.nats, rtol=1e-5)


def test_a_mesh_evaluates_alike():
    model = BTLM(BTLMConfig.preset("tiny"))
    texts = documents(150, 40, 3, vocab=512)
    windows = cut_rolling_windows(model.config, texts, 2, length=48, stride=24)
    expected = cross_entropy(model, model.init(jax.random.key(0)), windows)
    params = model.init(jax.random.key(0), mesh=make_mesh(data=2, fsdp=1, context=2, tensor=2))
    found = cross_entropy(model, params, windows)
    assert (found.tokens, found.text_bytes) == (expected.tokens, expected.text_bytes)
    np.testing.assert_allclose(found.nats, expected.nats, rtol=1e-5)
    with pytest.raises(ValueError, match=r"batch size 3 does not divide over mesh axes"):
        cross_entropy(model, params, windows, batch_size=3)


def test_what_is_not_finite_is_an_error(tiny):
    model, params = tiny
    beyond = cut_rolling_windows(model.config, [TokenizedDocument(np.array([5, 6, 512]), 3)], 2)
    with pytest.raises(FloatingPointError, match="found nan after 0 tokens"):
        cross_entropy(model, params, beyond)
    with pytest.raises(ValueError, match="batch_size: found 0"):
        cross_entropy(model, params, beyond, batch_size=0)


# Quantized ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a small model that knows a page of Python's reference, by characters, and
    that page."""
    config = dataclasses.replace(
        BTLMConfig.preset("tiny"), vocab_size=96, n_positions=64, n_embd=128, n_head=2, n_inner=342,
        n_layer=1, mup_width_scale=0.5,
    )  # fmt: skip
    home = tmp_path_factory.mktemp("trained")
    golden.write_tokenizer(home, config.vocab_size)
    tokenizer = load_tokenizer(home)
    text = " ".join(sample_text.read_sample_text()[:2000].split())
    ids = np.array(tokenizer.encode(text).ids, np.int32)
    model, tx = BTLM(config), mup.adamw(1e-2, config)
    step, state = make_step(model, tx), init_state(model.init(jax.random.key(0)), tx)
    rng = np.random.default_rng(0)
    for _ in range(120):
        starts = rng.integers(0, len(ids) - 65, 8)
        state, metrics = step(state, np.stack([ids[s : s + 65] for s in starts])[None])
    save(home / "run", config, state.params, assets=[home / "tokenizer.json"])
    (home / "page.txt").write_text(text)
    return home, model, state.params, text, float(metrics["loss"])


def test_what_quantizing_costs(trained):
    home, model, params, text, loss = trained
    ids = np.array(load_tokenizer(home).encode(text).ids)
    letters = quickstart.unigram_entropy(ids)
    windows = cut_rolling_windows(model.config, [TokenizedDocument(ids, len(text))], 95)
    kinds = [Quantization.parse(kind) for kind in ("int8", "int4", "int4:128")]
    rows = quantization_cost.compare_quantizations(model, params, windows, kinds)
    own = rows[0].found.nats_per_token
    assert max(own, loss) < letters - 0.5, "the model has learned"
    int8, int4, int4_128 = (row.found.nats_per_token - own for row in rows[1:])
    # The log-probability of a token is off by about 0.03 in int8 and 0.1 in int4, either way. Of
    # the mean over 2000 tokens that leaves 0.1 / 2000 ** 0.5 = 0.002 by chance, and a rise of
    # 0.1 ** 2 / 2 = 0.005 (the divergence of the two softmaxes).
    assert abs(int8) < 0.01 and max(abs(int4), abs(int4_128)) < 0.03
    # Chance has less of a say in the mean size of the changes of many texts. Errors of weights are
    # 0.09 of their size in int4; 0.007 in int8, as those of embedding and rounded inputs.
    sizes = [changes(model, params, ids, to) for to in kinds[:2]]
    assert 0 < 2 * sizes[0] < sizes[1]
    # Loss of what is stored, independently: dequantized weights in the original's layout.
    for to, row in zip(kinds[1:], rows[2:], strict=True):
        found = quantization.quantize_params(params, model.config, to)
        again = dequantized(params, found, model.config)
        plain = cross_entropy(model, again, windows).nats_per_token
        assert abs(row.found.nats_per_token - plain) < 1e-4  # fp32, in another order


def changes(model, params, ids, to) -> float:
    """The root mean square, over texts of 60 tokens, of the changes of nats per token."""
    used = params, quantization.quantize_params(params, model.config, to)
    found = []
    for start in range(0, len(ids) - 60, 60):
        windows = cut_rolling_windows(
            model.config, [TokenizedDocument(ids[start:][:60], 60)], 95, length=60
        )
        own, other = (cross_entropy(model, p, windows).nats_per_token for p in used)
        found.append(other - own)
    assert len(found) > 25
    return float(np.sqrt(np.square(found).mean()))


def dequantized(params, quantized_params, config) -> Params:
    """Stacked float weights of the values times scales that `quantized` made."""
    made = {path: [] for path in flatten_tree(params)}
    flat = flatten_tree(quantized_params)
    for leaf in weights.disk_leaves(config):
        w, x = leaf.weight, flat[leaf.path]
        if isinstance(x, packed.PackedWeight):
            x = packed.dequantize(x, jnp.float32)
            outputs = [i for i in range(len(w.shape)) if i not in w.inputs]
            order = [*outputs, *w.inputs]
            x = x.reshape([w.shape[i] for i in order]).transpose(np.argsort(order))
        made[w.path].append(x)
    stacked = {w.path: jnp.stack(made[w.path]) if w.stacked else made[w.path][0]
               for w in weights.weight_table(config)}  # fmt: skip
    return unflatten_tree(stacked)


def test_the_table():
    rows = [
        quantization_cost.Row("float32", 4096, 32.0, CrossEntropy(200.0, 100, 300)),
        quantization_cost.Row("int8", 1024, 8.0, CrossEntropy(201.0, 100, 300)),
    ]
    head, own, int8, note = quantization_cost.format_quantization_costs(rows)
    assert head.split()[0] == "weights" and len(head) == len(own) == len(int8)
    assert own.split()[-4:] == ["2.00000", "+0.00000", "7.3891", "+0.000%"]
    assert int8.split()[-4:] == ["2.01000", "+0.01000", "7.4633", "+1.005%"]
    assert "rounded to int8 too" in note
    assert len(quantization_cost.format_quantization_costs(rows[:1])) == 2


# The command --------------------------------------------------------------------------------------


def run(capsys, *argv):
    code = cli.main(["eval", "perplexity", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command(capsys, trained, tmp_path):
    home, model, params, text, _ = trained
    report = tmp_path / "out" / "report.json"
    argv = (home / "run", "--text", home / "page.txt", "--length", 32, "--stride", 16)
    code, out, _ = run(capsys, *argv, "--quantize", "int8, int4:32", "--json", report)
    assert code == 0
    ids = np.array(load_tokenizer(home).encode(text).ids)
    windows = cut_rolling_windows(
        model.config, [TokenizedDocument(ids, len(text.encode()))], 95, length=32, stride=16
    )
    expected = cross_entropy(model, params, windows)
    found = json.loads(report.read_text())
    assert found["tokens"] == len(ids) and found["text_bytes"] == len(text.encode())
    assert (found["length"], found["stride"]) == (32, 16)
    for name, value in expected.metrics().items():
        assert found[name] == pytest.approx(value, rel=1e-6)
    assert [row["weights"] for row in found["compared"]] == ["float32", "int8", "int4:32"]
    assert f"cross-entropy: {expected.nats_per_token:.5f} nats" in out
    assert re.search(r"^int4:32 .*%$", out, re.MULTILINE)
    # Bits of all weights, vectors in fp32 included.
    bits = [row["bits_per_weight"] for row in found["compared"]]
    assert bits[0] == 32 and 8 < bits[1] < 9 and 4.5 < bits[2] < 6.5


def test_documents_of_json_lines_on_a_mesh(capsys, trained, tmp_path):
    home, model, params, text, _ = trained
    lines = [text[:100], text[100:350]]
    file = tmp_path / "d.json.gz"
    file.write_bytes(gzip.compress("\n".join(json.dumps({"body": x}) for x in lines).encode()))
    report = tmp_path / "r.json"
    argv = (home / "run", "--jsonl", file, "--field", "body", "--json", report)
    code, out, _ = run(capsys, *argv, "--set", "mesh.fsdp=4", "--set", "mesh.tensor=2")
    assert code == 0 and "2 documents, 350 tokens, 350 bytes; 6 windows of 64 tokens" in out
    encode = load_tokenizer(home).encode
    texts = [TokenizedDocument(np.array(encode(x).ids), len(x)) for x in lines]
    expected = cross_entropy(model, params, cut_rolling_windows(model.config, texts, 95))
    found = json.loads(report.read_text())["nats_per_token"]
    assert found == pytest.approx(expected.nats_per_token, rel=1e-5)


def test_a_quantized_checkpoint(capsys, trained, tmp_path):
    home, *_ = trained
    made = tmp_path / "int4"
    assert cli.main(["convert", str(home / "run"), str(made), "--quantize", "int4"]) == 0
    report = tmp_path / "r.json"
    # By default it would compute in bfloat16 on a CPU, as decoding does.
    argv = ("--text", home / "page.txt", "--json", report, "--dtype", "float32")
    code, out, _ = run(capsys, made, *argv)
    assert "(computed in float32)" in out
    alone = json.loads(report.read_text())["nats_per_token"]
    run(capsys, home / "run", *argv, "--quantize", "int4")
    in_memory = json.loads(report.read_text())["compared"][1]["nats_per_token"]
    assert code == 0 and alone == pytest.approx(in_memory, rel=1e-6)
    code, _, err = run(capsys, made, *argv, "--quantize", "int8")
    assert code == 2 and "is quantized already (int4 in groups of 64" in err


def test_bad_input(capsys, trained, tmp_path, monkeypatch):
    home, model, params, _, _ = trained
    monkeypatch.setattr("btlm_jax.load", lambda *a, **k: pytest.fail("the weights were read"))
    save(tmp_path / "bare", model.config, params)
    files = {"empty.txt": b"", "latin.txt": b"caf\xe9", "one.txt": b"a", "two.txt": b"ab" * 40}
    files["fields.jsonl"] = b'{"text": "fine"}\n{"body": "x"}\n'
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    text = ("--text", tmp_path / "two.txt")
    for argv, message in {
        (tmp_path / "bare", *text): "no tokenizer.json",
        (home / "run",): "found neither --text nor --jsonl",
        (home / "run", "--text", tmp_path / "nowhere.txt"): "no such file",
        (home / "run", "--text", tmp_path / "empty.txt"): "empty.txt is empty",
        (home / "run", "--text", tmp_path / "latin.txt"): "latin.txt: not UTF-8",
        (home / "run", "--text", tmp_path / "one.txt"): "found 1 tokens, expected at least 2",
        (home / "run", "--text", tmp_path / "fields.jsonl"): "kind '.jsonl', expected '.txt'",
        (home / "run", "--jsonl", tmp_path / "fields.jsonl"): "fields.jsonl:2: no field 'text'",
        (home / "run", *text, "--length", "1"): "length: found 1",
        (home / "run", *text, "--length", "8", "--stride", "9"): "stride: found 9",
        (home / "run", *text, "--quantize", "int3"): "quantize: found 'int3'",
        (home / "run", *text, "--quantize", "int8", "--set", "mesh.fsdp=8"): "found a mesh",
        (home / "run", *text, "--eos", "</s>"): "no token '</s>'",
        (home / "run", *text, "--batch-size", "0"): "batch_size: found 0, expected at least 1",
        (
            home / "run",
            *text,
            "--batch-size",
            "3",
            "--set",
            "mesh.fsdp=2",
        ): "batch size 3 does",
        (home / "run", *text, "--json", tmp_path): "is a directory: choose another name",
    }.items():
        code, out, err = run(capsys, *argv)
        assert code == 2 and message in err and "Traceback" not in out + err, err
