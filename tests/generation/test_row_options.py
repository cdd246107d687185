"""Options as arrays: rows with different ones share a batch, and other values compile nothing."""

from __future__ import annotations

from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btlm_jax import generate
from btlm_jax.generation.options import GenerationOptions
from btlm_jax.generation.processors import ProcessorContext, apply_processors
from btlm_jax.generation.row_options import row_options, rule_sizes
from btlm_jax.generation.sampling import draw_tokens, warp_scores
from btlm_jax.utils.compile_cache import count_compilations
from support import generation_rules

VOCAB = 31
ALL_RULES = generation_rules.SAMPLING | generation_rules.PROCESSORS
ALONE = [
    {"do_sample": True, "top_k": 0, name: ALL_RULES[name]}
    for name in ALL_RULES
    if name not in ("do_sample", "top_k")
]


def selected(rows: list[GenerationOptions], eos, scores, context):
    """Returns the scores [R, V] after all rules, of rows that are processed together."""
    options, sizes = row_options(rows, eos), rule_sizes(rows)
    scores = apply_processors(jnp.asarray(scores), context, options, sizes.ngram_sizes, ())
    return np.asarray(warp_scores(scores, options, sizes.candidates))


def test_rows_with_different_options_get_what_each_gets_alone():
    rows = [GenerationOptions(**o) for o in ({}, {"do_sample": True}, ALL_RULES, *ALONE)]
    rng, R = np.random.default_rng(0), len(rows)
    eos = [[(), (4,), (5, 6)][i % 3] for i in range(R)]
    scores = rng.normal(0, 2, (R, VOCAB)).astype(np.float32)
    ids = rng.integers(0, VOCAB, (R, 12)).astype(np.int32)
    length, prompt = rng.integers(1, 10, R), np.full(R, 1)
    context = ProcessorContext(
        *map(jnp.asarray, (ids, length, 0 * prompt, prompt, prompt + 4, prompt + 9))
    )
    together = selected(rows, eos, scores, context)
    for i in range(R):
        row = ProcessorContext(*(x[i : i + 1] for x in context))
        alone = selected(rows[i : i + 1], eos[i : i + 1], scores[i : i + 1], row)[0]
        np.testing.assert_array_equal(np.isfinite(together[i]), np.isfinite(alone), str(rows[i]))
        # The sum over the most likely tokens has more terms if all of them are sorted.
        np.testing.assert_allclose(together[i], alone, rtol=1e-6, err_msg=str(rows[i]))
    assert (together != scores).any(1)[2:].sum() > R // 2


def test_rows_that_do_not_sample_take_the_highest_score_beside_rows_that_do():
    scores = jnp.tile(jnp.array([[0.0, 1.0, 1.0, 0.5]]), (4000, 1))
    keys = jax.random.split(jax.random.key(0), 4000)
    tokens = np.asarray(draw_tokens(scores, keys, 1, jnp.arange(4000) % 2 == 0))[:, 0]
    assert set(tokens[1::2]) == {1} and set(tokens[::2]) == {0, 1, 2, 3}


def test_rules_that_no_row_uses_are_left_out():
    unused = row_options([GenerationOptions()] * 2, [(), (5,)])
    assert unused._replace(eos=None) == type(unused)(eos=None)
    assert unused.eos.tolist() == [[-1] * 4, [5, -1, -1, -1]]
    everything = row_options([GenerationOptions(), GenerationOptions(**ALL_RULES)], [(), ()])
    assert [name for name, x in everything._asdict().items() if x is None] == ["search"]
    beams = row_options([GenerationOptions(num_beams=2, early_stopping="never")], [()])
    assert beams.search is not None and beams.search.allows_longer.tolist() == [True]


def random_parameters(seed: int) -> dict:
    """Returns values of all parameters of sampling, some without effect."""
    r = Random(seed)
    return dict(
        do_sample=r.random() < 0.8, temperature=r.choice([1.0, r.uniform(0.1, 2)]),
        top_k=r.randint(1, 100), top_p=r.choice([1.0, r.random()]), min_p=r.random() / 10,
        typical_p=r.uniform(0.3, 0.99), epsilon_cutoff=r.random() / 100,
        eta_cutoff=r.random() / 50, repetition_penalty=r.uniform(0.8, 2),
        exponential_decay_length_penalty=(r.randint(0, 9), r.uniform(1.01, 1.5)),
        eos_token_id=r.sample(range(300), r.randint(1, 4)), seed=r.randint(0, 2**32 - 1),
        min_new_tokens=r.randint(0, 8), max_new_tokens=r.randint(8, 30),
        logit_bias={r.randint(0, 500): r.uniform(-5, 5) for _ in range(r.randint(1, 4))},
        suppress_tokens=r.sample(range(300, 500), r.randint(1, 4)),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_fifty_sets_of_parameters_run_in_two_programs(tiny, caplog):
    """One with sampling and one without, for a bucket of lengths."""
    model, params = tiny
    for is_sampled in (False, True):
        options = next(o for o in map(random_parameters, range(50)) if o["do_sample"] == is_sampled)
        generate(model, params, np.array([[1, 2, 3]]), **options)
    with count_compilations() as compilations:
        outputs = {
            tuple(generate(model, params, np.array([[1, 2, 3, 4]]), **random_parameters(seed))[0])
            for seed in range(50)
        }
    assert compilations.count == 0 and len(outputs) > 40
