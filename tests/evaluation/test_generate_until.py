"""Continuations up to given texts, against `generate` of one prompt."""

from __future__ import annotations

import numpy as np
import pytest

from btlm_jax import generate
from btlm_jax.evaluation.generate_until import UntilPrompt, generate_continuations, until_rules

LENGTH = 128


def generate_and_cut(of_bytes, ids, until, new, **named) -> str:
    """Generates every token of one prompt, and cuts the text afterwards."""
    model, params, tokenizer = of_bytes
    ids = ids[-(LENGTH - new) :]
    row = generate(model, params, np.array([ids]), max_new_tokens=new, **named)[0, len(ids) :]
    ends = np.flatnonzero(row == model.config.eos_token_id)
    text = tokenizer.decode(row[: ends[0] if len(ends) else new].tolist())
    return text[: min([text.find(end) for end in until if end in text], default=len(text))]


def answers(of_bytes, prompts, **options):
    model, params, tokenizer = of_bytes
    return dict(
        generate_continuations(model, params, tokenizer, prompts, max_length=LENGTH, **options)
    )


@pytest.fixture(scope="module")
def texts(of_bytes) -> list[list[int]]:
    """Prompts, one of which is too long."""
    rng = np.random.default_rng(0)
    return [rng.integers(32, 127, n).tolist() for n in (3, 30, 12, 150, 7)]


def test_batches_answer_like_single_prompts(of_bytes, texts):
    full = [generate_and_cut(of_bytes, ids, [], 20) for ids in texts]
    # Ends that occur, one within another, and one that does not.
    until = [full[0][3:5], full[1][8:9], full[1][8:11], "never to be found"]
    rules = until_rules(until, 20, {"do_sample": False, "temperature": 0.0}, LENGTH)
    texts_until = answers(
        of_bytes, {i: UntilPrompt(tuple(ids), rules) for i, ids in enumerate(texts)}
    )
    for i, ids in enumerate(texts):
        assert texts_until[i] == generate_and_cut(of_bytes, ids, until, 20)
        assert not any(end in texts_until[i] for end in until)
    assert texts_until[1] != full[1]


def test_an_end_that_begins_in_the_prompt_does_not_count(of_bytes, texts):
    """As in the harness, which searches new tokens only."""
    tokenizer = of_bytes[2]
    full = generate_and_cut(of_bytes, texts[1], [], 12)
    end = tokenizer.decode(texts[1][-1:]) + full[0]
    assert end not in full
    rules = until_rules([end], 12, {}, LENGTH)
    assert answers(of_bytes, {0: UntilPrompt(tuple(texts[1]), rules)}) == {0: full}


def test_a_sampled_text_does_not_depend_on_other_prompts(of_bytes, texts):
    rules = until_rules([], 10, {"do_sample": True, "temperature": 3.0, "top_k": 0}, LENGTH)
    other = until_rules(["x"], 10, {}, LENGTH)
    prompts = {i: UntilPrompt(tuple(ids), rules) for i, ids in enumerate(texts)}
    prompts |= {"again": prompts[1], "greedy": UntilPrompt(tuple(texts[1]), other)}
    together = answers(of_bytes, prompts, seed=1, batch_size=2)
    assert together.keys() == prompts.keys()
    assert answers(of_bytes, {1: prompts[1]}, seed=1)[1] == together[1]
    assert together["again"] != together[1]
    assert answers(of_bytes, {1: prompts[1]}, seed=2)[1] != together[1]


@pytest.mark.parametrize(
    "new, named, expected",
    [
        (128, {}, "max_gen_toks: found 128, expected from 1 to 127"),
        (0, {}, "max_gen_toks: found 0"),
        (9, {"num_beams": 4}, "num_beams = 4, expected greedy decoding or sampling"),
        (9, {"topp": 0.5}, "no argument 'topp': did you mean top_p"),
        (9, {"do_sample": True, "temperature": 0.0}, "temperature: found 0.0"),
        (9, {"max_length": 40}, "generate has no argument 'max_length'"),
    ],
)
def test_bad_rules_are_refused(new, named, expected):
    with pytest.raises(ValueError, match=expected):
        until_rules(["a"], new, named, LENGTH)


def test_explicit_defaults_are_the_default_rules():
    plain = until_rules(["a", ""], 9, {}, LENGTH)
    assert plain.until == ("a",)
    assert until_rules(["a"], 9, {"temperature": 0.0}, LENGTH) == plain
    until_rules(["a"], 9, {"num_beams": 1, "do_sample": False}, LENGTH)
