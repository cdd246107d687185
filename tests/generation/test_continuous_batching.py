"""A batch gives every prompt the tokens that it gets alone, whichever rows share its batch."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from btlm_jax import generate, generate_batch, make_mesh, stream
from btlm_jax.generation import (
    continuous_batching,
    engine,
    row_batch,
    running_batch,
    sample_loop,
)
from btlm_jax.model import kv_cache
from btlm_jax.utils.compile_cache import count_compilations
from support import golden

# More prompts than rows, unsorted, with several prefill widths.
PROMPTS = [
    np.random.default_rng(n).integers(0, 256, size=n).tolist()
    for n in (3, 30, 17, 5, 62, 2, 9, 60, 29, 12)
]
GREEDY = dict(max_new_tokens=9, no_repeat_ngram_size=2)
# Rows end early, at different steps.
SAMPLED = dict(max_new_tokens=14, do_sample=True, top_k=0, seed=5, eos_token_id=list(range(40)))


@pytest.fixture(scope="module")
def alone(of_bytes):
    """Tokens and log-probabilities of every prompt, one at a time."""
    model, params, _ = of_bytes
    expected = {}
    for name, options in (("greedy", GREEDY), ("sampled", SAMPLED)):
        for i, ids in enumerate(PROMPTS):
            seed = [(options.get("seed", 0), i)]
            arguments = options | dict(seed=seed, return_dict_in_generate=True)
            output = generate(model, params, [ids], **arguments)
            expected[name, i] = output.sequences[0, len(ids) :], output.logprobs[0]
    assert len({len(tokens) for tokens, _ in expected.values()}) > 4
    return expected


def check(results, alone, name):
    assert len(results) == len(PROMPTS)
    for i, result in enumerate(results):
        tokens, logprobs = alone[name, i]
        np.testing.assert_array_equal(result.tokens, tokens)
        np.testing.assert_allclose(result.logprobs, logprobs, atol=1e-4)


def test_rows_get_the_tokens_they_get_alone(of_bytes, alone):
    model, params, _ = of_bytes
    check(generate_batch(model, params, PROMPTS, batch_size=3, **GREEDY), alone, "greedy")
    results = generate_batch(model, params, PROMPTS, batch_size=3, **SAMPLED)
    check(results, alone, "sampled")
    for result in results:
        has_eos = result.tokens[-1] < 40
        assert result.finish_reason == ("eos" if has_eos else "length")
    assert {result.finish_reason for result in results} == {"eos", "length"}


def test_a_mesh_gives_the_same_tokens(of_bytes, alone, monkeypatch):
    monkeypatch.setattr(row_batch, "INITIAL_SLOTS", 8)  # so that the cache grows
    model = of_bytes[0]
    mesh = make_mesh(data=4, fsdp=1, tensor=2)
    sharded = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(0), mesh=mesh))
    # Five rows become eight, two per shard.
    check(generate_batch(model, sharded, PROMPTS, batch_size=5, **SAMPLED), alone, "sampled")
    options = SAMPLED | dict(seed=[(5, 7)])
    assert list(stream(model, sharded, PROMPTS[7], **options)) == alone["sampled", 7][0].tolist()


def test_order_and_other_prompts_do_not_matter(of_bytes, alone):
    model, params, _ = of_bytes
    order = [7, 2, 9, 2, 0]
    options = SAMPLED | dict(seed=[(5, i) for i in order])
    results = generate_batch(model, params, [PROMPTS[i] for i in order], batch_size=3, **options)
    for i, result in zip(order, results, strict=True):
        np.testing.assert_array_equal(result.tokens, alone["sampled", i][0])


def test_refilling_rows_compiles_nothing(of_bytes, monkeypatch):
    model, params, _ = of_bytes
    generate_batch(model, params, PROMPTS, batch_size=3, **SAMPLED)
    starts, start_rows = [], running_batch.start_rows

    def count_starts(*arguments):
        starts.append(arguments)
        return start_rows(*arguments)

    monkeypatch.setattr(running_batch, "start_rows", count_starts)
    with count_compilations() as compiled:
        generate_batch(model, params, PROMPTS * 2, batch_size=3, **SAMPLED | dict(seed=6))
    assert compiled.count == 0 and len(starts) == 2 * len(PROMPTS)


def test_several_prompts_are_prefilled_together(of_bytes, alone, monkeypatch):
    """Prompts of different lengths go into the slots that became free; rows wait for each other."""
    model, params, _ = of_bytes
    monkeypatch.setattr(engine, "_ROWS_PER_PREFILL", 2)
    sizes, patience = [], []
    begin, advance = running_batch.start_rows, sample_loop.advance_loop
    monkeypatch.setattr(running_batch, "start_rows", lambda *a: sizes.append(a[2]) or begin(*a))
    monkeypatch.setattr(
        sample_loop, "advance_loop", lambda *a: patience.append(int(a[-1])) or advance(*a)
    )
    check(generate_batch(model, params, PROMPTS, batch_size=4, **SAMPLED), alone, "sampled")
    assert max(patience) > 2 and {len(rows) for rows in sizes} == {2}
    assert any(len({len(row.ids) for row in rows if row}) == 2 for rows in sizes)


def test_caches_grow_after_the_ring_has_wrapped(of_bytes, alone, monkeypatch):
    model, params, _ = of_bytes
    monkeypatch.setattr(row_batch, "INITIAL_SLOTS", 4)
    rounds, resized = [], kv_cache.resized

    def record_rounds(cache, capacity):
        rounds.append((cache.capacity, int(cache.cursor) > cache.capacity))
        return resized(cache, capacity)

    monkeypatch.setattr(kv_cache, "resized", record_rounds)
    check(generate_batch(model, params, PROMPTS, batch_size=2, **SAMPLED), alone, "sampled")
    assert {capacity for capacity, _ in rounds} == {4, 8} and any(wrapped for _, wrapped in rounds)


def test_long_prompts_run_in_a_separate_group():
    groups = continuous_batching._length_groups([10, 500, 20, 90, 30, 11], 3)
    assert groups == [[1], [3, 4], [2, 5, 0]]
    assert continuous_batching._length_groups([10, 500, 20], 4) == [
        [1, 2, 0]
    ]  # too few for another batch


def test_dynamic_scaling_prefills_equal_lengths_together(monkeypatch):
    """It depends on the length of the text, which must be equal for all prompts of a prefill."""
    c = golden.load("e_alibi_dynamic16")
    monkeypatch.setattr(engine, "_ROWS_PER_PREFILL", 2)
    ids = [
        (c["gen/prompt"][0].tolist() * 8)[:n] for n in (31, 30, 18, 18)
    ]  # beyond the trained context
    options = dict(max_new_tokens=6, eos_token_id=None)
    results = generate_batch(c.model, c.params, ids, batch_size=4, **options)
    for prompt, result in zip(ids, results, strict=True):
        output = generate(c.model, c.params, [prompt], return_dict_in_generate=True, **options)
        np.testing.assert_allclose(result.logprobs, output.logprobs[0], atol=1e-4)


def test_learned_positions_give_the_same_tokens():
    c = golden.load("f_learned_gelu_mup")
    ids = [[5], [3, 1, 4, 1, 5], [9, 2, 6]]
    options = dict(max_new_tokens=6, eos_token_id=None)
    results = generate_batch(c.model, c.params, ids, batch_size=2, **options)
    for prompt, result in zip(ids, results, strict=True):
        output = generate(c.model, c.params, [prompt], **options)
        np.testing.assert_array_equal(result.tokens, output[0, len(prompt) :])
    with pytest.raises(ValueError, match=r"prompt 1: .*exceed the 64 learned positions"):
        generate_batch(c.model, c.params, ids, max_new_tokens=60)


def test_several_continuations_are_those_of_generate(of_bytes):
    model, params, _ = of_bytes
    options = SAMPLED | dict(num_return_sequences=3)
    results = generate_batch(model, params, PROMPTS[:2], batch_size=3, **options)
    for i in range(2):
        output = generate(model, params, [PROMPTS[i]], **options | dict(seed=[(5, i)]))
        for n in range(3):
            tokens = results[3 * i + n].tokens
            np.testing.assert_array_equal(tokens, output[n, len(PROMPTS[i]) :][: len(tokens)])


@pytest.mark.parametrize("do_sample", [False, True])
def test_beams_are_those_of_generate(of_bytes, do_sample):
    model, params, _ = of_bytes
    ids = [PROMPTS[0], PROMPTS[3], PROMPTS[0][::-1], PROMPTS[0][:2] + [7]]
    options = dict(
        num_beams=2, num_return_sequences=2, max_new_tokens=4, do_sample=do_sample, seed=1
    )
    results = generate_batch(model, params, ids, **options)
    assert len(results) == 8
    for i, prompt in enumerate(ids):
        output = generate(model, params, [prompt], **options | dict(seed=[(1, i)]))
        for n in range(2):
            tokens = results[2 * i + n].tokens
            np.testing.assert_array_equal(tokens, output[n, len(prompt) :][: len(tokens)])


def test_stop_strings_end_rows_and_are_the_reason(of_bytes, alone):
    model, params, tokenizer = of_bytes
    candidates = (
        (i, t) for i in range(len(PROMPTS)) for t in alone["sampled", i][0][1:-1].tolist()
    )
    i, stop = next((i, t) for i, t in candidates if tokenizer.decode([t]).isascii())
    tokens = alone["sampled", i][0]
    end = tokens.tolist().index(stop) + 1
    options = SAMPLED | dict(
        stop_strings=tokenizer.decode([stop]), tokenizer=tokenizer, seed=[(5, i)]
    )
    del options["max_new_tokens"]
    for max_new_tokens in (end, end + 3):  # also exactly at the maximum length
        (result,) = generate_batch(
            model, params, [PROMPTS[i]], max_new_tokens=max_new_tokens, **options
        )
        assert result.tokens.tolist() == tokens[:end].tolist() and result.finish_reason == "stop"


def test_no_prompts_give_no_results(of_bytes):
    assert generate_batch(*of_bytes[:2], []) == []


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1], []], {}, "prompt 1: .*no empty prompt"),
        ([[1], [2, 258]], {}, "prompt 1: input_ids: found ids from 2 to 258"),
        ([[1], [2, 3]], dict(max_length=2), "prompt 1: max_length: found 2"),
        ([[1]], dict(batch_size=0), "batch_size: found 0"),
        ([[1]], dict(seed=[1, 2]), "found 2 seeds"),
        ([[1]], dict(seed=[(0, 2**31)]), "or pairs of one and a stream"),
        ([[1]], dict(attention_mask=[[0]]), "attention_mask: found it in a stream or batch"),
        ([[1]], dict(batchsize=3), "generate has no argument 'batchsize'"),
    ],
)
def test_bad_arguments_are_named(of_bytes, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate_batch(*of_bytes[:2], prompts, **options)
