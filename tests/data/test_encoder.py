"""Documents to token ids: text is only text, EOS ends documents, and few are held in memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from btlm_jax.data import encoder as encoder_lib
from btlm_jax.data import text_reader
from btlm_jax.data.token_shards import TokenShards
from btlm_jax.data.tokenize import tokenize
from support.texts import jsonl

EOS = "<|endoftext|>"


def write_bpe(folder: Path, **special: int) -> Path:
    """Writes a byte-level BPE without merges, with `special` token -> id added."""
    folder.mkdir()
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    # Settings that a tokenizer.json made for other purposes may have.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=4)
    name, index = next(iter(special.items()))
    tokenizer.post_processor = processors.TemplateProcessing(f"{name} $A", None, [(name, index)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_markers_truncation_padding_and_templates_do_not_touch_the_text(tmp_path):
    folder = write_bpe(tmp_path / "bpe", **{EOS: 256})
    text = f"a {EOS} in the text is no end: ünïcode"
    (tmp_path / "a.jsonl").write_bytes(jsonl([text, "b"]))
    tokenize(tmp_path / "a.jsonl", tmp_path / "t", folder)
    shards = TokenShards(tmp_path / "t", vocab_size=257)
    assert len(shards) == len(text.encode()) + 3 and shards.metadata.documents == 2
    assert np.flatnonzero(shards.read(0, len(shards)) == 256).tolist() == [
        len(text.encode()), len(shards) - 1
    ]  # fmt: skip


def test_eos_is_the_configured_or_given_token(tmp_path):
    folder = write_bpe(tmp_path / "bpe", **{"</s>": 256, "<end>": 257})
    (tmp_path / "a.jsonl").write_bytes(jsonl(["b"]))
    with pytest.raises(ValueError, match=r"no token '<\|endoftext\|>' to end documents with"):
        tokenize(tmp_path / "a.jsonl", tmp_path / "t", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    tokenize(tmp_path / "a.jsonl", tmp_path / "t", folder)
    assert TokenShards(tmp_path / "t").metadata.eos_id == 256
    copied = sorted(f.name for f in (tmp_path / "t/tokenizer").iterdir())
    assert copied == ["tokenizer.json", "tokenizer_config.json"]
    tokenize(tmp_path / "a.jsonl", tmp_path / "t", folder, eos="<end>", overwrite=True)
    assert TokenShards(tmp_path / "t").metadata.eos_id == 257
    # The directory serves as a tokenizer, as a checkpoint does.
    tokenize(tmp_path / "a.jsonl", tmp_path / "u", tmp_path / "t")
    assert TokenShards(tmp_path / "u").metadata.eos_id == 256


def test_ids_have_the_width_of_the_vocabulary(ascii_bpe, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["b"]))
    with pytest.raises(ValueError, match="ids up to 95, the model's vocab_size is 50"):
        tokenize(tmp_path / "a.jsonl", tmp_path / "t", ascii_bpe, vocab_size=50)
    for vocab, width in ((None, 2), (1 << 16, 2), (70_000, 4)):
        options = dict(vocab_size=vocab, overwrite=True)
        tokenize(tmp_path / "a.jsonl", tmp_path / "t", ascii_bpe, **options)
        assert (tmp_path / "t/tokens-00000.bin").stat().st_size == 2 * width
        assert TokenShards(tmp_path / "t").metadata.vocab_size == vocab or 96


def test_reading_is_only_a_few_batches_ahead_of_encoding(ascii_bpe):
    documents_read = 0

    def documents():
        nonlocal documents_read
        for i in range(10_000):
            documents_read += 1
            position, counts = text_reader.ReadPosition(0, i), text_reader.DocumentCounts()
            yield text_reader.TextPiece("word " * 20_000, "", True, True, position, counts)

    encoder = encoder_lib.Encoder(ascii_bpe, None, None)
    encoded = encoder_lib.encode_documents(documents(), encoder, 2)
    for _ in range(10):
        next(encoded)
    encoded.close()
    assert documents_read < 10 + 5 * 3  # batches of three such documents
