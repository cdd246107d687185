"""Beams against transformers' recorded ones and against the scores of their tokens."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from scipy import stats

from btlm_jax import generate, score
from support.generation_rules import BEAMS
from support.golden import on_cases

# The cases that differ in what generation itself does; the models are tested in `tests/model`.
PADDED_KINDS = on_cases("a_btlm_mup_hd80", "e_alibi_dynamic16", "f_learned_gelu_mup")


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
