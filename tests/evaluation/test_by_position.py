"""Loss by position against float64, and what is told of it against independent computations."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from btlm_jax import BTLM, BTLMConfig, cli, make_mesh, save
from btlm_jax.config import AlibiScaling
from btlm_jax.evaluation import by_position, by_position_report, context_extension
from btlm_jax.evaluation.by_position import (
    LossByPosition,
    PositionCurve,
    bin_means,
    loss_by_position,
)
from btlm_jax.evaluation.documents import TokenizedDocument
from btlm_jax.evaluation.long_windows import LongWindows
from btlm_jax.evaluation.perplexity import cross_entropy
from btlm_jax.evaluation.rolling_windows import cut_rolling_windows
from btlm_jax.model.attention_xla import QUERY_CHUNK
from btlm_jax.utils.progress import Progress
from support import golden, reference_numpy

KINDS = ("none", "fixed", "dynamic")


def documents(*lengths: int, vocab: int = 96) -> list[TokenizedDocument]:
    rng = np.random.default_rng(0)
    return [TokenizedDocument(rng.integers(0, vocab, n).astype(np.uint16), n) for n in lengths]


# Windows ------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(2, 20),
    st.integers(1, 9),
    st.none() | st.integers(1, 3),
    st.booleans(),
)
def test_windows_are_stretches_of_the_documents(sizes, length, most, each, concatenate):
    ids = np.arange(sum(sizes))
    texts = [TokenizedDocument(x, 1) for x in np.split(ids, np.cumsum(sizes)[:-1])]
    streams = [[999, *x.ids] for x in texts]
    if concatenate:
        streams = [[t for stream in streams for t in stream]]
    whole = [(len(s) - 1) // length for s in streams]
    if not concatenate and each:
        whole = [min(n, each) for n in whole]
    options = dict(max_windows=most, max_per_document=each, concatenate=concatenate)
    if not sum(whole):
        with pytest.raises(ValueError, match=f"length: found {length} tokens and documents of"):
            LongWindows(iter(texts), 999, length, **options)
        return
    windows = LongWindows(iter(texts), 999, length, **options)
    expected = [
        (s[i * length : (i + 1) * length], s[i * length + 1 : (i + 1) * length + 1])
        for s, n in zip(streams, whole, strict=True)
        for i in range(n)
    ]
    found = list(windows)
    assert [(w.inputs.tolist(), w.targets.tolist()) for w in found] == expected[:most]
    if concatenate:
        assert {w.group for w in found} == {0}
    else:  # tokens say of which document a window is
        ends = np.cumsum(sizes)
        assert [w.group for w in found] == [(w.targets[0] >= ends).sum() for w in found]
        if sum(whole) < most:
            assert windows.short_documents == sum(n < length for n in sizes)


def test_documents_are_read_as_they_are_needed():
    def endless():
        while True:
            yield documents(50)[0]

    assert len(list(LongWindows(endless(), 0, 20, max_windows=5))) == 5


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(length=1), "length: found 1, expected at least 2"),
        (dict(length=5, max_windows=0), "windows: found 0, expected at least 1"),
        (dict(length=5, max_per_document=0), "windows per document: found 0"),
        (dict(length=50), r"found 50 tokens and documents of at most 30, 60 in all.*concatenate"),
        (dict(length=90), r"found 90 tokens and documents of at most 30, 60 in all: .*length$"),
    ],
)
def test_windows_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        LongWindows(documents(30, 30), 0, **options)


# The loss -----------------------------------------------------------------------------------------


def by_witness(case: golden.Case, kind: str, inputs, targets, trained: int) -> np.ndarray:
    """Float64 [T]: each position from the shortest pass over a doubling that reaches it."""
    T = len(inputs)
    scaling = {
        "none": None,
        "fixed": {"type": "linear", "factor": T / trained},
        "dynamic": {"type": "linear", "train_seq_len": trained},
    }[kind]
    config = case.hf_config | {"alibi_scaling": scaling}
    found = np.zeros(T)
    for t in range(T):
        S = T
        if kind == "dynamic":
            S = trained
            while t >= S:
                S = min(2 * S, T)
        logits = reference_numpy.forward(case.weights, config, [inputs[:S]])["logits"][0, t]
        found[t] = -log_softmax(logits)[targets[t]]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_float64_computation(kind):
    case = golden.load("a2_btlm_mup_h32")
    windows = list(LongWindows(documents(60, 21), 2, 20))
    found = loss_by_position(
        case.model, case.params, LongWindows(documents(60, 21), 2, 20), trained=6, kinds=[kind],
        batch_size=3,
    )  # fmt: skip
    expected = np.stack([by_witness(case, kind, *w[:2], trained=6) for w in windows])
    (curve,) = found.curves
    assert found.count == len(windows) == 4 and found.windows.tolist() == [3, 1]
    # The model's logits are off by up to 5e-5 (test_model), so each token by at most twice that.
    assert np.abs(curve.nll - expected.sum(0)).max() < 4 * 1e-4
    assert np.abs(curve.squares - np.square(expected).sum(0)).max() < 4 * 2e-4 * expected.max()
    groups = np.add.reduceat(np.stack([expected[:3].sum(0), expected[3]]), found.edges[:-1], axis=1)
    assert np.abs(curve.group_sums - groups).max() < 20 * 3 * 1e-4


def test_kinds_are_not_alike():
    """Else the comparison above would hold of any of them."""
    case = golden.load("a2_btlm_mup_h32")
    window = next(iter(LongWindows(documents(21), 2, 20)))
    none, fixed, dynamic = (by_witness(case, k, *window[:2], trained=6) for k in KINDS)
    np.testing.assert_allclose(dynamic[:6], none[:6], atol=1e-12)
    np.testing.assert_allclose(dynamic[12:], fixed[12:], atol=1e-12)
    for a, b in ((dynamic[6:12], none[6:12]), (dynamic[6:12], fixed[6:12]), (none[1:], fixed[1:])):
        assert np.abs(a - b).min() > 1e-4


def test_its_mean_is_that_of_perplexity():
    case = golden.load("a2_btlm_mup_h32")
    texts = [d._replace(ids=d.ids[: len(d.ids) // 40 * 40]) for d in documents(90, 170, 45)]
    report = loss_by_position(
        case.model, case.params, LongWindows(texts, 2, 40), trained=10, kinds=("none", "fixed")
    )
    for curve in report.curves:
        model = context_extension.with_scaling_kind(case.model, curve.kind, 10, 40)
        expected = cross_entropy(
            model, case.params, cut_rolling_windows(model.config, texts, 2, length=40)
        )
        assert report.count * 40 == expected.tokens
        # fp32 sums, of another order.
        assert curve.nll.sum() == pytest.approx(expected.nats, rel=1e-6)


def test_a_mesh_measures_alike():
    model = BTLM(BTLMConfig.preset("tiny"))

    def measured(params, **options):
        windows = LongWindows(documents(130, 90, 300, vocab=512), 2, 80)
        return loss_by_position(model, params, windows, trained=20, kinds=["dynamic"], **options)

    expected = measured(model.init(jax.random.key(0)))
    for axes in (dict(data=2, context=2, tensor=2), dict(data=2, fsdp=4)):
        params = model.init(jax.random.key(0), mesh=make_mesh(**{"fsdp": 1} | axes))
        found = measured(params)
        for a, b in zip(found.curves, expected.curves, strict=True):
            np.testing.assert_allclose(a.nll, b.nll, rtol=1e-5)
            np.testing.assert_allclose(a.group_sums, b.group_sums, rtol=1e-5)
    with pytest.raises(ValueError, match="batch size 3 does not divide"):
        measured(params, batch_size=3)


def test_neither_logits_nor_scores_are_whole():
    """[T, V] would be 512 MiB here and [H, T, T] 4 GiB; the scores of one chunk are 128 MiB."""
    T, config = 16_384, dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=8192)
    model = BTLM(context_extension.with_scaling_kind(BTLM(config), "dynamic", 4096, T).config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    ids = jax.ShapeDtypeStruct((1, T), np.int32)
    compiled = (
        jax.jit(functools.partial(by_position.token_losses, model))
        .lower(params, ids, ids, jax.ShapeDtypeStruct((), np.int32))
        .compile()
    )
    chunk = config.n_head * QUERY_CHUNK * T
    found = re.findall(r"(?:f32|bf16|s32|pred)\[([\d,]+)\]", compiled.as_text())
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in found]
    assert max(sizes) <= chunk < T * config.vocab_size / 2
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * T * config.vocab_size


FOR_V5E = """
from btlm_jax.train.aot import topologies
topologies.prepare()
import functools
import jax
import jax.numpy as jnp
from btlm_jax import BTLM, BTLMConfig, make_mesh
from btlm_jax.evaluation import by_position
from btlm_jax.evaluation.context_extension import with_scaling_kind
from btlm_jax.train.step import abstract_weights

mesh = make_mesh(devices=topologies.devices(topologies.parse("v5e:1x1")))
model = with_scaling_kind(BTLM(BTLMConfig.preset("btlm-3b-8k")), "dynamic", 8192, 32768)

def array(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P())):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

params = abstract_weights(model, mesh)
params = jax.tree.map(lambda x: array(x.shape, jnp.bfloat16, x.sharding), params)
ids = array((1, 32768), jnp.int32)
read = jax.jit(functools.partial(by_position.token_losses, model))
memory = read.lower(params, ids, ids, array((), jnp.int32)).compile().memory_analysis()
print(memory.argument_size_in_bytes, memory.temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_32k_tokens_of_the_released_model_fit_one_chip():
    """Compiled for TPU v5e: 4.97 GiB of weights, 2.13 GiB of temporary arrays."""
    command = [sys.executable, "-c", FOR_V5E]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    arguments, temporary = (int(n) / 2**30 for n in out.split())
    assert 4.9 < arguments < 5.0 and temporary < 2.5


def test_what_is_not_finite_is_an_error(tiny):
    model, params = tiny
    windows = LongWindows([TokenizedDocument(np.full(20, 512), 20)], 2, 10)
    with pytest.raises(FloatingPointError, match="scaling 'none': found a loss of nan"):
        loss_by_position(model, params, windows, trained=5, kinds=["none"])


# Scaling ------------------------------------------------------------------------------------------


def test_scaling():
    model = BTLM(BTLMConfig.preset("tiny"))

    def scaling(kind, length, base=model, **options):
        return context_extension.with_scaling_kind(
            base, kind, 256, length, **options
        ).config.alibi_scaling

    assert [scaling(k, 1024) for k in KINDS] == [
        None, AlibiScaling(factor=4.0), AlibiScaling(train_seq_len=256)
    ]  # fmt: skip
    assert [scaling(k, 256) for k in KINDS] == [None] * 3
    # A prompt of the trained length is answered beyond it.
    dynamic = AlibiScaling(train_seq_len=256)
    assert [scaling(k, 256, new_tokens=1) for k in KINDS] == [None, None, dynamic]
    assert [scaling(k, 250, new_tokens=6) for k in KINDS] == [None] * 3
    assert scaling("fixed", 512, new_tokens=9) == AlibiScaling(factor=2.0)

    def having(own):
        return BTLM(dataclasses.replace(model.config, alibi_scaling=own))

    twice = having(AlibiScaling(factor=2.0))
    assert scaling("none", 1024, twice) == AlibiScaling(factor=2.0)
    assert scaling("fixed", 1024, twice) == AlibiScaling(factor=8.0)
    assert (
        context_extension.scaling_kinds(twice) == ("none", "fixed")
        and context_extension.scaling_kinds(model) == KINDS
    )
    with pytest.raises(ValueError, match=r"the fixed factor 2\.0"):
        scaling("dynamic", 1024, twice)
    assert scaling("none", 1024, having(AlibiScaling(train_seq_len=99))) is None


def test_trained_length():
    model = BTLM(BTLMConfig.preset("tiny"))
    assert (
        context_extension.trained_length(model) == 256
        and context_extension.trained_length(model, 64) == 64
    )
    with pytest.raises(ValueError, match="trained length: found 1"):
        context_extension.trained_length(model, 1)
    with pytest.raises(ValueError, match="found 'learned', expected 'alibi'"):
        context_extension.trained_length(golden.load("f_learned_gelu_mup").model)


def test_passes_and_bins():
    assert by_position.pass_lengths("dynamic", 1024, 4096) == (1024, 2048, 4096)
    assert by_position.pass_lengths("dynamic", 1000, 3500) == (1000, 2000, 3500)
    assert by_position.pass_lengths("fixed", 1024, 4096) == (4096,)
    for trained, length in ((1024, 4096), (6, 20), (100, 101), (8192, 32768), (1000, 7001)):
        edges = by_position.bin_edges(trained, length)
        assert edges[0] == 0 and edges[-1] == length and trained in edges
        assert (np.diff(edges) > 0).all()
        late = edges[edges > 50]
        assert (late[1:] / late[:-1] < 1.13).all()
    with pytest.raises(ValueError, match="length: found 64, expected more than the trained"):
        by_position.check_window_length(64, 64)


# What is told -------------------------------------------------------------------------------------


def report(groups: np.ndarray, edges, trained: int) -> LossByPosition:
    """Of losses [groups, T], a window each."""
    sums = np.add.reduceat(groups, edges[:-1], axis=1)
    curve = PositionCurve("none", (edges[-1],), groups.sum(0), np.square(groups).sum(0), sums)
    counts = np.ones(len(groups), int)
    return LossByPosition(trained, edges[-1], np.array(edges), counts, 0, (curve,))


def test_bins_and_their_errors():
    """With as many windows in each group, the error is that of a mean of independent groups."""
    losses = np.random.default_rng(0).gamma(2.0, 1.0, (7, 30))
    made = report(losses, [0, 2, 5, 10, 30], 5)
    found = bin_means(made, made.curves[0], [0, 5, 30])
    for x, (a, b) in zip(found, ((0, 5), (5, 30)), strict=True):
        means = losses[:, a:b].mean(1)
        assert (x.start, x.stop) == (a, b) and x.mean == pytest.approx(means.mean())
        assert x.error == pytest.approx(means.std(ddof=1) / 7**0.5)
    alone = report(losses[:1], [0, 5, 30], 5)
    assert np.isnan(bin_means(alone, alone.curves[0], [0, 5, 30])[0].error)


def test_windows_of_a_document_are_not_independent():
    """Copies of a window in one group weigh in the mean, and count as one in the error."""
    losses = np.random.default_rng(1).gamma(2.0, 1.0, (5, 8))
    one, times = report(losses, [0, 8], 4), np.array([1, 2, 3, 1, 5])
    sums = one.curves[0].group_sums * times[:, None]
    curve = dataclasses.replace(one.curves[0], group_sums=sums)
    (found,) = bin_means(dataclasses.replace(one, windows=times), curve, [0, 8])
    # A regression on a constant with errors clustered by group (CR1), token by token.
    tokens = np.repeat(losses, times, axis=0).ravel()
    group = np.repeat(np.arange(5), times * 8)
    mean = np.linalg.lstsq(np.ones((len(tokens), 1)), tokens, rcond=None)[0][0]
    scores = np.bincount(group, tokens - mean)
    assert found.mean == pytest.approx(mean, rel=1e-12)
    expected = (5 / 4 * scores @ scores) ** 0.5 / len(tokens)
    assert found.error == pytest.approx(expected, rel=1e-12)


def test_a_stream_has_no_errors(tiny, tmp_path, caplog):
    """Its windows are neighbours. And nobody knows how many there are before it ends."""
    model, params = tiny
    windows = LongWindows(documents(30, 41), 2, 10, max_windows=100, concatenate=True)
    with caplog.at_level("INFO"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_position, "Progress", functools.partial(Progress, every=0.0))
        found = loss_by_position(model, params, windows, trained=5, kinds=["none", "dynamic"])
    assert found.windows.tolist() == [7]
    assert all(np.isnan(x.error) for x in bin_means(found, found.curves[0], found.edges))
    assert "±" not in "".join(by_position_report.format_loss_by_position(found))
    summary = by_position_report.loss_by_position_json(found)["curves"][1]["summary_of_difference"]
    assert {x["error"] for x in summary} == {None}
    by_position_report.plot_loss_by_position(tmp_path / "a.png", found, "title")
    (line,) = (r.getMessage() for r in caplog.records if r.name == "btlm_jax.progress")
    assert line.startswith("evaluate: 7 window, ") and line.endswith("window/s, at most 100")


def test_report(tmp_path):
    losses = np.random.default_rng(0).gamma(2.0, 1.0, (7, 64))
    other = losses + np.random.default_rng(1).normal(0.1, 0.01, (7, 64))
    edges = [int(x) for x in by_position.bin_edges(16, 64)]
    made = report(losses, edges, 16)
    curve = dataclasses.replace(report(other, edges, 16).curves[0], kind="fixed")
    made = dataclasses.replace(made, curves=(*made.curves, curve))
    assert by_position.summary_edges(made) == [0, 2, 4, 8, 16, 23, 32, 45, 64]
    head, first, *_, last = by_position_report.format_loss_by_position(made)
    assert head.endswith("fixed, distances / 4 - plain ALiBi")
    assert first.split()[0] == "0-1"
    # The mean of the first, and of the other the paired difference.
    expected = []
    for x in (losses, other - losses):
        means = x[:, 45:].mean(1)
        expected += [means.mean(), 1.96 * means.std(ddof=1) / 7**0.5]
    place, mean, _, error, change, _, error_of_change = last.split()
    assert place == "45-63" and change.startswith("+0.1")
    found = [float(x) for x in (mean, error, change, error_of_change)]
    np.testing.assert_allclose(found, expected, atol=6e-5)
    assert expected[3] < expected[1] / 10
    one, two = json.loads(json.dumps(by_position_report.loss_by_position_json(made)))["curves"]
    np.testing.assert_allclose(one["mean"], losses.mean(0), atol=1e-6)
    np.testing.assert_allclose(one["deviation"], losses.std(0), atol=1e-6)
    np.testing.assert_allclose(two["mean"], other.mean(0), atol=1e-6)
    assert one["summary"][-1]["stop"] == 64
    last = two["summary_of_difference"][-1]
    np.testing.assert_allclose([last["mean"], 1.96 * last["error"]], expected[2:], atol=1e-9)
    by_position_report.plot_loss_by_position(tmp_path / "a" / "b.png", made, "title")
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG")


# The command --------------------------------------------------------------------------------------


def run(capsys, *argv):
    code = cli.main(["eval", "loss-by-position", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def write(path, *sizes: int):
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": "".join(map(chr, rng.integers(32, 127, n)))}) for n in sizes]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_command(capsys, of_bytes, bytes_checkpoint, tmp_path):
    model, params, tokenizer = of_bytes
    text = write(tmp_path / "t.jsonl", 150, 20, 64, 400)
    files = tmp_path / "out" / "r.json", tmp_path / "out" / "r.png"
    argv = [bytes_checkpoint, "--jsonl", text, "--trained-length", 16, "--windows-per-document", 3]
    code, out, _ = run(capsys, *argv, "--json", files[0], "--plot", files[1])
    assert code == 0 and "6 windows of 64 tokens from 3 documents; 1 shorter documents" in out
    found = json.loads(files[0].read_text())
    assert (found["length"], found["trained"], found["windows"]) == (64, 16, 6)
    assert files[1].stat().st_size > 10_000
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    ids = [TokenizedDocument(np.array(tokenizer.encode(x).ids), len(x)) for x in texts]
    expected = loss_by_position(
        model, params, LongWindows(ids, 256, 64, max_per_document=3), trained=16, kinds=KINDS
    )
    for curve, other in zip(found["curves"], expected.curves, strict=True):
        np.testing.assert_allclose(curve["mean"], other.nll / 6, atol=2e-6)
    # On a mesh, sequences split too; one kind.
    argv += ["--scaling", "fixed", "--set", "mesh.context=2"]
    argv += ["--set", "mesh.tensor=2", "--set", "mesh.data=2"]
    code, out, _ = run(capsys, *argv, "--json", files[0])
    assert code == 0 and "dynamic" not in out
    (curve,) = json.loads(files[0].read_text())["curves"]
    np.testing.assert_allclose(curve["mean"], expected.curves[1].nll / 6, rtol=1e-4)


def test_bad_input(capsys, of_bytes, bytes_checkpoint, tmp_path, monkeypatch):
    model, params, _ = of_bytes
    monkeypatch.setattr(
        "btlm_jax.checkpoint.checkpoint.load", lambda *a, **k: pytest.fail("the weights were read")
    )
    save(tmp_path / "bare", model.config, params)
    learned = golden.load("f_learned_gelu_mup")
    save(tmp_path / "learned", learned.config, learned.params)
    text = ("--jsonl", write(tmp_path / "t.jsonl", 90, 70))
    short = (*text, "--trained-length", 16)
    for argv, message in {
        (tmp_path / "bare", *text): "no tokenizer.json",
        (tmp_path / "learned", *text): "found 'learned', expected 'alibi'",
        (bytes_checkpoint,): "found neither --text nor --jsonl",
        (bytes_checkpoint, *text): "found 1024 tokens and documents of at most 90, 160 in all",
        (bytes_checkpoint, *text, "--length", 256): "expected more than the trained length of 256",
        (bytes_checkpoint, *text, "--trained-length", 30): "or concatenate them (--concatenate)",
        (bytes_checkpoint, *text, "--trained-length", 1): "trained length: found 1",
        (bytes_checkpoint, *text, "--trained-length", 9, "--windows", 0): "windows: found 0",
        (bytes_checkpoint, *short, "--batch-size", 0): "batch_size: found 0, expected at least 1",
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
        code, out, err = run(capsys, *argv)
        assert code == 2 and message in err and "Traceback" not in out + err, err
