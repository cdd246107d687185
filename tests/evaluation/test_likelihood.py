"""Log-likelihoods in batches against the float64 witness, one pair at a time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from btlm_jax import BTLM, BTLMConfig, make_mesh
from btlm_jax.config import AlibiScaling
from btlm_jax.evaluation import likelihood
from btlm_jax.evaluation.likelihood import ContinuationPair, group_by_inputs, score_rows
from btlm_jax.model.params import unstack_params
from btlm_jax.utils.compile_cache import count_compilations
from support import golden, reference_numpy


def witness_score(case: golden.Case, pair: ContinuationPair, max_length: int) -> tuple[float, bool]:
    """Returns (log-probability, whether greedy) of one pair, in float64."""
    inputs = np.array((pair.context + pair.continuation)[-(max_length + 1) :][:-1])
    named = {k: v.astype(np.float64) for k, v in case.weights.items()}
    logits = reference_numpy.forward(named, golden.reference_config(case.config), inputs[None])
    log_p = log_softmax(logits["logits"][0], -1)[-len(pair.continuation) :]
    after = np.array(pair.continuation)
    total = np.take_along_axis(log_p, after[:, None], 1).sum()
    return float(total), bool((log_p.argmax(-1) == after).all())


def random_pairs(
    rng: np.random.Generator, vocab: int, count: int = 16
) -> dict[int, ContinuationPair]:
    """Returns pairs of few lengths, because every width is a program."""
    pairs = {}
    for i in range(count):
        ids = rng.integers(0, vocab, rng.choice([2, 9, 32, 38, 60])).tolist()
        split = int(rng.integers(max(1, len(ids) - 20), len(ids)))
        pairs[i] = ContinuationPair(tuple(ids[:split]), tuple(ids[split:]))
    return pairs


def answers(model, params, pairs, max_length, **options):
    return dict(score_rows(model, params, group_by_inputs(pairs, max_length), **options))


@pytest.mark.parametrize("name", ["a2_btlm_mup_h32", "e_alibi_dynamic16", "f_learned_gelu_mup"])
def test_batches_score_like_single_pairs(name):
    case, max_length = golden.load(name), 39  # shorter than some pairs, and not a bucket
    pairs = random_pairs(np.random.default_rng(0), case.config.vocab_size)
    # Some continuations are greedy.
    for i in range(0, 6):
        context, _ = pairs[i]
        named = {k: v.astype(np.float64) for k, v in case.weights.items()}
        inputs = np.array(context)[None, -max_length:]
        config = golden.reference_config(case.config)
        logits = reference_numpy.forward(named, config, inputs)["logits"][0, -1]
        pairs[i] = ContinuationPair(context, (int(logits.argmax()),))
    expected = {i: witness_score(case, pair, max_length) for i, pair in pairs.items()}
    assert {greedy for _, greedy in expected.values()} == {True, False}
    scores = answers(case.model, case.params, pairs, max_length, batch_size=3)
    assert scores.keys() == pairs.keys()
    for i, (logprob, greedy) in expected.items():
        # Logits differ by up to 5e-5, each of the up to 20 terms by twice that.
        assert abs(scores[i].logprob - logprob) < 1e-4 * (1 + len(pairs[i].continuation))
        assert scores[i].is_greedy == greedy


def test_a_context_is_read_once_for_all_answers():
    case = golden.load("a2_btlm_mup_h32")
    context = tuple(range(30))
    pairs = {i: ContinuationPair(context, (i,)) for i in range(5)}
    pairs["longer"] = ContinuationPair(context, (1, 2, 3))
    pairs["the same split elsewhere"] = ContinuationPair((*context, 1), (2, 3))
    rows = group_by_inputs(pairs, 128)
    assert len(rows) == 2
    scores = dict(score_rows(case.model, case.params, rows))
    for key, pair in pairs.items():
        assert abs(scores[key].logprob - witness_score(case, pair, 128)[0]) < 5e-4


def test_few_widths_are_compiled(tiny):
    model, params = tiny
    rng = np.random.default_rng(0)
    pairs = {
        i: ContinuationPair(tuple(rng.integers(0, 512, n)), (1,))
        for i, n in enumerate(range(1, 50))
    }
    with count_compilations() as compilations:
        answers(model, params, pairs, 48, batch_size=4)
    assert compilations.count == 3  # widths of 32, 40 and 48


def test_full_logits_are_never_materialized_nor_returned():
    model = BTLM(dataclasses.replace(BTLMConfig.preset("tiny"), n_layer=1, vocab_size=8192))
    params = jax.eval_shape(model.init, jax.random.key(0))
    count, width, vocab = 256, 32, model.config.vocab_size
    ids, lengths, lasts = (jax.ShapeDtypeStruct(x, jnp.int32)
                           for x in ((count, width), (count,), (count, 4)))  # fmt: skip
    memory = (
        likelihood._score_inputs.lower(model, params, ids, lengths, lasts)
        .compile()
        .memory_analysis()
    )
    # fp32 logits of all tokens would be 256 MiB; a chunk of 1024 is 32 MiB, with some copies.
    assert memory.temp_size_in_bytes < count * width * vocab * 4 / 2
    assert memory.output_size_in_bytes < 3 * count * width * 4


@pytest.mark.parametrize(
    "axes", [dict(data=8), dict(data=2, fsdp=2, tensor=2), dict(context=4, data=2)]
)
def test_a_mesh_gives_the_same_scores(axes):
    model = BTLM(BTLMConfig.preset("tiny"))
    pairs = random_pairs(np.random.default_rng(1), 512, 13)
    expected = answers(model, model.init(jax.random.key(0)), pairs, 32)
    params = model.init(jax.random.key(0), mesh=make_mesh(**axes))
    scores = answers(model, params, pairs, 32, batch_size=5)
    for i, (logprob, greedy) in expected.items():
        assert abs(scores[i].logprob - logprob) < 2e-5 * (1 + len(pairs[i].continuation))
        assert scores[i].is_greedy == greedy


def test_unstacked_weights_give_the_same_scores(tiny):
    model, params = tiny
    pairs = random_pairs(np.random.default_rng(2), 512, 5)
    scores = answers(model, unstack_params(model.config, params), pairs, 32)
    for i, (logprob, _) in answers(model, params, pairs, 32).items():
        assert abs(scores[i].logprob - logprob) < 2e-5 * (1 + len(pairs[i].continuation))


def test_bad_pairs_and_sizes_are_refused(tiny, caplog):
    model, params = tiny
    with pytest.raises(ValueError, match="continuation of 0, expected at least one each"):
        group_by_inputs({0: ContinuationPair((1,), ())}, 10)
    with pytest.raises(ValueError, match="continuation of 11 tokens, expected at most the 10"):
        group_by_inputs({0: ContinuationPair((1,), (2,) * 11)}, 10)
    with pytest.raises(ValueError, match="batch_size: found 0"):
        score_rows(model, params, {}, batch_size=0)
    group_by_inputs(
        {0: ContinuationPair((1,) * 10, (2,)), 1: ContinuationPair((1,) * 11, (2,))}, 10
    )
    assert "1 of 2 contexts are longer than max_length = 10" in caplog.text
    assert answers(model, params, {}, 10) == {}


def test_rows_of_different_lengths_share_no_batch_under_dynamic_scaling(tiny):
    model, params = tiny
    scaled = dataclasses.replace(model.config, alibi_scaling=AlibiScaling(train_seq_len=4))
    model = dataclasses.replace(model, config=scaled)
    pairs = {n: ContinuationPair(tuple(range(n)), (1,)) for n in (3, 9, 20)}
    together = answers(model, params, pairs, 128)
    for n, pair in pairs.items():
        alone = answers(model, params, {n: pair}, 128)[n]
        assert abs(alone.logprob - together[n].logprob) < 1e-5
