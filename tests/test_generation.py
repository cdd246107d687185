"""Generation against transformers' token sequences, and the sampling rules."""

from __future__ import annotations

import dataclasses
import logging

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from btlm_jax import BTLM, BTLMConfig, generate, make_mesh, sharding, weights
from btlm_jax.generation.sampling import Sampling, choose, warp

FP32 = [n for n in cases.NAMES if n != "g_bf16"]


@pytest.fixture(params=FP32)
def fp32_case(request):
    return cases.load(request.param)


def test_greedy_is_transformers(fp32_case):
    c = fp32_case
    got = generate(c.model, c.params, c["gen/prompt"], max_new_tokens=20, eos_token_id=96)
    np.testing.assert_array_equal(got, c["gen/greedy/sequences"])


def test_greedy_batches_are_transformers(fp32_case):
    c = fp32_case
    common = dict(attention_mask=c["gen/prompt_batch_mask"], max_new_tokens=20, pad_token_id=96)
    # "noeos" was made with the configuration's EOS, which no prompt leads to soon.
    for name, eos in (("noeos", "config"), ("eos", int(c["gen/eos_used"]))):
        got = generate(c.model, c.params, c["gen/prompt_batch"], eos_token_id=eos, **common)
        np.testing.assert_array_equal(got, c[f"gen/greedy_batch_{name}/sequences"])


def test_a_mesh_gives_the_same_tokens():
    case = cases.load("i_untied")
    # Three rows on a batch axis of four: generate fills the batch up and drops the rest. The
    # vocabulary of 97 is padded to 98.
    mesh, model = make_mesh(fsdp=4, tensor=2), case.model
    pad = sharding.padding(model.config, mesh)
    shardings = weights.flatten(sharding.param_shardings(model.config, mesh, pad=pad))
    sharded = {}
    for w in weights.table(model.config):
        x = np.asarray(weights.flatten(case.params)[w.path])
        target = weights.stacked_shape(w, model.config, pad)
        x = np.pad(x, [(0, n - m) for m, n in zip(x.shape, target, strict=True)])
        sharded[w.path] = jax.device_put(x, shardings[w.path])
    got = generate(
        model,
        weights.unflatten(sharded),
        case["gen/prompt_batch"],
        attention_mask=case["gen/prompt_batch_mask"],
        eos_token_id=int(case["gen/eos_used"]),
        pad_token_id=96,
    )
    np.testing.assert_array_equal(got, case["gen/greedy_batch_eos/sequences"])


def test_filling_rows_do_not_prolong_a_batch():
    model = BTLM(BTLMConfig.preset("tiny"))
    how = dict(max_new_tokens=30, do_sample=True, temperature=3.0, eos_token_id=list(range(40)))
    off, on = (model.init(jax.random.key(0), mesh=m) for m in (None, make_mesh(fsdp=8)))
    for seed in range(4):
        alone = generate(model, off, np.array([[5, 6]]), seed=seed, **how)
        np.testing.assert_array_equal(
            generate(model, on, np.array([[5, 6]]), seed=seed, **how), alone
        )


def test_sampling_is_repeatable_and_seeded(tiny):
    model, params = tiny
    prompt = np.array([[5, 6, 7], [5, 6, 7]])
    how = dict(do_sample=True, max_new_tokens=12, eos_token_id=None)
    a, b = (generate(model, params, prompt, seed=1, **how) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, generate(model, params, prompt, seed=2, **how))
    assert not np.array_equal(a[0], a[1])  # rows draw from keys of their own
    alone = generate(model, params, prompt[:1], seed=1, **how)
    np.testing.assert_array_equal(alone[0], a[0])


def test_top_k_of_one_is_greedy(tiny):
    model, params = tiny
    prompt = np.array([[1, 2, 3]])
    greedy = generate(model, params, prompt, eos_token_id=None)
    for how in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4), dict(temperature=1e-29)):
        drawn = generate(model, params, prompt, do_sample=True, eos_token_id=None, **how)
        np.testing.assert_array_equal(drawn, greedy)


def test_equals_full_forward_passes(tiny):
    """Every greedy token is the argmax of a forward pass without a cache."""
    model, params = tiny
    out = generate(model, params, np.array([[3, 1, 4]]), max_new_tokens=8, eos_token_id=None)
    logits = model.apply(params, out)
    np.testing.assert_array_equal(np.argmax(logits, -1)[0, 2:-1], out[0, 3:])


def test_several_eos_ids_and_padding(tiny):
    model, params = tiny
    prompt = np.array([[3, 1, 4]])
    free = generate(model, params, prompt, max_new_tokens=8, eos_token_id=None)
    third = int(free[0, 5])
    first = int(np.argmax(free[0, 3:] == third)) + 4
    out = generate(model, params, prompt, max_new_tokens=8, eos_token_id=[511, third])
    np.testing.assert_array_equal(out, free[:, :first])  # the EOS is kept


# Sampling rules, on the distributions themselves --------------------------------------------------

LOGITS = jnp.log(jnp.array([[0.4, 0.3, 0.1, 0.1, 0.1], [0.05, 0.05, 0.8, 0.05, 0.05]]))


def kept(**how) -> list[list[int]]:
    return [list(np.flatnonzero(np.isfinite(r))) for r in warp(LOGITS, Sampling(True, **how))]


def test_top_k_keeps_ties():
    assert kept(top_k=2) == [[0, 1], [0, 1, 2, 3, 4]]
    assert kept(top_k=3) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert kept(top_k=0) == kept(top_k=50) == [[0, 1, 2, 3, 4]] * 2


def test_top_p_reaches_p():
    assert kept(top_k=0, top_p=0.65) == [[0, 1], [2]]
    assert kept(top_k=0, top_p=0.3) == [[0], [2]]
    assert kept(top_k=0, top_p=1e-9) == [[0], [2]]


def test_temperature_then_filters():
    got = jax.nn.softmax(warp(LOGITS, Sampling(True, temperature=0.5, top_k=2)), -1)[0]
    np.testing.assert_allclose(got, np.array([16, 9, 0, 0, 0]) / 25, atol=1e-6)


def test_draws_follow_the_distribution():
    n = 4000
    keys = jax.random.split(jax.random.key(0), n)
    sampling = Sampling(True, top_k=0)
    drawn = choose(jnp.repeat(LOGITS[:1], n, 0), sampling, keys)
    counts = np.bincount(drawn, minlength=5)
    p = np.exp(np.asarray(LOGITS[0], np.float64))
    assert stats.chisquare(counts, n * p / p.sum()).pvalue > 1e-3


# Bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, kwargs, message",
    [
        (np.zeros((1, 0), int), {}, "no empty prompt"),
        (np.array([[1, 512]]), {}, "found ids from 1 to 512, expected 0 to 511"),
        (np.array([[1, -1]]), {}, "found ids from -1"),
        (np.array([[1.5, 2.0]]), {}, "found dtype float64"),
        (np.array([[1, 2]]), dict(attention_mask=np.array([[1, 0]])), "pad prompts on the left"),
        (np.array([[1, 2]]), dict(attention_mask=np.array([[1]])), "attention_mask: found shape"),
        (np.array([[1, 2]]), dict(max_new_tokens=0), "max_new_tokens: found 0"),
        (np.array([[1, 2]]), dict(cache_length=10), "need 22 cache slots, found cache_length=10"),
        (np.array([[1, 2]]), dict(do_sample=True, temperature=0.0), "temperature: found 0.0"),
        (np.array([[1, 2]]), dict(do_sample=True, top_k=-1), "top_k: found -1"),
        (np.array([[1, 2]]), dict(do_sample=True, top_p=0.0), "top_p: found 0.0"),
        (np.array([[1, 2]]), dict(eos_token_id=np.array([1, 512])), r"eos_token_id: found \[512\]"),
        (np.array([[1, 2]]), dict(eos_token_id="eos"), "eos_token_id: found 'eos'"),
    ],
)
def test_bad_arguments(tiny, prompt, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate(*tiny, prompt, **kwargs)


def test_beyond_the_trained_context(tiny, caplog):
    model, params = tiny
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, n_positions=8))
    with caplog.at_level(logging.WARNING):
        generate(short, params, np.array([[1, 2]]), max_new_tokens=8)
    assert "10 tokens exceed the trained context of 8" in caplog.text
    learned = cases.load("f_learned_gelu_mup")
    with pytest.raises(ValueError, match="exceed the 64 learned positions"):
        generate(learned.model, learned.params, np.ones((1, 60), int), max_new_tokens=5)
