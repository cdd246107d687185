"""Cuts of a long text at which its two sides encode separately to the ids of the whole text.

Tokenizers encode the words that their pre-tokenizer finds independently of each other, so a text
may be cut between two words. Which characters end a word is the tokenizer's own affair: a cut is
accepted only where the tokenizer itself, given the text around it, ends one word and begins
another, and where the two sides give the same ids apart as together. Normalizers, added tokens and
prefixed spaces are thereby taken into account without being known here.

What the surroundings say is confirmed from further away when the text is encoded: each piece is
encoded together with the beginning of the next, whose ids must come out the same (`Encoder`). As
the first piece begins where the text does, all cuts are right, one after the other.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tokenizers import Tokenizer

PIECE_CHARACTERS = 256 << 10  # enough to hide what a cut costs; encoding takes 139 bytes for each
LIMIT_CHARACTERS = 2 << 20  # without a cut; encoding takes up to 600 bytes for each (emoji)

# Characters on both sides of a cut that are encoded to check it, and number of cuts to try. The
# larger numbers are for words as long as that.
_SURROUNDINGS = ((1 << 10, 32), (32 << 10, 4), (512 << 10, 2))
# A single space between words begins the second one with nearly all tokenizers.
_SPACE = re.compile(r"(?<=\S)(?= \S)")
# Other cuts lie between a letter, digit, white space or symbol and a character of another kind.
_CHANGE = re.compile(
    r"(?<=[^\W\d_])(?=[\W\d_])|(?<=\d)(?=\D)|(?<=\s)(?=\S)|(?<=[^\w\s])(?=[\w\s])|(?<=_)(?=[^_])"
)


class CutText(NamedTuple):
    """A piece of a text, and the beginning of the next one; "" after the last piece."""

    text: str
    context: str


class NoCutError(ValueError):
    """A text that cannot be cut within the limit."""


class TextCutter:
    """Cuts texts for a tokenizer.

    Args:
      tokenizer: the tokenizer, with the settings that texts are encoded with. Later changes of it
        are not seen.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @functools.cached_property
    def _words(self) -> Tokenizer:
        """The tokenizer without the postprocessor, which hides where words begin."""
        words = Tokenizer.from_str(self._tokenizer.to_str())
        words.encode_special_tokens = self._tokenizer.encode_special_tokens
        words.post_processor = None
        return words

    def cut(self, blocks: Iterable[str]) -> Iterator[CutText]:
        """Yields the text of the blocks, joined, in pieces; a short text is a single piece.

        Args:
          blocks: the text, cut anywhere; about two of them and a piece are held in memory.

        Raises:
          NoCutError: `LIMIT_CHARACTERS` without a cut.
        """
        buffer, size = "", PIECE_CHARACTERS
        for block in blocks:
            buffer += block
            while len(buffer) > size + _SURROUNDINGS[0][0]:
                if found := self._find_cut(buffer, size):
                    position, end = found
                    yield CutText(buffer[:position], buffer[position:end])
                    buffer, size = buffer[position:], PIECE_CHARACTERS
                elif size < LIMIT_CHARACTERS:
                    size = min(2 * size, LIMIT_CHARACTERS)
                else:
                    raise NoCutError(
                        f"the tokenizer gives no place to cut the text within {size:,} characters, "
                        "and more are not encoded at once: put spaces or line ends into it, or "
                        "divide it into documents"
                    )
        yield CutText(buffer, "")

    def _find_cut(self, text: str, size: int) -> tuple[int, int] | None:
        """Returns the last cut found in text[:size], and the end of what it was checked with."""
        if self._tokenizer.pre_tokenizer is None:  # the whole text is one word
            return None
        positions: Iterable[int] = _candidates(text, size)
        for around, count in _SURROUNDINGS:
            too_long = []
            for position in itertools.islice(positions, count):
                start, end = max(0, position - around), min(len(text), position + around)
                accepted = self._check(text, start, position, end)
                if accepted:
                    return position, end
                if accepted is None:
                    too_long.append(position)
            positions = too_long
        return None

    def _check(self, text: str, start: int, position: int, end: int) -> bool | None:
        """Returns whether text[start:end] may be cut; None if a word beside the cut is longer."""
        whole = self._words.encode(text[start:end], add_special_tokens=False)
        begins = [
            span[0]
            for span, word, previous in zip(
                whole.offsets, whole.word_ids, [None, *whole.word_ids[:-1]], strict=True
            )
            if word != previous
        ]
        here = position - start
        if not (
            (start == 0 or any(0 < x < here for x in begins)) and any(x > here for x in begins)
        ):
            return None
        if here not in begins:
            return False
        sides = self._words.encode_batch_fast(
            [text[start:position], text[position:end]], add_special_tokens=False
        )
        return whole.ids == sides[0].ids + sides[1].ids


def _candidates(text: str, size: int) -> Iterator[int]:
    """Yields positions to cut text[:size] at, the most promising first, then from the end."""
    seen = set()
    near = max(1, size - 4096)
    for pattern, start in ((_SPACE, near), (_CHANGE, near), (_SPACE, 1), (_CHANGE, 1)):
        matches = [m.start() for m in pattern.finditer(text, start, size)][::-1]
        spread = matches[8 :: max(1, len(matches) // 4)]
        for position in itertools.chain(matches[:8], spread):
            # A combining mark may be joined with the character before it.
            if position not in seen and unicodedata.category(text[position])[0] != "M":
                seen.add(position)
                yield position
