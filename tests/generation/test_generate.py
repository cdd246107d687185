"""`generate` against transformers' recorded tokens and against forward passes without a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btlm_jax import generate, generate_batch, load_tokenizer, score, stream
from btlm_jax.generation import prompts
from btlm_jax.utils.compile_cache import count_compilations
from support import generation_rules, golden, gpt2
from support.golden import on_cases

# Each case costs several programs to compile. That the models are those of the original, with
# caches too, is tested in `tests/model`; the cases here differ in what generation itself does:
# positions of padded rows, scales that grow with the text, and another head.
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
def test_answers_are_those_recorded_from_transformers(number, monkeypatch):
    """Random options, greedy for even numbers and with beams for odd ones: see `support.gpt2`.

    Each runs in a program with all rules, as beside a row that uses them all.
    """
    generation_rules.share_programs(monkeypatch)
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


def test_logits_that_are_nan_are_an_error_and_not_a_text():
    """Finite weights can overflow; every way to generate says so."""
    c = golden.load("a2_btlm_mup_h32")
    params = jax.tree.map(lambda x: x * 1e30, c.params)
    ids = c["gen/prompt"]
    ways = {
        "greedy": lambda: generate(c.model, params, ids, max_new_tokens=20),
        "stream": lambda: list(stream(c.model, params, ids, max_new_tokens=20)),
        "batch": lambda: generate_batch(c.model, params, [ids[0]], max_new_tokens=20),
    }
    for call in ways.values():
        with pytest.raises(FloatingPointError, match="logits: found NaN"):
            call()
    ids = generate(c.model, params, ids, max_new_tokens=20, remove_invalid_values=True)
    assert ids.shape[1] > 20
