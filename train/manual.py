"""The quickstart's text: Python's language reference, found on every machine with Python."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from btlm_jax.tokenizer import END_OF_TEXT


class Split(NamedTuple):
    """Documents to train on, and documents kept apart."""

    train: list[str]
    held_out: list[str]


def manual(held_out_every: int = 10) -> Split:
    """The pages of `pydoc_data.topics`; every tenth is held out.

    Pages quote one another at length, so each paragraph is kept once only, and none that occurs in
    a training page is left in a held-out one.
    """
    pages = [topics[name] for name in sorted(topics)]
    held = pages[::held_out_every]
    kept = [p for i, p in enumerate(pages) if i % held_out_every]
    seen: set[str] = set()
    return Split(_unique(kept, seen), _unique(held, seen))


def _unique(pages: list[str], seen: set[str]) -> list[str]:
    """Pages without the paragraphs in `seen`, to which theirs are added."""
    documents = []
    for page in pages:
        paragraphs = []
        for paragraph in page.strip().split("\n\n"):
            if paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
        if paragraphs:
            documents.append("\n\n".join(paragraphs) + "\n")
    return documents


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE as GPT-2's; `<|endoftext|>` is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents as one stream of token ids, `<|endoftext|>` after each. int32 [N]."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch(documents)
    return np.concatenate([np.array([*e.ids, end], np.int32) for e in encoded])


def unigram_entropy(tokens: np.ndarray) -> float:
    """The entropy of the token frequencies, nats per token: the best any unigram model can do."""
    p = np.unique(tokens, return_counts=True)[1] / tokens.size
    return float(-(p * np.log(p)).sum())


def training_batches(tokens: np.ndarray, batch_size: int, length: int, seed: int):
    """Yields int32 [batch_size, length] for ever: an epoch is every window once, shuffled.

    Windows overlap by one token, so that every token is predicted; each epoch starts at another
    offset, so that windows differ between epochs.
    """
    rng = np.random.default_rng(seed)
    pending: list[np.ndarray] = []
    while True:
        start = int(rng.integers(length - 1))
        starts = np.arange(start, tokens.size - length + 1, length - 1)
        pending += [tokens[s : s + length] for s in rng.permutation(starts)]
        while len(pending) >= batch_size:
            yield np.stack(pending[:batch_size])
            pending = pending[batch_size:]


def evaluation_batches(tokens: np.ndarray, batch_size: int, length: int, ignore: int):
    """Yields (input_ids, labels) covering every token once; the last batch is filled up.

    Filling is labelled `ignore`.
    """
    starts = range(0, tokens.size - 1, length - 1)
    ids = np.zeros((-(-len(starts) // batch_size) * batch_size, length), np.int32)
    labels = np.full_like(ids, ignore)
    for row, start in enumerate(starts):
        window = tokens[start : start + length]
        ids[row, : window.size] = labels[row, : window.size] = window
    for i in range(0, len(ids), batch_size):
        yield ids[i : i + batch_size], labels[i : i + batch_size]
