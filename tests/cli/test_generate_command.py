"""`btlm generate`: text and special tokens on the command line, and defaults of the checkpoint."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, processors

from btlm_jax import cli, save
from btlm_jax.utils.notices import warn_once


def run(capsys, *argv):
    warn_once.cache_clear()
    code = cli.main(["generate", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(scope="module")
def checkpoint_with_bos(of_bytes, tmp_path_factory):
    """The model of bytes, with a tokenizer that adds BOS and a file of defaults that samples."""
    model, params, tokenizer = of_bytes
    home = tmp_path_factory.mktemp("bos")
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    special = [("<|endoftext|>", 256)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=special
    )
    tokenizer.save(str(home / "tokenizer.json"))
    fields = {"do_sample": True, "top_k": 0, "max_new_tokens": 6, "top_h": 0.5}
    (home / "generation_config.json").write_text(json.dumps(fields))
    assets = [home / "tokenizer.json", home / "generation_config.json"]
    save(home / "checkpoint", model.config, params, assets=assets)
    return home / "checkpoint"


def test_bad_words_do_not_occur_although_the_tokenizer_adds_special_tokens(
    capsys, checkpoint_with_bos
):
    options = ("--greedy", "--max-new-tokens", "3")
    texts = (
        (prompt, run(capsys, checkpoint_with_bos, "--prompt", prompt, *options)[1])
        for prompt in "WABCDEFGH"
    )
    prompt, free = next(pair for pair in texts if pair[1][1].isascii() and pair[1][1].isprintable())
    argv = (checkpoint_with_bos, "--prompt", prompt, *options, "--bad-words")
    code, text, _ = run(capsys, *argv, free[1], f" {free[1]}")
    assert code == 0 and text.startswith(prompt) and free[1] not in text[1:]


def test_defaults_of_the_checkpoint_apply_and_are_named(capsys, checkpoint_with_bos):
    argv = (checkpoint_with_bos, "--prompt", "Hello")
    code, sampled, err = run(capsys, *argv, "--seed", "1")
    assert code == 0 and "--seed" not in err
    assert "generation_config.json: sets --sample, --top-k 0, --max-new-tokens 6 (explicit" in err
    assert "not applied, because not supported: top_h=0.5" in err
    assert run(capsys, *argv, "--seed", "2")[1] != sampled
    greedy = run(capsys, *argv, "--greedy")
    plain = run(capsys, *argv, "--no-model-defaults", "--max-new-tokens", "6")
    assert greedy[:2] == plain[:2] and greedy[1] != sampled
    assert "generation_config.json" not in plain[2]


def test_the_word_none_is_a_prompt(capsys, bytes_checkpoint):
    code, out, _ = run(capsys, bytes_checkpoint, "--prompt", "None", "--max-new-tokens", "3")
    assert code == 0 and out.startswith("None")


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--prompt", "caf\udce9"), "--prompt: found the byte 0xE9 after 'caf', expected UTF-8"),
        (("--prompt", "a", "--bad-words", "\udce9"), "--bad-words: found the byte 0xE9"),
        (("--prompt", "a", "--stop-strings", "\udce9"), "--stop-strings: found the byte 0xE9"),
        (("--prompt", "a", "--sample", "--greedy"), "--sample: found it with --greedy"),
        (("--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens: found 0, expected >= 1"),
        (("--prompt", "a", "--sample", "--top-p", "0"), "--top-p: found 0.0, expected a prob"),
        (("--prompt", "a", "--sample", "--seed", "-1"), "--seed: found -1, expected integers"),
    ],
)
def test_bad_options_are_named_as_they_were_given(capsys, bytes_checkpoint, argv, message):
    code, out, err = run(capsys, bytes_checkpoint, *argv)
    assert code == 2 and message in err and not out


def test_a_seed_without_sampling_is_warned_about(capsys, bytes_checkpoint):
    argv = ("--prompt", "None", "--max-new-tokens", "3", "--seed", "4")
    code, _, err = run(capsys, bytes_checkpoint, *argv)
    assert code == 0 and "--seed 4 does nothing without --sample" in err
