"""Loading tokenizers from directories."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from btlm_jax.data.tokenize import tokenize
from btlm_jax.data.tokenizer import (
    MAX_PROMPT_CHARACTERS,
    check_vocabulary,
    encode_fragment,
    encode_prompt,
    load_tokenizer,
    tokenizers_match,
)
from btlm_jax.utils.notices import warn_once

TEXT = "The quick brown fox, the lazy dog. Ünïcode 🙂\n\tand tabs"


@pytest.fixture(scope="module")
def bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer


def test_gpt2_files_are_loaded_with_end_of_text_as_one_token(bpe, tmp_path):
    bpe.model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    vocab["<|endoftext|>"] = len(vocab)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode(TEXT + "<|endoftext|>").ids
    assert ids[:-1] == bpe.encode(TEXT).ids
    assert ids[-1] == vocab["<|endoftext|>"]
    assert tokenizer.decode(ids) == TEXT


def test_added_tokens_must_follow_the_vocabulary(bpe, tmp_path):
    bpe.model.save(str(tmp_path))
    size = bpe.get_vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": size}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<|user|>fox").ids == [size, *bpe.encode("fox").ids]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": size + 5}))
    with pytest.raises(ValueError, match="does not follow vocab"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_is_found_in_a_checkpoint(bpe, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    bpe.save(str(tmp_path / "tokenizer/tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(TEXT).ids == bpe.encode(TEXT).ids


def test_truncation_and_padding_are_disabled(bpe, tmp_path):
    limited = Tokenizer.from_str(bpe.to_str())
    limited.enable_truncation(4)
    limited.enable_padding(length=64)
    limited.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids) == 64
    assert load_tokenizer(tmp_path).encode(TEXT).ids == bpe.encode(TEXT).ids


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json, nor vocab\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot parse the tokenizer"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(bpe):
    check_vocabulary(bpe, 300)
    check_vocabulary(bpe, 512)
    with pytest.raises(ValueError, match="vocab_size is 200"):
        check_vocabulary(bpe, 200)


def test_added_tokens_without_an_embedding_are_a_warning_until_a_text_contains_one(
    bpe, tmp_path, caplog
):
    size = bpe.get_vocab_size()
    tokenizer = Tokenizer.from_str(bpe.to_str())
    tokenizer.add_special_tokens([f"[PAD{i}]" for i in range(6)])
    tokenizer.add_tokens(["<user>"])
    check_vocabulary(tokenizer, size)
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"'[PAD0]' ({size})" in message and "and 3 more; texts that contain them" in message
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("fine [PAD0]")  # special tokens in a text are plain text
    options = dict(vocab_size=size, eos="!")
    assert tokenize(tmp_path / "a.txt", tmp_path / "t", tmp_path, **options).documents == 1
    (tmp_path / "a.txt").write_text("bad <user>")
    with pytest.raises(ValueError, match=rf"contains '<user>' \({size + 6}\), .* has no embedding"):
        tokenize(tmp_path / "a.txt", tmp_path / "u", tmp_path, **options)


def test_tokenizers_match_by_tokens_and_merges_and_not_by_file_format(bpe, tmp_path):
    bpe.model.save(str(tmp_path))
    files = load_tokenizer(tmp_path)
    assert tokenizers_match(files, bpe) and tokenizers_match(files, files)
    state = json.loads(bpe.to_str())
    merges = state["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]
    assert not tokenizers_match(Tokenizer.from_str(json.dumps(state)), bpe)
    files.add_tokens(["<|new|>"])
    assert not tokenizers_match(files, bpe)


def with_special_tokens(bpe, template: str) -> Tokenizer:
    """Returns the tokenizer with special tokens around every text ($A)."""
    tokenizer = Tokenizer.from_str(bpe.to_str())
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokens = [
        (token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>") if token in template
    ]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return tokenizer


def test_a_prompt_keeps_a_bos_and_loses_an_eos_that_the_tokenizer_adds(bpe, caplog):
    warn_once.cache_clear()
    plain = bpe.encode("the fox").ids
    assert encode_prompt(bpe, "the fox") == plain and not caplog.records
    both = with_special_tokens(bpe, "<s> $A </s>")
    bos, eos = (both.token_to_id(token) for token in ("<s>", "</s>"))
    assert encode_prompt(both, "the fox") == [bos, *plain]
    assert "the tokenizer adds </s> after every text: left off prompts" in caplog.text
    assert encode_prompt(both, "<s>the fox</s>") == [bos, *plain, eos]  # those of the text stay
    assert "a prompt begins with <s>: not added a second time" in caplog.text
    assert encode_prompt(with_special_tokens(bpe, "$A </s>"), "the fox") == plain


def test_a_fragment_has_no_special_tokens(bpe):
    for template in ("$A", "<s> $A", "$A </s>", "<s> $A </s>"):
        tokenizer = with_special_tokens(bpe, template)
        for word in ("quick", " quick", "the lazy dog"):  # a leading space matters
            assert encode_fragment(tokenizer, word) == bpe.encode(word).ids
    assert encode_fragment(bpe, " quick") != encode_fragment(bpe, "quick")


@pytest.mark.parametrize("encode", [encode_prompt, encode_fragment])
@pytest.mark.parametrize(
    "text, message",
    [
        (None, r"found None, expected text \(a str\)"),
        (["a"], r"found \['a'\], expected text"),
        ("", "found no text, expected at least one character"),
        ("caf\udce9", "found the byte 0xE9 after 'caf', expected UTF-8: convert it, as with iconv"),
        ("\ud800", r"found the unpaired surrogate U\+D800 after '', expected UTF-8"),
    ],
)
def test_what_is_no_text_is_refused(bpe, encode, text, message):
    with pytest.raises(ValueError, match=message):
        encode(bpe, text)


def test_a_prompt_that_is_too_long_to_encode_is_refused(bpe):
    with pytest.raises(ValueError, match="found 2,097,153 characters, expected at most 2,097,152"):
        encode_prompt(bpe, "x" * (MAX_PROMPT_CHARACTERS + 1))


def test_text_that_a_tokenizer_drops_is_refused(bpe):
    from tokenizers import normalizers

    stripping = Tokenizer.from_str(bpe.to_str())
    stripping.normalizer = normalizers.Strip()
    with pytest.raises(ValueError, match="found ' ', which has no token"):
        encode_fragment(stripping, " ")
    with pytest.raises(ValueError, match="found ' ', which the tokenizer drops"):
        encode_prompt(stripping, " ")
