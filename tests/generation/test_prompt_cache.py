"""Prompt caches give the same tokens as prompts without one, from memory and from disk."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from btlm_jax import BTLM, BTLMConfig, PromptCache, generate, make_mesh
from btlm_jax.model import attention_fused

NEW = 6


@pytest.fixture(scope="module")
def tiny():
    model = BTLM(dataclasses.replace(BTLMConfig.preset("tiny"), vocab_size=64))
    return model, model.init(jax.random.key(3))


@pytest.fixture(scope="module")
def texts():
    return np.random.default_rng(2).integers(0, 64, (3, 12))


def options(**more):
    return dict(max_new_tokens=NEW, eos_token_id=None) | more


@pytest.mark.parametrize("cached", [12, 5], ids=["whole prompt", "beginning"])
@pytest.mark.parametrize(
    "more",
    [{}, dict(do_sample=True, seed=5), dict(num_beams=2)],
    ids=["greedy", "sampled", "beams"],
)
def test_a_cache_gives_the_same_tokens_any_number_of_times(tiny, texts, cached, more):
    expected = generate(*tiny, texts, **options(**more))
    prompts = PromptCache.of(*tiny, texts[:, :cached])
    for _ in range(2):
        tokens = generate(*tiny, texts, prompt_cache=prompts, **options(**more))
        np.testing.assert_array_equal(tokens, expected)


def test_one_cached_prompt_begins_several_texts(tiny, texts):
    texts = np.concatenate([np.repeat(texts[:1, :7], 3, 0), texts[:, 7:]], 1)
    system = PromptCache.of(*tiny, texts[:1, :7])
    tokens = generate(*tiny, texts, prompt_cache=system, **options())
    np.testing.assert_array_equal(tokens, generate(*tiny, texts, **options()))


def test_padding_is_part_of_the_cached_prompt(tiny, texts):
    mask = np.ones_like(texts)
    mask[1, :3] = 0
    prompts = PromptCache.of(*tiny, texts[:, :6], attention_mask=mask[:, :6])
    tokens = generate(*tiny, texts, attention_mask=mask, prompt_cache=prompts, **options())
    expected = generate(*tiny, texts, attention_mask=mask, **options())
    np.testing.assert_array_equal(tokens, expected)
    with pytest.raises(ValueError, match="prompt_cache: found 3 prompts of 12 tokens that do not"):
        generate(*tiny, texts, prompt_cache=prompts, **options())


@pytest.mark.parametrize("data, tensor", [(1, 1), (2, 4)])
def test_a_mesh_gives_the_same_tokens(tiny, texts, data, tensor):
    """Including a mesh of one device and a batch of one row, whose sharding JAX drops."""
    model, _ = tiny
    mesh = make_mesh(data=data, fsdp=1, tensor=tensor, devices=jax.devices()[: data * tensor])
    params = model.init(jax.random.key(3), mesh=mesh)
    alone = generate(model, params, texts[:1], num_beams=2, **options())
    np.testing.assert_array_equal(alone, generate(*tiny, texts[:1], num_beams=2, **options()))
    prompts = PromptCache.of(model, params, texts[:, :5])
    tokens = generate(model, params, texts, prompt_cache=prompts, **options())
    np.testing.assert_array_equal(tokens, generate(*tiny, texts, **options()))


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_a_saved_cache_is_loaded_unchanged(tiny, texts, tmp_path, dtype):
    prompts = PromptCache.of(*tiny, texts, cache_dtype=dtype)
    prompts.save(tmp_path / "prompts.npz")
    loaded = PromptCache.load(tmp_path / "prompts.npz", *tiny)
    for a, b in zip(jax.tree.leaves(prompts.prompt), jax.tree.leaves(loaded.prompt), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    tokens = generate(*tiny, texts, prompt_cache=loaded, **options())
    expected = generate(*tiny, texts, prompt_cache=prompts, **options())
    np.testing.assert_array_equal(tokens, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.npz"]
    with pytest.raises(FileExistsError, match=r"prompts\.npz exists"):
        prompts.save(tmp_path / "prompts.npz")


def test_prefill_uses_fused_attention(tiny, texts, monkeypatch):
    """The kernel, interpreted here, is called once per layer, for the prompt only."""
    model, params = tiny
    lengths = []
    splash = attention_fused.splash_attention

    def record_lengths(q, *args, **kwargs):
        lengths.append(q.shape[2])
        return splash(q, *args, **kwargs)

    monkeypatch.setattr(attention_fused, "splash_attention", record_lengths)
    fused = dataclasses.replace(model, attention_implementation="splash")
    tokens = generate(fused, params, texts, **options())
    assert lengths == [32] * model.config.n_layer  # the bucket
    np.testing.assert_array_equal(tokens, generate(model, params, texts, **options()))


def test_files_that_are_no_cache_are_refused(tiny, texts, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such prompt cache"):
        PromptCache.load(tmp_path / "nothing.npz", *tiny)
    (tmp_path / "junk").write_text("junk")
    with pytest.raises(ValueError, match="junk: found no prompt cache"):
        PromptCache.load(tmp_path / "junk", *tiny)
    PromptCache.of(*tiny, texts).save(tmp_path / "prompts.npz")
    data = (tmp_path / "prompts.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.npz: found no prompt cache"):
        PromptCache.load(tmp_path / "cut.npz", *tiny)
    other = BTLM(dataclasses.replace(tiny[0].config, n_layer=1))
    with pytest.raises(ValueError, match="a prompt cache of another model"):
        PromptCache.load(tmp_path / "prompts.npz", other, other.init(jax.random.key(0)))


def test_cache_arguments_beside_a_prompt_cache_are_refused(tiny, texts):
    prompts = PromptCache.of(*tiny, texts)
    for arguments in (dict(cache_dtype="int8"), dict(cache_length=64)):
        with pytest.raises(
            ValueError, match=f"{next(iter(arguments))}: found .* beside prompt_cache"
        ):
            generate(*tiny, texts, prompt_cache=prompts, **options(**arguments))


def test_prompts_that_do_not_begin_with_the_cache_are_refused(tiny, texts):
    prompts = PromptCache.of(*tiny, texts[:, :5])
    for ids in (texts[:, 1:], texts[:, :4], texts[:2]):
        with pytest.raises(ValueError, match=r"make another with PromptCache\.of"):
            generate(*tiny, ids, prompt_cache=prompts, **options())
