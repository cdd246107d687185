"""Byte-level BPE tokenizers from a directory of Hugging Face files."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from etils import epath
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from btlm_jax.utils import paths

# The files that `load_tokenizer` reads.
_READ = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
END_OF_TEXT = "<|endoftext|>"


def tokenizer_directory(directory: str | os.PathLike[str]) -> epath.Path:
    """The folder that holds a tokenizer's files.

    Args:
      directory: it; or a checkpoint of ours, which keeps them in `tokenizer/`; or one of a training
        run, which keeps them there once for all its checkpoints.
    """
    place = paths.location(directory)
    run = place.parent.parent if place.parent.name == "checkpoints" else place
    homes = [p for p in (place / "tokenizer", run / "tokenizer") if p.is_dir()]
    return homes[0] if homes else place


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Loads `tokenizer.json`, or GPT-2's `vocab.json`, `merges.txt` and any `added_tokens.json`.

    Texts are encoded whole and as they are: that a `tokenizer.json` asks to cut them off or to fill
    them up is left aside.

    Args:
      directory: of the files, or an Orbax checkpoint of ours (which keeps them in `tokenizer/`) or
        of a training run (which keeps them there once), or the URL of one.

    Raises:
      FileNotFoundError: neither is there; the message says where it looked.
      ValueError: a file that cannot be parsed.
    """
    home = tokenizer_directory(directory)
    if paths.is_remote(home):  # the tokenizers library reads local files
        found = paths.read_files(home, _READ)
        with tempfile.TemporaryDirectory() as copy:
            for name, data in found.items():
                if data is not None:
                    (Path(copy) / name).write_bytes(data)
            try:
                return load_tokenizer(copy)
            except (FileNotFoundError, ValueError) as e:
                raise type(e)(str(e).replace(copy, str(home))) from e
    whole, vocab, merges = (home / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            found = Tokenizer.from_file(str(whole))
            found.no_truncation()
            found.no_padding()
            return found
        if vocab.is_file() and merges.is_file():
            return _gpt2(vocab, merges)
    except Exception as e:  # the tokenizers library raises bare Exception
        raise ValueError(f"{home}: cannot parse the tokenizer ({e}); copy its files again") from e
    raise FileNotFoundError(
        f"{home}: no tokenizer.json, nor vocab.json with merges.txt; copy them from the model's "
        "repository into this directory"
    )


def _gpt2(vocab: epath.Path, merges: epath.Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if END_OF_TEXT in json.loads(vocab.read_text(encoding="utf-8")):
        # Without this the BPE would split the marker into pieces.
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    added = vocab.with_name("added_tokens.json")
    if added.is_file():
        named = json.loads(added.read_text(encoding="utf-8"))
        for token, index in sorted(named.items(), key=lambda item: item[1]):
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
            if tokenizer.token_to_id(token) != index:
                raise ValueError(
                    f"added_tokens.json gives {token!r} the id {index}, which does not follow "
                    "vocab.json; use a tokenizer.json instead"
                )
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError if the tokenizer has ids the model does not know.

    A model with more rows than the tokenizer has tokens is normal (rows are rounded up).
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"vocabulary mismatch: the tokenizer has ids up to {largest}, the model's vocab_size "
            f"is {vocab_size}; use the tokenizer the model was trained with"
        )


def tokenizers_match(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers know the same tokens by the same ids and merge alike.

    A `tokenizer.json` and the `vocab.json` and `merges.txt` it was made of are the same.
    """

    def known(tokenizer: Tokenizer):
        merges = json.loads(tokenizer.to_str())["model"].get("merges")
        return merges, tokenizer.get_vocab(with_added_tokens=True)

    return known(a) == known(b)
