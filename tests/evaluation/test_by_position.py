"""Loss by position against the float64 witness."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from btlm_jax import BTLM, BTLMConfig, make_mesh
from btlm_jax.evaluation import by_position, context_extension
from btlm_jax.evaluation.by_position import (
    loss_by_position,
)
from btlm_jax.evaluation.documents import TokenizedDocument
from btlm_jax.evaluation.long_windows import LongWindows
from btlm_jax.evaluation.perplexity import cross_entropy
from btlm_jax.evaluation.rolling_windows import cut_rolling_windows
from btlm_jax.model.attention_xla import QUERY_CHUNK
from support import golden, reference_numpy
from support.documents import random_documents

KINDS = ("none", "fixed", "dynamic")


def by_witness(case: golden.Case, kind: str, inputs, targets, trained: int) -> np.ndarray:
    """Returns float64 [T]: each position from the shortest pass over a doubling that reaches it."""
    T = len(inputs)
    scaling = {
        "none": None,
        "fixed": {"type": "linear", "factor": T / trained},
        "dynamic": {"type": "linear", "train_seq_len": trained},
    }[kind]
    config = case.hf_config | {"alibi_scaling": scaling}
    losses = np.zeros(T)
    for t in range(T):
        S = T
        if kind == "dynamic":
            S = trained
            while t >= S:
                S = min(2 * S, T)
        logits = reference_numpy.forward(case.weights, config, [inputs[:S]])["logits"][0, t]
        losses[t] = -log_softmax(logits)[targets[t]]
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_the_float64_computation(kind):
    case = golden.load("a2_btlm_mup_h32")
    windows = list(LongWindows(random_documents(60, 21), 2, 20))
    report = loss_by_position(
        case.model,
        case.params,
        LongWindows(random_documents(60, 21), 2, 20),
        trained=6,
        kinds=[kind],
        batch_size=3,
    )
    expected = np.stack([by_witness(case, kind, *w[:2], trained=6) for w in windows])
    (curve,) = report.curves
    assert report.count == len(windows) == 4 and report.windows.tolist() == [3, 1]
    # The model's logits are off by up to 5e-5 (test_model), so each token by at most twice that.
    assert np.abs(curve.nll - expected.sum(0)).max() < 4 * 1e-4
    assert np.abs(curve.squares - np.square(expected).sum(0)).max() < 4 * 2e-4 * expected.max()
    groups = np.add.reduceat(
        np.stack([expected[:3].sum(0), expected[3]]), report.edges[:-1], axis=1
    )
    assert np.abs(curve.group_sums - groups).max() < 20 * 3 * 1e-4


def test_kinds_of_scaling_differ():
    """Otherwise the comparison above would hold for any of them."""
    case = golden.load("a2_btlm_mup_h32")
    window = next(iter(LongWindows(random_documents(21), 2, 20)))
    none, fixed, dynamic = (by_witness(case, k, *window[:2], trained=6) for k in KINDS)
    np.testing.assert_allclose(dynamic[:6], none[:6], atol=1e-12)
    np.testing.assert_allclose(dynamic[12:], fixed[12:], atol=1e-12)
    for a, b in ((dynamic[6:12], none[6:12]), (dynamic[6:12], fixed[6:12]), (none[1:], fixed[1:])):
        assert np.abs(a - b).min() > 1e-4


def test_the_mean_is_that_of_perplexity():
    case = golden.load("a2_btlm_mup_h32")
    texts = [d._replace(ids=d.ids[: len(d.ids) // 40 * 40]) for d in random_documents(90, 170, 45)]
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


def test_a_mesh_gives_the_same_losses():
    model = BTLM(BTLMConfig.preset("tiny"))

    def measured(params, **options):
        windows = LongWindows(random_documents(130, 90, 300, vocab=512), 2, 80)
        return loss_by_position(model, params, windows, trained=20, kinds=["dynamic"], **options)

    expected = measured(model.init(jax.random.key(0)))
    for axes in (dict(data=2, context=2, tensor=2), dict(data=2, fsdp=4)):
        params = model.init(jax.random.key(0), mesh=make_mesh(**{"fsdp": 1} | axes))
        report = measured(params)
        for a, b in zip(report.curves, expected.curves, strict=True):
            np.testing.assert_allclose(a.nll, b.nll, rtol=1e-5)
            np.testing.assert_allclose(a.group_sums, b.group_sums, rtol=1e-5)
    with pytest.raises(ValueError, match="batch size 3 does not divide"):
        measured(params, batch_size=3)


def test_full_logits_and_scores_are_never_materialized():
    """[T, V] would be 512 MiB here and [H, T, T] 4 GiB; the scores of one chunk are 128 MiB."""
    T, config = 16_384, dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=8192)
    model = BTLM(context_extension.with_scaling_kind(BTLM(config), "dynamic", 4096, T).config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    ids = jax.ShapeDtypeStruct((1, T), np.int32)
    compiled = (
        jax.jit(functools.partial(by_position.token_losses, model.runtime(params)))
        .lower(params, ids, ids, jax.ShapeDtypeStruct((), np.int32))
        .compile()
    )
    chunk = config.n_head * QUERY_CHUNK * T
    shapes = re.findall(r"(?:f32|bf16|s32|pred)\[([\d,]+)\]", compiled.as_text())
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in shapes]
    assert max(sizes) <= chunk < T * config.vocab_size / 2
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * T * config.vocab_size


FOR_V5E = """
from btlm_jax.train.aot import topologies
topologies.prepare_compiler()
import functools
import jax
import jax.numpy as jnp
from btlm_jax import BTLM, BTLMConfig, make_mesh
from btlm_jax.evaluation import by_position
from btlm_jax.evaluation.context_extension import with_scaling_kind
from btlm_jax.train.step import abstract_weights

mesh = make_mesh(devices=topologies.topology_devices(topologies.parse_topology("v5e:1x1")))
model = with_scaling_kind(BTLM(BTLMConfig.preset("btlm-3b-8k")), "dynamic", 8192, 32768)

def array(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P())):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

params = abstract_weights(model, mesh)
params = jax.tree.map(lambda x: array(x.shape, jnp.bfloat16, x.sharding), params)
ids = array((1, 32768), jnp.int32)
read = jax.jit(functools.partial(by_position.token_losses, model.runtime(params)))
memory = read.lower(params, ids, ids, array((), jnp.int32)).compile().memory_analysis()
print(memory.argument_size_in_bytes, memory.temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_32k_tokens_of_the_released_model_fit_one_chip():
    """Compiled for TPU v5e: 4.97 GiB of weights, 3.06 GiB of temporary arrays.

    These are libtpu 0.0.50's, of JAX 0.12; libtpu 0.0.42 of JAX 0.10 took 2.13 GiB.
    """
    command = [sys.executable, "-c", FOR_V5E]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    arguments, temporary = (int(n) / 2**30 for n in out.split())
    assert 4.9 < arguments < 5.0 and temporary < 3.3


def test_a_loss_that_is_not_finite_is_an_error(tiny):
    model, params = tiny
    windows = LongWindows([TokenizedDocument(np.full(20, 512), 20)], 2, 10)
    with pytest.raises(FloatingPointError, match="scaling 'none': found a loss of nan"):
        loss_by_position(model, params, windows, trained=5, kinds=["none"])


def test_passes_double_and_bins_grow_with_the_position():
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
