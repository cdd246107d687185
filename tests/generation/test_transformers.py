"""`generate` against transformers itself, where it is installed (extra `torch`).

Uses the tiny GPT-2 of `support.gpt2`: random weights, prompts with left padding, random options.
Run as a program, it records transformers' answers again.
"""

from __future__ import annotations

import functools
import json
from random import Random

import jax.numpy as jnp
import numpy as np
import pytest

from btlm_jax import generate
from btlm_jax.generation import processors, row_options
from btlm_jax.generation.options import GenerationOptions
from btlm_jax.generation.sampling import warp_scores
from support import golden
from support import gpt2 as gpt2_lib

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers.generation import logits_process as theirs  # noqa: E402

VOCAB = 23


@functools.cache
def gpt2():
    """Returns transformers' model with the weights of `support.gpt2.ours`."""
    model, params = gpt2_lib.ours()
    config = transformers.GPT2Config(**gpt2_lib.SIZES, **gpt2_lib.DROPOUT, **gpt2_lib.TOKENS)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    named = golden.by_hf_name(model.config, params)
    loaded = theirs.load_state_dict({k: torch.tensor(v) for k, v in named.items()}, strict=False)
    assert (
        loaded.missing_keys == ["lm_head.weight"] and not loaded.unexpected_keys
    )  # the head is tied
    return theirs


def their_answer(case: dict):
    """Returns transformers' output for a case."""
    options = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    options |= case["options"]
    ids, mask = (torch.as_tensor(case[name]) for name in ("ids", "mask"))
    with torch.no_grad():
        return gpt2().generate(ids, attention_mask=mask, **options)


def check(case: dict) -> None:
    expected, output = their_answer(case), gpt2_lib.answer(case)
    np.testing.assert_array_equal(output.sequences, expected.sequences.numpy())
    scores = np.stack([s.numpy() for s in expected.scores])
    logits = np.stack([s.numpy() for s in expected.logits])
    if output.beam_indices is not None:
        summed = expected.sequences_scores.numpy()
        np.testing.assert_allclose(output.sequences_scores, summed, atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(output.beam_indices, expected.beam_indices.numpy())
        # Theirs continue to the end of the search, ours to the end of the result.
        scores, logits = scores[: len(output.scores)], logits[: len(output.logits)]
    else:
        # Theirs continue after the end of a row, from its padding.
        ended = np.isnan(output.logprobs.T)
        assert np.isnan(output.scores[ended]).all() and np.isnan(output.logits[ended]).all()
        scores[ended] = logits[ended] = np.nan
    # fp32 sums of up to 64 terms in a different order; penalties double the error.
    np.testing.assert_allclose(output.scores, scores, atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(output.logits, logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beams", [False, True])
def test_random_cases_are_those_of_transformers(seed, beams):
    check(gpt2_lib.random_case(2000 + seed, beams))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("beams", [False, True])
def test_many_random_cases_are_those_of_transformers(seed, beams):
    check(gpt2_lib.random_case(1000 + seed, beams))


def test_the_recorded_answers_are_current():
    for case in gpt2_lib.recorded():
        assert their_answer(case).sequences.tolist() == case["sequences"]


def record() -> None:
    """Records transformers' answers."""
    cases = []
    for seed in range(12):
        for beams in (False, True):
            case = gpt2_lib.random_case(seed, beams)
            output = their_answer(case)
            case["sequences"] = output.sequences.tolist()
            if beams:
                case["sequences_scores"] = output.sequences_scores.tolist()
                case["beam_indices"] = output.beam_indices.tolist()
            cases.append(case)
    lines = ",\n".join(map(json.dumps, cases))
    gpt2_lib.RECORDED.write_text(f"[\n{lines}\n]\n")


def their_warpers(o: GenerationOptions, min_keep: int):
    keep = dict(min_tokens_to_keep=min_keep)
    warpers = []
    if o.temperature != 1:
        warpers.append(theirs.TemperatureLogitsWarper(o.temperature))
    if o.top_k:
        warpers.append(theirs.TopKLogitsWarper(o.top_k, **keep))
    if o.top_p < 1:
        warpers.append(theirs.TopPLogitsWarper(o.top_p, **keep))
    if o.min_p is not None:
        warpers.append(theirs.MinPLogitsWarper(o.min_p, **keep))
    if o.typical_p < 1:
        warpers.append(theirs.TypicalLogitsWarper(o.typical_p, **keep))
    if o.epsilon_cutoff:
        warpers.append(theirs.EpsilonLogitsWarper(o.epsilon_cutoff, **keep))
    if o.eta_cutoff:
        warpers.append(theirs.EtaLogitsWarper(o.eta_cutoff, **keep))
    return theirs.LogitsProcessorList(warpers)


@pytest.mark.parametrize("seed", range(60))
def test_warpers_are_those_of_transformers(seed):
    r, rng = Random(seed), np.random.default_rng(seed)
    possible = dict(
        temperature=r.choice([0.3, 1.7]), top_k=r.choice([1, 4, 40]), top_p=r.choice([0.2, 0.9]),
        min_p=r.choice([0.05, 0.5]), typical_p=r.choice([0.2, 0.8]),
        epsilon_cutoff=r.choice([0.02, 0.3]), eta_cutoff=r.choice([0.02, 0.3]),
    )  # fmt: skip
    chosen = {n: possible[n] for n in r.sample(sorted(possible), r.choice([1, 1, 2, 3]))}
    options = GenerationOptions(do_sample=True, **({"top_k": 0} | chosen))
    scores = rng.normal(0, 2.5, (4, 31)).astype(np.float32)
    scores[0, 3:9] = -np.inf
    keep = r.choice([1, 2, 3])
    expected = their_warpers(options, keep)(None, torch.as_tensor(scores)).numpy()
    candidates = row_options.rule_sizes([options]).candidates
    rows = row_options.row_options([options] * 4, [()] * 4)
    output = np.asarray(warp_scores(jnp.asarray(scores), rows, candidates, keep))
    np.testing.assert_array_equal(np.isfinite(output), np.isfinite(expected))
    np.testing.assert_allclose(output, expected, rtol=1e-6)


def test_invalid_values_are_removed_as_in_transformers():
    scores = np.array([[np.nan, np.inf, -np.inf, 1.0]], np.float32)
    context = processors.ProcessorContext(
        np.zeros((1, 4), int), *(np.array([n]) for n in (2, 0, 1, 0, 9))
    )
    options = row_options.row_options([GenerationOptions(remove_invalid_values=True)], [()])
    output = processors.apply_processors(jnp.asarray(scores), context, options, (), ())
    expected = theirs.InfNanRemoveLogitsProcessor()(None, torch.as_tensor(scores)).numpy()
    np.testing.assert_array_equal(output, expected)


@functools.cache
def letter_tokenizers():
    """Returns a byte-level tokenizer with tokens of one to four letters, and its wrapped form."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["a", "b", "c", "Ġ", "ab", "bc", "abc", "ca", "aa", "bb", "Ġa", "cab", "abca", "Ċ",
              "Ã", "©", "bĠ", "cc", "ccc", "ac", "aĠb", "Ġc", "<|end|>"]  # fmt: skip
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner, transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("seed", range(30))
def test_the_stop_automaton_agrees_with_transformers(seed):
    from transformers.generation.stopping_criteria import StopStringCriteria

    from btlm_jax.generation import stop_automaton

    r, rng = Random(seed), np.random.default_rng(seed)
    inner, wrapped = letter_tokenizers()
    stops = ["".join(r.choice("aabbc é\n") for _ in range(r.randint(1, 4))) for _ in range(3)]
    criterion = StopStringCriteria(wrapped, stops)
    table = stop_automaton.build_stop_table(stops, inner if seed % 2 else wrapped, gpt2_lib.VOCAB)
    ids = rng.integers(0, gpt2_lib.VOCAB, (20, 12))
    state = stop_automaton.stop_state_after_prompt(table, ids[:, :4], np.ones((20, 4), int))
    for end in range(5, 13):
        state, completed = stop_automaton.advance_stop_state(table, state, ids[:, end - 1])
        expected = criterion(torch.as_tensor(ids[:, :end]), None).numpy()
        np.testing.assert_array_equal(completed, expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_stop_strings_end_rows_as_in_transformers(beams):
    inner, wrapped = letter_tokenizers()
    rng = np.random.default_rng(beams)
    for stops in (["ca", "bb"], ["ab"]):
        ids = rng.integers(1, gpt2_lib.VOCAB, (1, 4))
        options = dict(
            max_new_tokens=20, num_beams=beams, stop_strings=stops, repetition_penalty=1.5
        )
        options |= dict(eos_token_id=22, pad_token_id=22)
        with torch.no_grad():
            expected = gpt2().generate(torch.as_tensor(ids), tokenizer=wrapped, **options)
        output = generate(*gpt2_lib.ours(), ids, tokenizer=inner, **options)
        np.testing.assert_array_equal(output, expected.numpy())


if __name__ == "__main__":
    record()
