"""Byte-level BPE tokenizers, loaded from directories with Hugging Face's files.

`encode_prompt` and `encode_fragment` decide about special tokens; no other module encodes text
without saying whether the tokenizer adds them.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from etils import epath
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from btlm_jax.utils import paths
from btlm_jax.utils.format import join_first
from btlm_jax.utils.notices import warn_once

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
MAX_PROMPT_CHARACTERS = 2 << 20  # encoding takes up to 600 bytes of memory for each
# The files that `load_tokenizer` reads.
_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")


def tokenizer_directory(directory: str | os.PathLike[str]) -> epath.Path:
    """Returns the directory that holds the files of a tokenizer.

    Args:
      directory: a directory of tokenizer files; an Orbax checkpoint of this package, which holds
        them in `tokenizer/`; a checkpoint of a training run, whose run directory holds them in
        `tokenizer/`; or a run directory.
    """
    folder = paths.location(directory, "directory")
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    candidates = [p for p in (folder / "tokenizer", run / "tokenizer") if p.is_dir()]
    return candidates[0] if candidates else folder


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Loads `tokenizer.json`, or GPT-2's `vocab.json`, `merges.txt` and any `added_tokens.json`.

    Texts are encoded in full and without padding, even if a `tokenizer.json` enables truncation or
    padding.

    Args:
      directory: path or URL of a directory that `tokenizer_directory` accepts.

    Raises:
      FileNotFoundError: the files do not exist; the message names the directory searched.
      ValueError: a file cannot be parsed.
    """
    home = tokenizer_directory(directory)
    if paths.is_remote(home):  # the tokenizers library reads local files only
        contents = paths.read_files(home, _FILES)
        with tempfile.TemporaryDirectory() as copy:
            for name, data in contents.items():
                if data is not None:
                    (Path(copy) / name).write_bytes(data)
            try:
                return load_tokenizer(copy)
            except (FileNotFoundError, ValueError) as e:
                raise type(e)(str(e).replace(copy, str(home))) from e
    combined, vocab, merges = (home / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if combined.is_file():
            tokenizer = Tokenizer.from_file(str(combined))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer
        if vocab.is_file() and merges.is_file():
            return _load_gpt2(vocab, merges)
    except Exception as e:  # the tokenizers library raises bare Exception
        raise ValueError(f"{home}: cannot parse the tokenizer ({e}); copy its files again") from e
    raise FileNotFoundError(
        f"{home}: no tokenizer.json, nor vocab.json with merges.txt; copy them from the model's "
        "repository into this directory"
    )


def _load_gpt2(vocab: epath.Path, merges: epath.Path) -> Tokenizer:
    """Builds the tokenizer that transformers builds from GPT-2's files."""
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if END_OF_TEXT in json.loads(vocab.read_text(encoding="utf-8")):
        # Otherwise BPE would split the marker into pieces.
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    added = vocab.with_name("added_tokens.json")
    if added.is_file():
        ids = json.loads(added.read_text(encoding="utf-8"))
        for token, index in sorted(ids.items(), key=lambda item: item[1]):
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
            if tokenizer.token_to_id(token) != index:
                raise ValueError(
                    f"added_tokens.json gives {token!r} the id {index}, which does not follow "
                    "vocab.json; use a tokenizer.json instead"
                )
    return tokenizer


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes a text that a model continues.

    The tokenizer's special tokens before the text (BOS) are kept, unless the text begins with them
    itself. Those after it (EOS) are left off with a warning: a model would continue them with
    another text.

    Args:
      tokenizer: the tokenizer.
      text: the prompt.

    Returns:
      At least one token id.

    Raises:
      ValueError: no text, more than `MAX_PROMPT_CHARACTERS`, or text that is not valid Unicode.
    """
    check_text(text)
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(
            f"found {len(text):,} characters, expected at most {MAX_PROMPT_CHARACTERS:,}, which "
            "are encoded at once: shorten it"
        )
    encoding = tokenizer.encode(text, add_special_tokens=True)
    ids, is_added = list(encoding.ids), list(encoding.special_tokens_mask)
    end, start = len(ids), 0
    while end > 0 and is_added[end - 1]:
        end -= 1
    while start < end and is_added[start]:
        start += 1
    if end < len(ids):
        warn_once(
            f"the tokenizer adds {_token_texts(tokenizer, ids[end:])} after every text: left off "
            "prompts, which would otherwise be continued with another text"
        )
    bos, ids = ids[:start], ids[start:end]
    if bos and ids[: len(bos)] == bos:
        warn_once(
            f"a prompt begins with {_token_texts(tokenizer, bos)}: not added a second time, "
            "although the tokenizer adds it to every text"
        )
        bos = []
    if not bos + ids:
        raise ValueError(f"found {text!r}, which the tokenizer drops, expected other text")
    return bos + ids


def encode_fragment(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes a part of a text, such as a forbidden word, without special tokens.

    A leading space is part of the fragment: " word" and "word" have different tokens.

    Raises:
      ValueError: no text, text that is not valid Unicode, or text without any token.
    """
    check_text(text)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise ValueError(f"found {text!r}, which has no token, expected text that has one")
    return list(ids)


def check_text(text: Any) -> None:
    """Raises ValueError for a value that is not a str, is empty, or is not valid Unicode."""
    if not isinstance(text, str):
        raise ValueError(f"found {text!r}, expected text (a str)")
    if not text:
        raise ValueError("found no text, expected at least one character")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        code, before = ord(text[e.start]), text[max(e.start - 20, 0) : e.start]
        # Bytes of the command line and of file names that are not UTF-8 arrive as these.
        if 0xDC80 <= code <= 0xDCFF:
            found, fix = f"the byte 0x{code - 0xDC00:02X}", "convert it, as with iconv -t utf-8"
        else:
            found, fix = f"the unpaired surrogate U+{code:04X}", "remove it, or add its pair"
        raise ValueError(f"found {found} after {before!r}, expected UTF-8: {fix}") from None


def _token_texts(tokenizer: Tokenizer, ids: list[int]) -> str:
    return " ".join(str(tokenizer.id_to_token(i)) for i in ids)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Compares a tokenizer with a model that may have more rows than the tokenizer has tokens.

    Added tokens without an embedding, such as a [PAD], are only warned about, because most texts
    never contain them.

    Raises:
      ValueError: the tokenizer's own vocabulary exceeds the model's: it belongs to another model.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"vocabulary mismatch: the tokenizer has ids up to {largest}, the model's vocab_size "
            f"is {vocab_size}: use the tokenizer the model was trained with"
        )
    if beyond := tokens_beyond(tokenizer, vocab_size):
        logger.warning(
            "the tokenizer has tokens for which the model (vocab_size %d) has no embedding: %s; "
            "texts that contain them are refused. If yours do, resize the model in transformers "
            "(resize_token_embeddings)", vocab_size, join_first(beyond, 4),
        )  # fmt: skip


def tokens_beyond(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """Returns the tokens, with their ids, that a model of `vocab_size` has no embedding for."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    beyond = sorted((i, token) for token, i in ids.items() if i >= vocab_size)
    return [f"{token!r} ({i})" for i, token in beyond]


def tokenizers_match(a: Tokenizer, b: Tokenizer) -> bool:
    """Returns whether two tokenizers have the same tokens, ids and merges.

    A `tokenizer.json` matches the `vocab.json` and `merges.txt` that it was made from.
    """

    def contents(tokenizer: Tokenizer):
        merges = json.loads(tokenizer.to_str())["model"].get("merges")
        return merges, tokenizer.get_vocab(with_added_tokens=True)

    return contents(a) == contents(b)
