"""Your own text to everything that `btlm train` reads: a tokenizer, tokens and held-out tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from btlm_jax.data.encoder import Encoder
from btlm_jax.data.split import SplitPart, check_fraction
from btlm_jax.data.text_files import OnError, TextFile, expand_inputs
from btlm_jax.data.token_shards import is_token_directory
from btlm_jax.data.tokenize import TokenizeReport, check_token_target, resume_key, tokenize
from btlm_jax.data.train_tokenizer import sample_texts, train_bpe
from btlm_jax.utils import atomic
from btlm_jax.utils.local_paths import local_path

TRAIN, HELD_OUT = "train", "held_out"


def prepare_tokens(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    new_tokenizer: int | None = None,
    held_out: float | None = None,
    field: str = "text",
    on_error: OnError = "raise",
    overwrite: bool = False,
    **options: Any,
) -> dict[Path, TokenizeReport]:
    """Tokenizes text, optionally with a tokenizer trained on it, and holds out a part of it.

    With `held_out`, writes `target/train` and `target/held_out`; without, writes `target`. The
    split follows from the text alone (`SplitPart`): it assigns whole documents by a hash of their
    text; a single .txt file, which is one document, is cut, and its end held out. A new tokenizer
    learns from at most 64 Mi characters of the training part, spread evenly over the files. After a
    kill, the same call continues, with the same result, byte for byte.

    Args:
      inputs, target, field, on_error, overwrite, options: as in `tokenize`.
      tokenizer: a directory with its files, or a checkpoint. Excludes `new_tokenizer`.
      new_tokenizer: train a byte-level BPE with this many tokens, including `<|endoftext|>`.
      held_out: fraction of the documents to hold out.

    Returns:
      The report of each directory of tokens.

    Raises:
      ValueError: both or neither of `tokenizer` and `new_tokenizer`; a vocabulary or fraction out
        of range; an empty part; standard input, which cannot be read twice.
      FileNotFoundError, FileExistsError, ValueError: as in `tokenize`.
    """
    if (tokenizer is None) == (new_tokenizer is None):
        count = "neither" if tokenizer is None else "both"
        raise ValueError(
            f"tokenizer, new_tokenizer: found {count}, expected one: a directory with a tokenizer, "
            "or the size of the vocabulary to train one with"
        )
    target = local_path(target, "target")
    ours = is_token_directory if held_out is None else _is_split_directory
    check_token_target(target, overwrite=overwrite, ours=ours)
    options |= dict(field=field, on_error=on_error)
    if tokenizer is not None and held_out is None:
        return {target: tokenize(inputs, target, tokenizer, overwrite=overwrite, **options)}
    files = expand_inputs(inputs, on_error=on_error, target=target)
    if any(f.path is None for f in files):
        raise ValueError(
            "standard input cannot be read twice, as new_tokenizer and held_out need; write it to "
            "a file first"
        )
    part = None
    if held_out is not None:
        check_fraction(held_out)
        one_document = [f.kind for f in files] == [".txt"]
        part = SplitPart(held_out, held_out=False, one_document=one_document)
    with _tokenizer_folder(tokenizer, new_tokenizer, files, field, on_error, part) as folder:
        if part is None:
            return {target: tokenize(inputs, target, folder, overwrite=overwrite, **options)}
        encoder = Encoder(folder, options.get("eos"), options.get("vocab_size"))
        key = resume_key(files, encoder, [field, options.get("shard_tokens"), part])
        with atomic.new_directory(target, overwrite=overwrite, ours=ours, key=key) as stage:
            # The smaller part first: if it is empty, that shows early.
            parts = {HELD_OUT: part._replace(held_out=True), TRAIN: part}
            return {
                target / name: _tokenize_part(stage, name, one, inputs, folder, options)
                for name, one in parts.items()
            }


def _tokenize_part(
    stage: atomic.StagedDirectory,
    name: str,
    part: SplitPart,
    inputs: Any,
    folder: Any,
    options: Any,
) -> TokenizeReport:
    """Tokenizes a part into the stage, unless an interrupted run has finished it."""
    if name in stage.finished:
        report = TokenizeReport(**stage.finished[name])
        return dataclasses.replace(report, resumed=report.shards, fresh_tokens=0, seconds=0.0)
    # A kill may have left a complete part without its record: overwrite it.
    report = tokenize(inputs, stage.content / name, folder, overwrite=True, part=part, **options)
    stage.record(name, dataclasses.asdict(report))
    return report


@contextlib.contextmanager
def _tokenizer_folder(
    tokenizer: str | os.PathLike[str] | None,
    vocab_size: int | None,
    files: Sequence[TextFile],
    field: str,
    on_error: OnError,
    part: SplitPart | None,
) -> Iterator[str | os.PathLike[str]]:
    """Yields a directory with the tokenizer's files.

    A resumed run trains a new tokenizer again: the same text gives the same tokenizer.
    """
    if vocab_size is None:
        assert tokenizer is not None
        yield tokenizer
        return
    with tempfile.TemporaryDirectory() as folder:
        texts = sample_texts(files, field, on_error=on_error, part=part)
        train_bpe(texts, vocab_size).save(str(Path(folder) / "tokenizer.json"))
        yield folder


def _is_split_directory(directory: epath.Path) -> bool:
    """Returns whether `prepare_tokens` wrote the directory, with a held-out part."""
    return all(is_token_directory(directory / name) for name in (TRAIN, HELD_OUT))
