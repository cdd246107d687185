"""Text of one's own -> all that `btlm train` reads: a tokenizer, tokens, and tokens held out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from btlm_jax.data import split, token_shards
from btlm_jax.data.split import SplitPart
from btlm_jax.data.text_files import OnError, TextFile, expand_inputs
from btlm_jax.data.tokenize import Encoder, TokenizeReport, check_token_target, resume_key, tokenize
from btlm_jax.data.train_tokenizer import sample_texts, train_bpe
from btlm_jax.utils import atomic

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
    """Tokenizes text, with a tokenizer trained on it if there is none, and holds out a part of it.

    With `held_out`, the tokens lie in `target/train` and `target/held_out`; without, in `target`.
    What is held out follows from the text alone (`split.SplitPart`): whole documents by a hash of their
    text; of a single .txt file, which is one document, the end. A new tokenizer learns from what is
    not held out, at most from its first 64 Mi characters, spread evenly over the files. A run that
    was killed is continued by the same call, with the same result, byte for byte.

    Args:
      inputs, target, field, on_error, overwrite, options: as of `tokenize`.
      tokenizer: a directory with its files, or a checkpoint of ours. This, or `new_tokenizer`:
      new_tokenizer: train a byte-level BPE of so many tokens, `<|endoftext|>` among them.
      held_out: fraction of the documents to hold out.

    Returns:
      Of each directory of tokens, what was done for it.

    Raises:
      ValueError: both or neither of `tokenizer` and `new_tokenizer`; a vocabulary or fraction out
        of range; nothing held out, or nothing left; standard input, which cannot be read twice.
      FileNotFoundError, FileExistsError, ValueError: as `tokenize`.
    """
    if (tokenizer is None) == (new_tokenizer is None):
        found = "neither" if tokenizer is None else "both"
        raise ValueError(
            f"tokenizer, new_tokenizer: found {found}, expected one: a directory with a tokenizer, "
            "or the size of the vocabulary to train one with"
        )
    ours = token_shards.is_token_directory if held_out is None else _is_split
    check_token_target(target, overwrite=overwrite, ours=ours)
    options |= dict(field=field, on_error=on_error)
    if tokenizer is not None and held_out is None:
        return {Path(target): tokenize(inputs, target, tokenizer, overwrite=overwrite, **options)}
    files = expand_inputs(inputs, on_error=on_error)
    if any(f.path is None for f in files):
        raise ValueError(
            "standard input cannot be read twice, as new_tokenizer and held_out need; write it to "
            "a file first"
        )
    part = None
    if held_out is not None:
        split.check_fraction(held_out)
        part = SplitPart(held_out, held_out=False, one_document=[f.kind for f in files] == [".txt"])
    with _tokenizer(tokenizer, new_tokenizer, files, field, on_error, part) as home:
        if part is None:
            return {Path(target): tokenize(inputs, target, home, overwrite=overwrite, **options)}
        encoder = Encoder(home, options.get("eos"), options.get("vocab_size"))
        key = resume_key(files, encoder, [field, options.get("shard_tokens"), part])
        with atomic.new_directory(target, overwrite=overwrite, ours=ours, key=key) as stage:
            reports = {}
            # The smaller part first: that there is nothing in it is then known at once.
            for name, one in ((HELD_OUT, part._replace(held_out=True)), (TRAIN, part)):
                if name in stage.finished:
                    done = TokenizeReport(**stage.finished[name])
                    report = dataclasses.replace(
                        done, resumed=done.shards, fresh_tokens=0, seconds=0.0
                    )
                else:  # overwriting what was complete, but without a record, when a run was killed
                    report = tokenize(
                        inputs, stage.content / name, home, overwrite=True, part=one, **options
                    )
                    stage.record(name, dataclasses.asdict(report))
                reports[Path(target) / name] = report
    return reports


@contextlib.contextmanager
def _tokenizer(
    given: str | os.PathLike[str] | None,
    vocab_size: int | None,
    files: Sequence[TextFile],
    field: str,
    on_error: OnError,
    part: SplitPart | None,
) -> Iterator[str | os.PathLike[str]]:
    """A directory with the tokenizer's files.

    A new one is trained again when a run is taken up: the same text gives the same tokenizer.
    """
    if vocab_size is None:
        assert given is not None
        yield given
        return
    with tempfile.TemporaryDirectory() as home:
        texts = sample_texts(files, field, on_error=on_error, part=part)
        train_bpe(texts, vocab_size).save(str(Path(home) / "tokenizer.json"))
        yield home


def _is_split(directory: epath.Path) -> bool:
    """Whether a directory was written by `prepare`, with a part held out."""
    return all(token_shards.is_token_directory(directory / name) for name in (TRAIN, HELD_OUT))
