"""`generate` against transformers' recorded tokens and against forward passes without a cache."""

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


# Each case costs several programs to compile. That the models are those of the original, with
# caches too, is tested in `tests/model`; the cases here differ in what generation itself does:
# positions of padded rows, scales that grow with the text, and another head.
def on_cases(*names):
    return pytest.mark.parametrize("case", names, indirect=True)


ALL_KINDS = on_cases("a2_btlm_mup_h32", "e_alibi_dynamic16", "f_learned_gelu_mup", "i_untied")
PADDED_KINDS = on_cases("a_btlm_mup_hd80", "e_alibi_dynamic16", "f_learned_gelu_mup")


@ALL_KINDS
def test_greedy_tokens_are_those_of_transformers(case):
    c = case
    options = dict(max_new_tokens=20, eos_token_id=96)
    for name, more in (("greedy", {}), ("greedy_ngram2", dict(no_repeat_ngram_size=2))):
        output = generate(c.model, c.params, c["gen/prompt"], **options, **more)
        np.testing.assert_array_equal(output, c[f"gen/{name}/sequences"])


@PADDED_KINDS
def test_greedy_tokens_of_padded_batches_are_those_of_transformers(case):
    c = case
    common = dict(attention_mask=c["gen/prompt_batch_mask"], max_new_tokens=20, pad_token_id=96)
    # "noeos" was recorded with the configuration's EOS, which no prompt reaches soon.
    for name, eos in (("noeos", "config"), ("eos", int(c["gen/eos_used"]))):
        output = generate(c.model, c.params, c["gen/prompt_batch"], eos_token_id=eos, **common)
        np.testing.assert_array_equal(output, c[f"gen/greedy_batch_{name}/sequences"])


BEAMS = dict(
    num_beams=5,
    no_repeat_ngram_size=2,
    early_stopping=True,
    max_new_tokens=20,
    pad_token_id=96,
    return_dict_in_generate=True,
)


@on_cases("b_sp_alibi", "e_alibi_dynamic16", "f_learned_gelu_mup")
def test_beams_and_scores_are_those_of_transformers(case):
    """The first example of the model card, with all five beams."""
    c = case
    for name, eos in (("", 96), ("_eos", int(c["gen/eos_used_beam"]))):
        output = generate(
            c.model, c.params, c["gen/prompt"], eos_token_id=eos, num_return_sequences=5, **BEAMS
        )
        np.testing.assert_array_equal(output.sequences, c[f"gen/beam5_ngram2{name}/sequences"])
        expected = c[f"gen/beam5_ngram2{name}/scores"]
        np.testing.assert_allclose(output.sequences_scores, expected, atol=1e-5)  # measured 2e-6


@PADDED_KINDS
def test_beams_of_padded_batches_are_those_of_transformers(case):
    c = case
    ids, mask = c["gen/prompt_batch"], c["gen/prompt_batch_mask"]
    options = dict(eos_token_id=int(c["gen/eos_used"])) | BEAMS
    output = generate(c.model, c.params, ids, attention_mask=mask, **options)
    np.testing.assert_array_equal(output.sequences, c["gen/beam5_ngram2_batch_eos/sequences"])
    expected = c["gen/beam5_ngram2_batch_eos/scores"]
    np.testing.assert_allclose(output.sequences_scores, expected, atol=1e-5)


@pytest.fixture(scope="module")
def sharded_case():
    """i_untied on a mesh: its vocabulary of 97 is padded to 98, a batch of 3 to 4."""
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


@pytest.mark.parametrize("options", [{}, BEAMS], ids=["greedy", "beams"])
def test_a_mesh_gives_the_same_tokens(sharded_case, options):
    case, sharded = sharded_case
    output = generate(
        case.model,
        sharded,
        case["gen/prompt_batch"],
        attention_mask=case["gen/prompt_batch_mask"],
        eos_token_id=int(case["gen/eos_used"]),
        **dict(pad_token_id=96) | options,
    )
    name = "beam5_ngram2_batch_eos" if options else "greedy_batch_eos"
    np.testing.assert_array_equal(
        output.sequences if options else output, case[f"gen/{name}/sequences"]
    )


def test_padding_rows_do_not_prolong_a_batch():
    model = BTLM(BTLMConfig.preset("tiny"))
    options = dict(max_new_tokens=30, do_sample=True, temperature=3.0, eos_token_id=list(range(40)))
    off, on = (model.init(jax.random.key(0), mesh=m) for m in (None, make_mesh(fsdp=8)))
    for seed in range(4):
        alone = generate(model, off, np.array([[5, 6]]), seed=seed, **options)
        np.testing.assert_array_equal(
            generate(model, on, np.array([[5, 6]]), seed=seed, **options), alone
        )


def test_several_rows_of_a_prompt_on_a_mesh_with_a_context_axis():
    """Decoding does not use the context axis."""
    model, ids = BTLM(BTLMConfig.preset("tiny")), np.array([[5, 6, 7], [8, 9, 10], [1, 2, 3]])
    mesh = make_mesh(context=2, data=2, tensor=2)
    off, on = (model.init(jax.random.key(0), mesh=m) for m in (None, mesh))
    options = dict(max_new_tokens=6, do_sample=True, num_return_sequences=3, eos_token_id=None)
    np.testing.assert_array_equal(
        generate(model, on, ids, **options), generate(model, off, ids, **options)
    )


def test_sampling_is_repeatable_and_seeded(tiny):
    model, params = tiny
    prompt = np.array([[5, 6, 7], [5, 6, 7]])
    options = dict(do_sample=True, max_new_tokens=12, eos_token_id=None)
    a, b = (generate(model, params, prompt, seed=1, **options) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, generate(model, params, prompt, seed=2, **options))
    assert not np.array_equal(a[0], a[1])  # each row has its own key
    alone = generate(model, params, prompt[:1], seed=1, **options)
    np.testing.assert_array_equal(alone[0], a[0])


def test_sampling_from_one_token_is_greedy(tiny):
    model, params = tiny
    prompt = np.array([[1, 2, 3]])
    greedy = generate(model, params, prompt, eos_token_id=None)
    for rules in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4), dict(temperature=1e-29)):
        sampled = generate(model, params, prompt, do_sample=True, eos_token_id=None, **rules)
        np.testing.assert_array_equal(sampled, greedy)


def test_greedy_tokens_are_the_argmax_of_full_forward_passes(tiny):
    model, params = tiny
    output = generate(model, params, np.array([[3, 1, 4]]), max_new_tokens=8, eos_token_id=None)
    logits = model.apply(params, output)
    np.testing.assert_array_equal(np.argmax(logits, -1)[0, 2:-1], output[0, 3:])


def test_any_of_several_eos_ids_ends_a_row(tiny):
    model, params = tiny
    prompt = np.array([[3, 1, 4]])
    free = generate(model, params, prompt, max_new_tokens=8, eos_token_id=None)
    third = int(free[0, 5])
    end = int(np.argmax(free[0, 3:] == third)) + 4
    output = generate(model, params, prompt, max_new_tokens=8, eos_token_id=[511, third])
    np.testing.assert_array_equal(output, free[:, :end])  # the EOS is included


@pytest.mark.parametrize("number", range(24))
def test_answers_are_those_recorded_from_transformers(number):
    """Random options, greedy for even numbers and with beams for odd ones: see `support.gpt2`."""
    case = gpt2.recorded()[number]
    output = gpt2.answer(case)
    np.testing.assert_array_equal(output.sequences, case["sequences"])
    if number % 2:
        scores = case["sequences_scores"]
        np.testing.assert_allclose(output.sequences_scores, scores, atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(output.beam_indices, case["beam_indices"])


def test_lengths_in_the_same_bucket_share_programs(tiny):
    model, params = tiny
    options = dict(num_beams=2, eos_token_id=3)

    def compiled(prompt_length, new, **more):
        with count_compilations() as compilations:
            ids = np.arange(prompt_length)[None] % 500
            output = generate(model, params, ids, max_new_tokens=new, **options | more)
        assert prompt_length < output.shape[1] <= prompt_length + new
        return compilations.count

    compiled(5, 4)
    for length, new in (
        (6, 4),
        (31, 1),
        (1, 31),
        (9, 12),
    ):  # prompt and new tokens within 32 slots each
        assert compiled(length, new, seed=length, min_new_tokens=1) == 0, (length, new)
    assert compiled(33, 3) == 3  # 33 of 40 slots: prefill, start_loop, advance_loop
    assert compiled(32, 8) == compiled(33, 7) == 0
    assert compiled(33, 33) == 2  # another bucket of new tokens needs no new prefill


def test_buckets_are_at_most_a_quarter_larger():
    assert [prompts.bucket_length(n) for n in (1, 32, 33, 40, 41, 65, 8192, 8193)] == [
        32, 32, 40, 40, 48, 80, 8192, 10240,
    ]  # fmt: skip
    for n in range(1, 5000):
        assert n <= prompts.bucket_length(n) <= max(32, 1.25 * n)


def test_rows_sample_alone_as_in_a_batch(tiny):
    model, params = tiny
    ids = np.array([[0, 0, 7, 8], [1, 2, 3, 4], [0, 5, 6, 9]])
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    for options in (dict(num_return_sequences=2), dict(num_beams=3)):
        options |= dict(do_sample=True, max_new_tokens=10, eos_token_id=None, top_k=0)
        batch = generate(model, params, ids, attention_mask=mask, seed=[4, 9, 2**32 - 1], **options)
        batch = batch.reshape(3, -1, 14)
        for i, seed in enumerate((4, 9, 2**32 - 1)):
            left = int(4 - mask[i].sum())
            alone = generate(model, params, ids[i : i + 1, left:], seed=seed, **options)
            np.testing.assert_array_equal(batch[i, :, left:], alone)
        assert options.get("num_return_sequences") is None or (batch[:, 0] != batch[:, 1]).any()


def test_scores_and_logprobs_are_those_of_forward_passes(tiny):
    model, params = tiny
    ids = np.array([[3, 1, 4], [1, 5, 9]])
    options = dict(max_new_tokens=9, eos_token_id=None, no_repeat_ngram_size=1)
    output = generate(
        model, params, ids, return_dict_in_generate=True, output_scores=True, output_logits=True,
        **options,
    )  # fmt: skip
    logits = np.asarray(model.apply(params, output.sequences))[:, 2:-1].swapaxes(0, 1)
    np.testing.assert_allclose(output.logits, logits, atol=2e-5)  # fp32, summed in another order
    np.testing.assert_array_equal(output.scores.argmax(-1).T, output.sequences[:, 3:])
    assert np.isneginf(output.scores).sum((0, 2)).tolist() == [sum(range(3, 12))] * 2
    np.testing.assert_allclose(
        output.logprobs, score(model, params, output.sequences)[:, 3:], atol=2e-5
    )


def test_logprobs_and_scores_of_beams_are_those_of_their_tokens(tiny):
    model, params = tiny
    free = generate(model, params, np.array([[3, 1, 4]]), max_new_tokens=8, eos_token_id=None)
    output = generate(
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
    new = (~np.isnan(output.logprobs)).sum(1)
    assert len(set(new)) > 1  # some end early and are padded
    np.testing.assert_allclose(
        np.nansum(output.logprobs, 1) / new**0.5, output.sequences_scores, rtol=1e-5
    )
    for row, n in enumerate(new):
        expected = score(model, params, output.sequences[row : row + 1, : 3 + n])[0, 3:]
        np.testing.assert_allclose(output.logprobs[row, :n], expected, atol=2e-5)
        steps = [
            output.scores[t, output.beam_indices[row, t], output.sequences[row, 3 + t]]
            for t in range(n)
        ]
        np.testing.assert_allclose(steps, expected, atol=2e-5)


def test_user_processors_are_applied(tiny):
    model, params = tiny

    def successor(ids, length, scores):
        """Allows only the last token plus one."""
        last = jnp.take_along_axis(ids, length[:, None] - 1, 1)
        return jnp.where(jnp.arange(scores.shape[1]) == last + 1, scores, -jnp.inf)

    for options in (dict(), dict(do_sample=True), dict(num_beams=2)):
        output = generate(
            model, params, np.array([[7, 40], [5, 90]]), max_new_tokens=5, eos_token_id=None,
            logits_processor=successor, **options,
        )  # fmt: skip
        np.testing.assert_array_equal(output[:, 2:], [[41, 42, 43, 44, 45], [91, 92, 93, 94, 95]])


def test_stop_strings_end_rows(checkpoint_dir):
    c = golden.load("a2_btlm_mup_h32")
    tokenizer = load_tokenizer(checkpoint_dir)
    ids = c["gen/prompt_batch"][:2, 4:]
    mask = c["gen/prompt_batch_mask"][:2, 4:]
    options = dict(attention_mask=mask, eos_token_id=None, pad_token_id=95)
    free = generate(c.model, c.params, ids, **options)
    text = tokenizer.decode(free[0, 8:].tolist())
    stop = text[4:7]
    end = 8 + text.index(stop) + 3
    assert stop not in tokenizer.decode(free[1].tolist())
    output = generate(c.model, c.params, ids, stop_strings=stop, tokenizer=tokenizer, **options)
    np.testing.assert_array_equal(output[1], free[1])
    np.testing.assert_array_equal(output[0, :end], free[0, :end])
    assert (output[0, end:] == 95).all()


def test_padding_is_inferred_unless_it_is_eos(tiny):
    model, params = tiny
    ids, mask = np.array([[9, 9, 7, 8], [1, 2, 3, 4]]), np.array([[0, 0, 1, 1], [1, 1, 1, 1]])

    def logprobs(mask, eos):
        options = dict(pad_token_id=9, max_new_tokens=2, return_dict_in_generate=True)
        return generate(
            model, params, ids, attention_mask=mask, eos_token_id=eos, **options
        ).logprobs

    masked, plain = logprobs(mask, None), logprobs(np.ones_like(mask), None)
    assert (masked[0] != plain[0]).all()
    np.testing.assert_array_equal(logprobs(None, None), masked)
    np.testing.assert_array_equal(logprobs(None, 9), plain)


def test_beam_sampling_draws_without_replacement(tiny):
    """In one step, two of the four candidates survive, and the more likely one is returned."""
    n, p = 2000, np.array([0.4, 0.25, 0.2, 0.1, 0.05])

    def fixed_scores(ids, length, scores):
        return jnp.full_like(scores, -jnp.inf).at[:, :5].set(jnp.log(p))

    output = generate(
        *tiny, np.full((n, 1), 7), max_new_tokens=1, num_beams=2, do_sample=True, top_k=0,
        eos_token_id=None, logits_processor=fixed_scores,
    )  # fmt: skip
    pairs = p[:, None] * p / (1 - p[:, None]) * ~np.eye(5, dtype=bool)
    best = [pairs[i, i:].sum() + pairs[i:, i].sum() for i in range(5)]
    counts = np.bincount(output[:, 1], minlength=5)
    assert counts[4] == 0
    assert stats.chisquare(counts[:4], n * np.array(best[:4])).pvalue > 1e-3


def test_length_arguments_bound_the_output(tiny, caplog):
    model, params = tiny
    ids = np.array([[3, 1, 4]])
    free = generate(model, params, ids, max_new_tokens=8, eos_token_id=None)
    np.testing.assert_array_equal(generate(model, params, ids, max_length=6), free[:, :6])
    assert generate(model, params, ids, eos_token_id=None).shape == (1, 23)
    exact = generate(model, params, ids, max_new_tokens=8, eos_token_id=None, cache_length=11)
    np.testing.assert_array_equal(exact, free)
    eos = int(free[0, 3])
    assert generate(model, params, ids, eos_token_id=eos).shape == (1, 4)
    for options in (dict(min_length=7), dict(min_new_tokens=4)):
        output = generate(model, params, ids, eos_token_id=eos, **options)
        assert output.shape[1] > 7 and eos not in output[0, 3:7]
    assert not caplog.records
    output = generate(model, params, ids, eos_token_id=None, max_new_tokens=8, max_length=5)
    np.testing.assert_array_equal(output, free)
    assert "both max_new_tokens and max_length are given: max_new_tokens is used" in caplog.text


def test_options_without_effect_give_warnings(tiny, caplog):
    options = dict(max_new_tokens=1, temperature=0.5, length_penalty=2.0)
    generate(*tiny, np.array([[1]]), output_scores=True, min_new_tokens=2, **options)
    assert [r.getMessage() for r in caplog.records] == [
        "temperature=0.5 does nothing without do_sample=True",
        "length_penalty=2.0 does nothing without num_beams > 1",
        "output_scores and output_logits need return_dict_in_generate=True",
        "at least 2 new tokens are requested, but at most 1 are allowed: rows end there",
    ]


@pytest.mark.parametrize(
    "prompt, options, message",
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
def test_bad_arguments_are_named(tiny, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(*tiny, prompt, **options)


def test_lengths_beyond_the_trained_context_warn_or_fail(tiny, caplog):
    model, params = tiny
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, n_positions=8))
    with caplog.at_level(logging.WARNING):
        generate(short, params, np.array([[1, 2]]), max_new_tokens=8)
    assert "10 tokens exceed the trained context of 8" in caplog.text
    learned = golden.load("f_learned_gelu_mup")
    with pytest.raises(ValueError, match="exceed the 64 learned positions"):
        generate(learned.model, learned.params, np.ones((1, 60), int), max_new_tokens=5)
