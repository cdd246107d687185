"""Generation against transformers' token sequences, and the sampling rules."""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from btlm_jax import BTLM, BTLMConfig, generate, load_tokenizer, make_mesh, score
from btlm_jax.generation import prompts
from btlm_jax.model import sharding, weights
from btlm_jax.model.params import flatten_tree, unflatten_tree
from btlm_jax.utils.compile_cache import count_compilations
from support import golden, gpt2

FP32 = [n for n in golden.NAMES if n != "g_bf16"]


@pytest.fixture(params=FP32)
def fp32_case(request):
    return golden.load(request.param)


def test_greedy_is_transformers(fp32_case):
    c = fp32_case
    how = dict(max_new_tokens=20, eos_token_id=96)
    for name, more in (("greedy", {}), ("greedy_ngram2", dict(no_repeat_ngram_size=2))):
        got = generate(c.model, c.params, c["gen/prompt"], **how, **more)
        np.testing.assert_array_equal(got, c[f"gen/{name}/sequences"])


def test_greedy_batches_are_transformers(fp32_case):
    c = fp32_case
    common = dict(attention_mask=c["gen/prompt_batch_mask"], max_new_tokens=20, pad_token_id=96)
    # "noeos" was made with the configuration's EOS, which no prompt leads to soon.
    for name, eos in (("noeos", "config"), ("eos", int(c["gen/eos_used"]))):
        got = generate(c.model, c.params, c["gen/prompt_batch"], eos_token_id=eos, **common)
        np.testing.assert_array_equal(got, c[f"gen/greedy_batch_{name}/sequences"])


BEAMS = dict(
    num_beams=5,
    no_repeat_ngram_size=2,
    early_stopping=True,
    max_new_tokens=20,
    pad_token_id=96,
    return_dict_in_generate=True,
)


def test_beams_are_transformers(fp32_case):
    """The first example of the model card: all five beams, and their scores."""
    c = fp32_case
    for name, eos in (("", 96), ("_eos", int(c["gen/eos_used_beam"]))):
        got = generate(
            c.model, c.params, c["gen/prompt"], eos_token_id=eos, num_return_sequences=5, **BEAMS
        )
        np.testing.assert_array_equal(got.sequences, c[f"gen/beam5_ngram2{name}/sequences"])
        expected = c[f"gen/beam5_ngram2{name}/scores"]
        np.testing.assert_allclose(got.sequences_scores, expected, atol=1e-5)  # measured 2e-6


def test_batches_of_beams_are_transformers(fp32_case):
    c = fp32_case
    ids, mask = c["gen/prompt_batch"], c["gen/prompt_batch_mask"]
    how = dict(eos_token_id=int(c["gen/eos_used"])) | BEAMS
    got = generate(c.model, c.params, ids, attention_mask=mask, **how)
    np.testing.assert_array_equal(got.sequences, c["gen/beam5_ngram2_batch_eos/sequences"])
    expected = c["gen/beam5_ngram2_batch_eos/scores"]
    np.testing.assert_allclose(got.sequences_scores, expected, atol=1e-5)


@pytest.fixture(scope="module")
def on_a_mesh():
    """i_untied on a mesh: its vocabulary of 97 is padded to 98, a batch of three to four."""
    case = golden.load("i_untied")
    mesh, model = make_mesh(fsdp=4, tensor=2), case.model
    pad = sharding.param_padding(model.config, mesh)
    shardings = flatten_tree(sharding.param_shardings(model.config, mesh, pad=pad))
    sharded = {}
    for w in weights.weight_table(model.config):
        x = np.asarray(flatten_tree(case.params)[w.path])
        target = weights.stacked_shape(w, model.config, pad)
        x = np.pad(x, [(0, n - m) for m, n in zip(x.shape, target, strict=True)])
        sharded[w.path] = jax.device_put(x, shardings[w.path])
    return case, unflatten_tree(sharded)


@pytest.mark.parametrize("how", [{}, BEAMS], ids=["greedy", "beams"])
def test_a_mesh_gives_the_same_tokens(on_a_mesh, how):
    case, sharded = on_a_mesh
    got = generate(
        case.model,
        sharded,
        case["gen/prompt_batch"],
        attention_mask=case["gen/prompt_batch_mask"],
        eos_token_id=int(case["gen/eos_used"]),
        **dict(pad_token_id=96) | how,
    )
    name = "beam5_ngram2_batch_eos" if how else "greedy_batch_eos"
    np.testing.assert_array_equal(got.sequences if how else got, case[f"gen/{name}/sequences"])


def test_filling_rows_do_not_prolong_a_batch():
    model = BTLM(BTLMConfig.preset("tiny"))
    how = dict(max_new_tokens=30, do_sample=True, temperature=3.0, eos_token_id=list(range(40)))
    off, on = (model.init(jax.random.key(0), mesh=m) for m in (None, make_mesh(fsdp=8)))
    for seed in range(4):
        alone = generate(model, off, np.array([[5, 6]]), seed=seed, **how)
        np.testing.assert_array_equal(
            generate(model, on, np.array([[5, 6]]), seed=seed, **how), alone
        )


def test_several_rows_of_a_prompt_on_split_sequences():
    """On a mesh whose context axis decoding leaves alone."""
    model, ids = BTLM(BTLMConfig.preset("tiny")), np.array([[5, 6, 7], [8, 9, 10], [1, 2, 3]])
    mesh = make_mesh(context=2, data=2, tensor=2)
    off, on = (model.init(jax.random.key(0), mesh=m) for m in (None, mesh))
    how = dict(max_new_tokens=6, do_sample=True, num_return_sequences=3, eos_token_id=None)
    np.testing.assert_array_equal(generate(model, on, ids, **how), generate(model, off, ids, **how))


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


@pytest.mark.parametrize("number", range(24))
def test_answers_recorded_from_transformers(number):
    """Greedy (even) and beams (odd), with random options: see gpt2_cases."""
    case = gpt2.recorded()[number]
    got = gpt2.answer(case)
    np.testing.assert_array_equal(got.sequences, case["sequences"])
    if number % 2:
        scores = case["sequences_scores"]
        np.testing.assert_allclose(got.sequences_scores, scores, atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(got.beam_indices, case["beam_indices"])


def test_one_program_per_bucket(tiny):
    model, params = tiny
    how = dict(num_beams=2, eos_token_id=3)

    def compiled(prompt_length, new, **more):
        with count_compilations() as found:
            ids = np.arange(prompt_length)[None] % 500
            out = generate(model, params, ids, max_new_tokens=new, **how | more)
        assert prompt_length < out.shape[1] <= prompt_length + new
        return found.count

    compiled(5, 4)
    for length, new in ((6, 4), (31, 1), (1, 31), (9, 12)):  # prompt and all within 32 slots
        assert compiled(length, new, seed=length, min_new_tokens=1) == 0, (length, new)
    assert compiled(33, 3) == 3  # 33 of 40: reading, beginning, going on
    assert compiled(32, 8) == compiled(33, 7) == 0
    assert compiled(33, 33) == 2  # another bucket of new tokens: nothing to read anew


def test_buckets():
    assert [prompts.bucket_length(n) for n in (1, 32, 33, 40, 41, 65, 8192, 8193)] == [
        32, 32, 40, 40, 48, 80, 8192, 10240,
    ]  # fmt: skip
    for n in range(1, 5000):
        assert n <= prompts.bucket_length(n) <= max(32, 1.25 * n)


def test_rows_draw_alone_as_in_a_batch(tiny):
    model, params = tiny
    ids = np.array([[0, 0, 7, 8], [1, 2, 3, 4], [0, 5, 6, 9]])
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    for how in (dict(), dict(num_return_sequences=2), dict(num_beams=3)):
        how |= dict(do_sample=True, max_new_tokens=10, eos_token_id=None, top_k=0)
        batch = generate(model, params, ids, attention_mask=mask, seed=[4, 9, 2**32 - 1], **how)
        batch = batch.reshape(3, -1, 14)
        for i, seed in enumerate((4, 9, 2**32 - 1)):
            left = int(4 - mask[i].sum())
            alone = generate(model, params, ids[i : i + 1, left:], seed=seed, **how)
            np.testing.assert_array_equal(batch[i, :, left:], alone)
        assert how.get("num_return_sequences") is None or (batch[:, 0] != batch[:, 1]).any()


def test_scores_and_logprobs(tiny):
    """Of greedy rows with processors: against `score`, and forward passes."""
    model, params = tiny
    ids = np.array([[3, 1, 4], [1, 5, 9]])
    how = dict(max_new_tokens=9, eos_token_id=None, no_repeat_ngram_size=1)
    out = generate(
        model, params, ids, return_dict_in_generate=True, output_scores=True, output_logits=True,
        **how,
    )  # fmt: skip
    logits = np.asarray(model.apply(params, out.sequences))[:, 2:-1].swapaxes(0, 1)
    np.testing.assert_allclose(out.logits, logits, atol=2e-5)  # fp32, summed in another order
    np.testing.assert_array_equal(out.scores.argmax(-1).T, out.sequences[:, 3:])
    assert np.isneginf(out.scores).sum((0, 2)).tolist() == [sum(range(3, 12))] * 2
    np.testing.assert_allclose(out.logprobs, score(model, params, out.sequences)[:, 3:], atol=2e-5)


def test_logprobs_of_beams(tiny):
    model, params = tiny
    free = generate(model, params, np.array([[3, 1, 4]]), max_new_tokens=8, eos_token_id=None)
    out = generate(
        model,
        params,
        np.array([[3, 1, 4]]),
        max_new_tokens=8,
        eos_token_id=int(free[0, 5]),
        num_beams=4,
        num_return_sequences=4,
        length_penalty=0.5,
        return_dict_in_generate=True,
        output_scores=True,
    )
    new = (~np.isnan(out.logprobs)).sum(1)
    assert len(set(new)) > 1  # some end early, and are filled up
    np.testing.assert_allclose(
        np.nansum(out.logprobs, 1) / new**0.5, out.sequences_scores, rtol=1e-5
    )
    for row, n in enumerate(new):
        expected = score(model, params, out.sequences[row : row + 1, : 3 + n])[0, 3:]
        np.testing.assert_allclose(out.logprobs[row, :n], expected, atol=2e-5)
        steps = [
            out.scores[t, out.beam_indices[row, t], out.sequences[row, 3 + t]] for t in range(n)
        ]
        np.testing.assert_allclose(steps, expected, atol=2e-5)


def test_user_processors(tiny):
    model, params = tiny

    def successor(ids, length, scores):
        """Only the last token plus one."""
        last = jnp.take_along_axis(ids, length[:, None] - 1, 1)
        return jnp.where(jnp.arange(scores.shape[1]) == last + 1, scores, -jnp.inf)

    for how in (dict(), dict(do_sample=True), dict(num_beams=2)):
        out = generate(
            model, params, np.array([[7, 40], [5, 90]]), max_new_tokens=5, eos_token_id=None,
            logits_processor=successor, **how,
        )  # fmt: skip
        np.testing.assert_array_equal(out[:, 2:], [[41, 42, 43, 44, 45], [91, 92, 93, 94, 95]])


def test_stop_strings_end_rows(checkpoint_dir):
    c = golden.load("a2_btlm_mup_h32")
    tokenizer = load_tokenizer(checkpoint_dir)
    ids = c["gen/prompt_batch"][:2, 4:]
    mask = c["gen/prompt_batch_mask"][:2, 4:]
    how = dict(attention_mask=mask, eos_token_id=None, pad_token_id=95)
    free = generate(c.model, c.params, ids, **how)
    text = tokenizer.decode(free[0, 8:].tolist())
    stop = text[4:7]
    end = 8 + text.index(stop) + 3
    assert stop not in tokenizer.decode(free[1].tolist())
    out = generate(c.model, c.params, ids, stop_strings=stop, tokenizer=tokenizer, **how)
    np.testing.assert_array_equal(out[1], free[1])
    np.testing.assert_array_equal(out[0, :end], free[0, :end])
    assert (out[0, end:] == 95).all()


def test_padding_is_inferred_unless_it_is_eos(tiny):
    model, params = tiny
    ids, mask = np.array([[9, 9, 7, 8], [1, 2, 3, 4]]), np.array([[0, 0, 1, 1], [1, 1, 1, 1]])

    def logprobs(mask, eos):
        how = dict(pad_token_id=9, max_new_tokens=2, return_dict_in_generate=True)
        return generate(model, params, ids, attention_mask=mask, eos_token_id=eos, **how).logprobs

    masked, plain = logprobs(mask, None), logprobs(np.ones_like(mask), None)
    assert (masked[0] != plain[0]).all()
    np.testing.assert_array_equal(logprobs(None, None), masked)
    np.testing.assert_array_equal(logprobs(None, 9), plain)


def test_beam_sampling_draws_without_replacement(tiny):
    """Of one step: two of the four candidates count, and the more likely of them is returned."""
    n, p = 2000, np.array([0.4, 0.25, 0.2, 0.1, 0.05])

    def known(ids, length, scores):
        return jnp.full_like(scores, -jnp.inf).at[:, :5].set(jnp.log(p))

    out = generate(
        *tiny, np.full((n, 1), 7), max_new_tokens=1, num_beams=2, do_sample=True, top_k=0,
        eos_token_id=None, logits_processor=known,
    )  # fmt: skip
    pairs = p[:, None] * p / (1 - p[:, None]) * ~np.eye(5, dtype=bool)
    best = [pairs[i, i:].sum() + pairs[i:, i].sum() for i in range(5)]
    counts = np.bincount(out[:, 1], minlength=5)
    assert counts[4] == 0
    assert stats.chisquare(counts[:4], n * np.array(best[:4])).pvalue > 1e-3


def test_lengths(tiny, caplog):
    model, params = tiny
    ids = np.array([[3, 1, 4]])
    free = generate(model, params, ids, max_new_tokens=8, eos_token_id=None)
    np.testing.assert_array_equal(generate(model, params, ids, max_length=6), free[:, :6])
    assert generate(model, params, ids, eos_token_id=None).shape == (1, 23)
    exact = generate(model, params, ids, max_new_tokens=8, eos_token_id=None, cache_length=11)
    np.testing.assert_array_equal(exact, free)
    eos = int(free[0, 3])
    assert generate(model, params, ids, eos_token_id=eos).shape == (1, 4)
    for how in (dict(min_length=7), dict(min_new_tokens=4)):
        out = generate(model, params, ids, eos_token_id=eos, **how)
        assert out.shape[1] > 7 and eos not in out[0, 3:7]
    assert not caplog.records
    out = generate(model, params, ids, eos_token_id=None, max_new_tokens=8, max_length=5)
    np.testing.assert_array_equal(out, free)
    assert "both max_new_tokens and max_length are given: max_new_tokens holds" in caplog.text


def test_warns_of_options_that_do_nothing(tiny, caplog):
    how = dict(max_new_tokens=1, temperature=0.5, length_penalty=2.0)
    generate(*tiny, np.array([[1]]), output_scores=True, min_new_tokens=2, **how)
    assert [r.getMessage() for r in caplog.records] == [
        "temperature=0.5 does nothing without do_sample=True",
        "length_penalty=2.0 does nothing without num_beams > 1",
        "output_scores and output_logits need return_dict_in_generate=True",
        "at least 2 new tokens are wanted, and at most 1 allowed: rows end there",
    ]


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
        (np.array([[1, 2]]), dict(attention_mask=np.array([[0, 0]])), "a row is all padding"),
        (np.array([[1, 2]]), dict(max_length=2), "max_length: found 2, expected more than the 2"),
        (np.array([[1, 2]]), dict(seed=[1, 2]), "found 2 seeds, expected one for all or 1"),
        (np.array([[1, 2]]), dict(seed=-1), "seed: found -1"),
        (np.array([[1, 2]]), dict(stop_strings="x"), "found no tokenizer"),
        (np.array([[1, 2]]), dict(num_beam=2), "no argument 'num_beam': did you mean num_beams"),
        (np.array([[1, 2]]), dict(max_lenght=2), "did you mean max_length"),
        (np.array([[1, 2]]), dict(suppress_tokens=[512]), r"suppress_tokens: found \[512\]"),
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
    learned = golden.load("f_learned_gelu_mup")
    with pytest.raises(ValueError, match="exceed the 64 learned positions"):
        generate(learned.model, learned.params, np.ones((1, 60), int), max_new_tokens=5)
