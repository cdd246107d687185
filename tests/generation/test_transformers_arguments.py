"""Arguments that only transformers has: accepted with a notice, or refused with a replacement."""

from __future__ import annotations

import numpy as np
import pytest

from btlm_jax import generate, generate_batch
from btlm_jax.generation.transformers_arguments import known_arguments
from btlm_jax.utils.notices import warn_once

IDS = np.array([[1, 2, 3]])


@pytest.fixture(autouse=True)
def _fresh_notices():
    warn_once.cache_clear()


def test_arguments_that_change_no_token_are_accepted(tiny, caplog):
    model, params = tiny
    plain = generate(model, params, IDS, max_new_tokens=2)
    silent = dict(
        use_cache=True, synced_gpus=False, streamer=None, stopping_criteria=[], guidance_scale=1.0,
        assistant_model=None, output_attentions=False, token_type_ids=None, past_key_values=None,
        num_beam_groups=1, diversity_penalty=0.0, generation_config=None, return_dict=None,
        do_sample=False, num_return_sequences=1, top_k=None, top_p=1.0, stop_strings=[],
    )  # fmt: skip
    caplog.clear()
    np.testing.assert_array_equal(
        generate(model, params, input_ids=IDS, max_new_tokens=2, **silent), plain
    )
    assert not [m for m in caplog.messages if "effect" in m or "nothing" in m]
    loud = dict(use_cache=False, synced_gpus=True, cache_implementation="static", position_ids=IDS)
    output = generate(model, params, IDS, max_new_tokens=2, disable_compile=True, **loud)
    np.testing.assert_array_equal(output, plain)
    for name in (*loud, "disable_compile"):
        assert f"{name} has no effect: " in caplog.text
    # Batches take what is harmless of the arguments that concern the form of one result.
    habits = dict(attention_mask=[1, 1, 1], return_dict_in_generate=False, output_scores=None)
    (result,) = generate_batch(model, params, IDS.tolist(), max_new_tokens=2, **habits)
    assert result.tokens.tolist() == plain[0, 3:].tolist()


@pytest.mark.parametrize(
    "argument, replacement",
    [
        (dict(streamer=object()), "btlm.stream"),
        (dict(stopping_criteria=[len]), "stop_strings"),
        (dict(prefix_allowed_tokens_fn=len), "logits_processor"),
        (dict(past_key_values=object()), "PromptCache"),
        (dict(inputs=IDS), "input_ids"),
        (dict(token_type_ids=np.zeros((1, 3), int)), "even for 0"),
        (dict(force_words_ids=[[1]]), "forced words are not supported"),
        (dict(num_beam_groups=2), "diverse beam groups are not supported"),
        (dict(penalty_alpha=0.6), "contrastive search is not supported"),
        (dict(output_hidden_states=True), "BTLM.intermediates"),
        (dict(max_time=3.0), "max_new_tokens"),
        (dict(top_h=0.3), "min_p"),
    ],
)
def test_arguments_that_would_change_the_result_are_refused(tiny, argument, replacement):
    (name,) = argument
    with pytest.raises(ValueError, match=f"{name}: not supported by generate: .*{replacement}"):
        generate(*tiny, IDS, **argument)


def test_positions_of_learned_embeddings_cannot_be_given():
    with pytest.raises(ValueError, match=r"position_ids: .*follow from attention_mask"):
        known_arguments({"position_ids": IDS}, alibi=False)


@pytest.mark.parametrize(
    "ids, message",
    [
        ({"input_ids": IDS, "attention_mask": IDS}, r"found dict with \['input_ids', 'attention_m"),
        ([[1, 2], [3]], "different lengths, expected .*pad them on the left"),
        ("some text", "input_ids: found text, expected ids"),
        (["some text"], "input_ids: found text, expected ids"),
    ],
)
def test_what_are_no_ids_is_named(tiny, ids, message):
    with pytest.raises(ValueError, match=message):
        generate(*tiny, ids)
