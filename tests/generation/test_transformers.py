"""Generation against transformers itself, where it is installed (extra `torch`).

On the tiny GPT-2 of `gpt2_cases`: random weights, prompts with left padding, options.
"""

from __future__ import annotations

import functools
import json
from random import Random

import jax.numpy as jnp
import numpy as np
import pytest

from btlm_jax import generate
from btlm_jax.generation import processors
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
    """transformers' model with the weights of `gpt2_cases.ours`."""
    model, params = gpt2_lib.ours()
    config = transformers.GPT2Config(**gpt2_lib.SIZES, **gpt2_lib.DROPOUT, **gpt2_lib.TOKENS)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    named = golden.by_hf_name(model.config, params)
    loaded = theirs.load_state_dict({k: torch.tensor(v) for k, v in named.items()}, strict=False)
    assert loaded.missing_keys == ["lm_head.weight"] and not loaded.unexpected_keys  # it is tied
    return theirs


def answer(case: dict):
    """What transformers makes of a case."""
    how = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)
    how |= case["options"]
    ids, mask = (torch.as_tensor(case[name]) for name in ("ids", "mask"))
    with torch.no_grad():
        return gpt2().generate(ids, attention_mask=mask, **how)


def check(case: dict) -> None:
    expected, got = answer(case), gpt2_lib.answer(case)
    np.testing.assert_array_equal(got.sequences, expected.sequences.numpy())
    scores = np.stack([s.numpy() for s in expected.scores])
    logits = np.stack([s.numpy() for s in expected.logits])
    if got.beam_indices is not None:
        summed = expected.sequences_scores.numpy()
        np.testing.assert_allclose(got.sequences_scores, summed, atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(got.beam_indices, expected.beam_indices.numpy())
        # Theirs go on to where the search ended, ours to the end of the result.
        scores, logits = scores[: len(got.scores)], logits[: len(got.logits)]
    else:
        # Theirs go on after the end of a row, from the filling.
        ended = np.isnan(got.logprobs.T)
        assert np.isnan(got.scores[ended]).all() and np.isnan(got.logits[ended]).all()
        scores[ended] = logits[ended] = np.nan
    # Sums of up to 64 terms in fp32, in another order; penalties double the error.
    np.testing.assert_allclose(got.scores, scores, atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(got.logits, logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beams", [False, True])
def test_random_cases(seed, beams):
    check(gpt2_lib.random_case(2000 + seed, beams))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("beams", [False, True])
def test_many_random_cases(seed, beams):
    check(gpt2_lib.random_case(1000 + seed, beams))


def test_the_recorded_answers():
    for case in gpt2_lib.recorded():
        assert answer(case).sequences.tolist() == case["sequences"]


def record() -> None:
    """Writes the recorded answers anew."""
    found = []
    for seed in range(12):
        for beams in (False, True):
            case = gpt2_lib.random_case(seed, beams)
            out = answer(case)
            case["sequences"] = out.sequences.tolist()
            if beams:
                case["sequences_scores"] = out.sequences_scores.tolist()
                case["beam_indices"] = out.beam_indices.tolist()
            found.append(case)
    lines = ",\n".join(map(json.dumps, found))
    gpt2_lib.RECORDED.write_text(f"[\n{lines}\n]\n")


# Rules one by one, on random scores ---------------------------------------------------------------


def their_warpers(o: GenerationOptions, keep: int):
    kept = dict(min_tokens_to_keep=keep)
    found = []
    if o.temperature != 1:
        found.append(theirs.TemperatureLogitsWarper(o.temperature))
    if o.top_k:
        found.append(theirs.TopKLogitsWarper(o.top_k, **kept))
    if o.top_p < 1:
        found.append(theirs.TopPLogitsWarper(o.top_p, **kept))
    if o.min_p is not None:
        found.append(theirs.MinPLogitsWarper(o.min_p, **kept))
    if o.typical_p < 1:
        found.append(theirs.TypicalLogitsWarper(o.typical_p, **kept))
    if o.epsilon_cutoff:
        found.append(theirs.EpsilonLogitsWarper(o.epsilon_cutoff, **kept))
    if o.eta_cutoff:
        found.append(theirs.EtaLogitsWarper(o.eta_cutoff, **kept))
    return theirs.LogitsProcessorList(found)


@pytest.mark.parametrize("seed", range(60))
def test_warpers(seed):
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
    got = np.asarray(warp_scores(jnp.asarray(scores), options, keep))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_remove_invalid_values():
    scores = np.array([[np.nan, np.inf, -np.inf, 1.0]], np.float32)
    context = processors.ProcessorContext(
        np.zeros((1, 4), int), *(np.array([n]) for n in (2, 0, 1, 0, 9))
    )
    got = processors.apply_processors(
        jnp.asarray(scores), context, GenerationOptions(remove_invalid_values=True), (), ()
    )
    expected = theirs.InfNanRemoveLogitsProcessor()(None, torch.as_tensor(scores)).numpy()
    np.testing.assert_array_equal(got, expected)


# Stop strings -------------------------------------------------------------------------------------


@functools.cache
def letters():
    """A byte-level tokenizer with tokens of one to four letters, in transformers' wrapping."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["a", "b", "c", "Ġ", "ab", "bc", "abc", "ca", "aa", "bb", "Ġa", "cab", "abca", "Ċ",
              "Ã", "©", "bĠ", "cc", "ccc", "ac", "aĠb", "Ġc", "<|end|>"]  # fmt: skip
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner, transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("seed", range(30))
def test_stop_strings_end_where_theirs_do(seed):
    from transformers.generation.stopping_criteria import StopStringCriteria

    from btlm_jax.generation import stop_automaton

    r, rng = Random(seed), np.random.default_rng(seed)
    inner, wrapped = letters()
    stops = ["".join(r.choice("aabbc é\n") for _ in range(r.randint(1, 4))) for _ in range(3)]
    criterion = StopStringCriteria(wrapped, stops)
    table = stop_automaton.build_stop_table(stops, inner if seed % 2 else wrapped, gpt2_lib.VOCAB)
    ids = rng.integers(0, gpt2_lib.VOCAB, (20, 12))
    state = stop_automaton.stop_state_after_prompt(table, ids[:, :4], np.ones((20, 4), int))
    for end in range(5, 13):
        state, hit = stop_automaton.advance_stop_state(table, state, ids[:, end - 1])
        expected = criterion(torch.as_tensor(ids[:, :end]), None).numpy()
        np.testing.assert_array_equal(hit, expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_stop_strings(beams):
    inner, wrapped = letters()
    rng = np.random.default_rng(beams)
    for stops in (["ca", "bb"], ["ab"]):
        ids = rng.integers(1, gpt2_lib.VOCAB, (1, 4))
        how = dict(max_new_tokens=20, num_beams=beams, stop_strings=stops, repetition_penalty=1.5)
        how |= dict(eos_token_id=22, pad_token_id=22)
        with torch.no_grad():
            expected = gpt2().generate(torch.as_tensor(ids), tokenizer=wrapped, **how)
        got = generate(*gpt2_lib.ours(), ids, tokenizer=inner, **how)
        np.testing.assert_array_equal(got, expected.numpy())


if __name__ == "__main__":
    record()
