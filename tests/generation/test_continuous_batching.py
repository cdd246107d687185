"""A batch gives every prompt the tokens it gets alone, whoever shared or had its slot."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from btlm_jax import generate, generate_batch, make_mesh, stream
from btlm_jax.generation import continuous_batching, request, sample_loop
from btlm_jax.model import kv_cache
from btlm_jax.utils.compile_cache import count_compilations
from support import golden

# More prompts than rows, of several widths of reading, in no order.
PROMPTS = [
    np.random.default_rng(n).integers(0, 256, size=n).tolist()
    for n in (3, 30, 17, 5, 62, 2, 9, 60, 29, 12)
]
GREEDY = dict(max_new_tokens=9, no_repeat_ngram_size=2)
# Ends come early, at different steps.
DRAWN = dict(max_new_tokens=14, do_sample=True, top_k=0, seed=5, eos_token_id=list(range(40)))


@pytest.fixture(scope="module")
def alone(of_bytes):
    """Tokens and log-probabilities of every prompt, one at a time."""
    model, params, _ = of_bytes
    found = {}
    for name, how in (("greedy", GREEDY), ("drawn", DRAWN)):
        for i, ids in enumerate(PROMPTS):
            own = how | dict(seed=[(how.get("seed", 0), i)], return_dict_in_generate=True)
            out = generate(model, params, [ids], **own)
            found[name, i] = out.sequences[0, len(ids) :], out.logprobs[0]
    assert len({len(tokens) for tokens, _ in found.values()}) > 4
    return found


def check(found, alone, name):
    assert len(found) == len(PROMPTS)
    for i, result in enumerate(found):
        tokens, logprobs = alone[name, i]
        np.testing.assert_array_equal(result.tokens, tokens)
        np.testing.assert_allclose(result.logprobs, logprobs, atol=1e-4)


def test_as_alone(of_bytes, alone):
    model, params, _ = of_bytes
    check(generate_batch(model, params, PROMPTS, batch_size=3, **GREEDY), alone, "greedy")
    found = generate_batch(model, params, PROMPTS, batch_size=3, **DRAWN)
    check(found, alone, "drawn")
    for result in found:
        ended = result.tokens[-1] < 40
        assert result.finish_reason == ("eos" if ended else "length")
    assert {result.finish_reason for result in found} == {"eos", "length"}


def test_on_a_mesh(of_bytes, alone, monkeypatch):
    monkeypatch.setattr(request, "INITIAL_SLOTS", 8)  # and grows
    model = of_bytes[0]
    mesh = make_mesh(data=4, fsdp=1, tensor=2)
    on = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(0), mesh=mesh))
    # Five rows become eight, two in each part.
    check(generate_batch(model, on, PROMPTS, batch_size=5, **DRAWN), alone, "drawn")
    own = DRAWN | dict(seed=[(5, 7)])
    assert list(stream(model, on, PROMPTS[7], **own)) == alone["drawn", 7][0].tolist()


def test_order_and_company_do_not_matter(of_bytes, alone):
    model, params, _ = of_bytes
    order = [7, 2, 9, 2, 0]
    own = DRAWN | dict(seed=[(5, i) for i in order])
    found = generate_batch(model, params, [PROMPTS[i] for i in order], batch_size=3, **own)
    for i, result in zip(order, found, strict=True):
        np.testing.assert_array_equal(result.tokens, alone["drawn", i][0])


def test_nothing_is_compiled_for_refilling(of_bytes, monkeypatch):
    model, params, _ = of_bytes
    generate_batch(model, params, PROMPTS, batch_size=3, **DRAWN)
    reads, begin = [], continuous_batching.start_rows
    monkeypatch.setattr(continuous_batching, "start_rows", lambda *a: reads.append(a) or begin(*a))
    with count_compilations() as found:
        generate_batch(model, params, PROMPTS * 2, batch_size=3, **DRAWN | dict(seed=6))
    assert found.count == 0 and len(reads) == 2 * len(PROMPTS)


def test_several_are_read_at_once(of_bytes, alone, monkeypatch):
    """Of different lengths, into slots that became free; and rows wait for each other."""
    model, params, _ = of_bytes
    monkeypatch.setattr(continuous_batching, "_ROWS_PER_PREFILL", 2)
    sizes, patience = [], []
    begin, advance = continuous_batching.start_rows, sample_loop.advance_loop
    monkeypatch.setattr(
        continuous_batching, "start_rows", lambda *a: sizes.append(a[2]) or begin(*a)
    )
    monkeypatch.setattr(
        sample_loop, "advance_loop", lambda *a: patience.append(int(a[-1])) or advance(*a)
    )
    check(generate_batch(model, params, PROMPTS, batch_size=4, **DRAWN), alone, "drawn")
    assert max(patience) > 2 and {len(rows) for rows in sizes} == {2}
    assert any(len({len(row.ids) for row in rows if row}) == 2 for rows in sizes)


def test_caches_grow(of_bytes, alone, monkeypatch):
    """After many short texts have gone round the ring of slots."""
    model, params, _ = of_bytes
    monkeypatch.setattr(request, "INITIAL_SLOTS", 4)
    rounds, real = [], kv_cache.resized

    def grown(cache, capacity):
        rounds.append((cache.capacity, int(cache.cursor) > cache.capacity))
        return real(cache, capacity)

    monkeypatch.setattr(kv_cache, "resized", grown)
    check(generate_batch(model, params, PROMPTS, batch_size=2, **DRAWN), alone, "drawn")
    assert {capacity for capacity, _ in rounds} == {4, 8} and any(closed for _, closed in rounds)


def test_long_prompts_have_a_group_of_their_own():
    groups = continuous_batching._length_groups([10, 500, 20, 90, 30, 11], 3)
    assert groups == [[1], [3, 4], [2, 5, 0]]
    assert continuous_batching._length_groups([10, 500, 20], 4) == [
        [1, 2, 0]
    ]  # no other batch to fill


def test_dynamic_scaling_reads_equal_lengths_at_once(monkeypatch):
    """It counts the length of the text, which must be the same for all that are read at once."""
    c = golden.load("e_alibi_dynamic16")
    monkeypatch.setattr(continuous_batching, "_ROWS_PER_PREFILL", 2)
    ids = [(c["gen/prompt"][0].tolist() * 8)[:n] for n in (31, 30, 18, 18)]  # beyond the trained
    how = dict(max_new_tokens=6, eos_token_id=None)
    found = generate_batch(c.model, c.params, ids, batch_size=4, **how)
    for prompt, result in zip(ids, found, strict=True):
        out = generate(c.model, c.params, [prompt], return_dict_in_generate=True, **how)
        np.testing.assert_allclose(result.logprobs, out.logprobs[0], atol=1e-4)


def test_learned_positions():
    c = golden.load("f_learned_gelu_mup")
    ids = [[5], [3, 1, 4, 1, 5], [9, 2, 6]]
    how = dict(max_new_tokens=6, eos_token_id=None)
    found = generate_batch(c.model, c.params, ids, batch_size=2, **how)
    for prompt, result in zip(ids, found, strict=True):
        out = generate(c.model, c.params, [prompt], **how)
        np.testing.assert_array_equal(result.tokens, out[0, len(prompt) :])
    with pytest.raises(ValueError, match=r"prompt 1: .*exceed the 64 learned positions"):
        generate_batch(c.model, c.params, ids, max_new_tokens=60)


def test_several_continuations_of_a_prompt(of_bytes):
    model, params, _ = of_bytes
    how = DRAWN | dict(num_return_sequences=3)
    found = generate_batch(model, params, PROMPTS[:2], batch_size=3, **how)
    for i in range(2):
        out = generate(model, params, [PROMPTS[i]], **how | dict(seed=[(5, i)]))
        for n in range(3):
            tokens = found[3 * i + n].tokens
            np.testing.assert_array_equal(tokens, out[n, len(PROMPTS[i]) :][: len(tokens)])


@pytest.mark.parametrize("drawn", [False, True])
def test_beams(of_bytes, drawn):
    model, params, _ = of_bytes
    ids = [PROMPTS[0], PROMPTS[3], PROMPTS[0][::-1], PROMPTS[0][:2] + [7]]
    how = dict(num_beams=2, num_return_sequences=2, max_new_tokens=4, do_sample=drawn, seed=1)
    found = generate_batch(model, params, ids, **how)
    assert len(found) == 8
    for i, prompt in enumerate(ids):
        out = generate(model, params, [prompt], **how | dict(seed=[(1, i)]))
        for n in range(2):
            tokens = found[2 * i + n].tokens
            np.testing.assert_array_equal(tokens, out[n, len(prompt) :][: len(tokens)])


def test_stop_strings_and_their_reason(of_bytes, alone):
    model, params, tokenizer = of_bytes
    places = ((i, t) for i in range(len(PROMPTS)) for t in alone["drawn", i][0][1:-1].tolist())
    i, stop = next((i, t) for i, t in places if tokenizer.decode([t]).isascii())
    tokens = alone["drawn", i][0]
    at = tokens.tolist().index(stop) + 1
    how = DRAWN | dict(stop_strings=tokenizer.decode([stop]), tokenizer=tokenizer, seed=[(5, i)])
    del how["max_new_tokens"]
    for most in (at, at + 3):  # at the greatest length too
        (found,) = generate_batch(model, params, [PROMPTS[i]], max_new_tokens=most, **how)
        assert found.tokens.tolist() == tokens[:at].tolist() and found.finish_reason == "stop"


def test_no_prompts(of_bytes):
    assert generate_batch(*of_bytes[:2], []) == []


@pytest.mark.parametrize(
    "prompts, how, message",
    [
        ([[1], []], {}, "prompt 1: .*no empty prompt"),
        ([[1], [2, 258]], {}, "prompt 1: input_ids: found ids from 2 to 258"),
        ([[1], [2, 3]], dict(max_length=2), "prompt 1: max_length: found 2"),
        ([[1]], dict(batch_size=0), "batch_size: found 0"),
        ([[1]], dict(seed=[1, 2]), "found 2 seeds"),
        ([[1]], dict(seed=[(0, 2**31)]), "or pairs of one and a stream"),
        ([[1]], dict(attention_mask=[[1]]), "attention_mask: found it in a stream or batch"),
        ([[1]], dict(batchsize=3), "generate has no argument 'batchsize'"),
    ],
)
def test_bad_arguments(of_bytes, prompts, how, message):
    with pytest.raises(ValueError, match=message):
        generate_batch(*of_bytes[:2], prompts, **how)
