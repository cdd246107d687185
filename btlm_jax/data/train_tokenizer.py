"""Byte-level BPE tokenizers, trained on text of one's own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from btlm_jax.data.split import SplitPart
from btlm_jax.data.text_files import OnError, TextFile, TextReader
from btlm_jax.data.tokenizer import END_OF_TEXT

logger = logging.getLogger(__name__)

SAMPLE_CHARACTERS = 64 << 20  # more would hardly change which pairs are frequent
_SMALLEST = 257  # every byte, and the end of a document


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE as GPT-2's; `<|endoftext|>` is token 0. The same texts, the same BPE.

    Args:
      texts: to learn the merges from.
      vocab_size: tokens in all; fewer, with a warning, if the texts do not hold as many pairs.

    Raises:
      ValueError: the vocabulary is smaller than that of the bytes.
    """
    if vocab_size < _SMALLEST:
        raise ValueError(
            f"new_tokenizer: found {vocab_size}, expected at least {_SMALLEST}: the bytes and "
            f"{END_OF_TEXT}"
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
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        logger.warning("the text gives the tokenizer %d tokens, not %d", found, vocab_size)
    return tokenizer


def sample_texts(
    files: Sequence[TextFile],
    field: str,
    *,
    on_error: OnError = "raise",
    part: SplitPart | None = None,
    characters: int = SAMPLE_CHARACTERS,
) -> Iterator[str]:
    """The beginning of every file: text to learn a tokenizer from, and no more than is needed.

    Each file gives its first documents up to an equal share of what is left of `characters`; what
    a small file leaves goes to those after it.

    Args:
      files, field, on_error, part: as of `TextReader`.
      characters: in all.

    Raises:
      ValueError: as `TextReader.documents`.
    """
    left = characters
    for i, file in enumerate(files):
        share = left // (len(files) - i)
        for document in TextReader([file], field, on_error=on_error, part=part).documents():
            if not share:
                break
            text = document.text[:share]
            left, share = left - len(text), share - len(text)
            yield text
