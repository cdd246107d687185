"""Byte-level BPE tokenizers, loaded from directories with Hugging Face's files."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from etils import epath
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from btlm_jax.utils import paths

END_OF_TEXT = "<|endoftext|>"
# The files that `load_tokenizer` reads.
_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")


def tokenizer_directory(directory: str | os.PathLike[str]) -> epath.Path:
    """Returns the directory that holds the files of a tokenizer.

    Args:
      directory: a directory of tokenizer files; an Orbax checkpoint of this package, which holds
        them in `tokenizer/`; a checkpoint of a training run, whose run directory holds them in
        `tokenizer/`; or a run directory.
    """
    folder = paths.location(directory)
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


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError if the tokenizer has ids that the model does not have.

    A model may have more rows than the tokenizer has tokens, because rows are rounded up.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"vocabulary mismatch: the tokenizer has ids up to {largest}, the model's vocab_size "
            f"is {vocab_size}; use the tokenizer the model was trained with"
        )


def tokenizers_match(a: Tokenizer, b: Tokenizer) -> bool:
    """Returns whether two tokenizers have the same tokens, ids and merges.

    A `tokenizer.json` matches the `vocab.json` and `merges.txt` that it was made from.
    """

    def contents(tokenizer: Tokenizer):
        merges = json.loads(tokenizer.to_str())["model"].get("merges")
        return merges, tokenizer.get_vocab(with_added_tokens=True)

    return contents(a) == contents(b)
