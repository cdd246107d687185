"""Byte-level BPE tokenizers, trained on your own text."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from btlm_jax.data.split import SplitPart
from btlm_jax.data.text_cutter import TextCutter
from btlm_jax.data.text_files import OnError, TextFile
from btlm_jax.data.text_reader import TextReader
from btlm_jax.data.tokenizer import END_OF_TEXT

logger = logging.getLogger(__name__)

SAMPLE_CHARACTERS = 64 << 20  # more would hardly change which pairs are frequent
_MIN_VOCAB_SIZE = 257  # every byte, and the end of a document


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE like GPT-2's, with `<|endoftext|>` as token 0. Deterministic.

    Args:
      texts: the text to learn merges from.
      vocab_size: total number of tokens; the result has fewer, with a warning, if the texts do not
        contain enough pairs.

    Raises:
      ValueError: the vocabulary is too small to hold every byte.
    """
    if vocab_size < _MIN_VOCAB_SIZE:
        raise ValueError(
            f"new_tokenizer: found {vocab_size}, expected at least {_MIN_VOCAB_SIZE}: the bytes "
            f"and {END_OF_TEXT}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    logger.info("training a tokenizer of %d tokens", vocab_size)
    tokenizer.train_from_iterator(texts, trainer)
    if (trained_size := tokenizer.get_vocab_size()) < vocab_size:
        logger.warning("the text gives the tokenizer %d tokens, not %d", trained_size, vocab_size)
    return tokenizer


def sample_texts(
    files: Sequence[TextFile],
    field: str,
    *,
    on_error: OnError = "raise",
    part: SplitPart | None = None,
    characters: int = SAMPLE_CHARACTERS,
) -> Iterator[str]:
    """Yields the beginning of every file, as text to train a tokenizer on.

    Each file contributes its first documents, up to an equal share of the remaining characters; the
    unused share of a small file goes to the files after it.

    Args:
      files, field, on_error, part: as in `TextReader`.
      characters: total number of characters to yield, at most.

    Raises:
      ValueError: as in `TextReader.pieces`.
    """
    left, cutter = characters, TextCutter(_byte_tokenizer())
    # Which part a long document belongs to is known at its end.
    known = part is None or part.one_document
    for i, file in enumerate(files):
        share = left // (len(files) - i)
        reader = TextReader([file], field, cutter, on_error=on_error, part=part)
        held: list[str] = []  # the current document so far
        for piece in reader.pieces():
            text = piece.text[:share]
            left, share = left - len(text), share - len(text)
            held.append(text)
            if piece.ends and not piece.kept and not known:
                returned = sum(map(len, held))
                left, share, held = left + returned, share + returned, []
            if piece.ends or known:
                yield from held
                held = []
                if not share:
                    break


def _byte_tokenizer() -> Tokenizer:
    """Returns a tokenizer that finds the words that the new one will find, and knows only bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer
