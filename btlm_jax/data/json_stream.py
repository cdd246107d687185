"""A string in a JSON object that is too large to be held in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

_WHITE_SPACE = re.compile(r"[ \t\n\r]*")
# What may be decoded without seeing more: a high surrogate needs to know what follows it.
_DECODABLE = re.compile(
    r'(?:[^"\\\x00-\x1f]+'
    r'|\\["\\/bfnrt]'
    r"|\\u(?![dD][89abAB])[0-9a-fA-F]{4}"
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}(?=[^\\]|\\[^u]|\\u[0-9a-fA-F]{4})"
    r")*+"
)
_LONGEST_ESCAPE = len(r"\ud83d\ude00")
_SCALAR = re.compile(
    r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null|NaN|-?Infinity"
)
_LONGEST_SCALAR = 1 << 20
_LONGEST_NAME = 1 << 20
_DEEPEST = 1000
_TYPES = {"{": "dict", "[": "list", '"': "str", "t": "bool", "f": "bool", "n": "NoneType"}


class JsonFieldError(ValueError):
    """JSON that has no string in the field; the message says why."""


def stream_string_field(blocks: Iterator[bytes], field: str) -> Iterator[str]:
    """Yields the string in a field of a JSON object in pieces, as `json.loads` decodes it.

    All of the JSON is checked, which takes until the last piece.

    Args:
      blocks: the bytes of the object, cut anywhere.
      field: name of the field.

    Raises:
      JsonFieldError: no object, no such field or no string in it, or a damaged object.
    """
    source, names = _JsonSource(blocks), []
    found = source.peek()
    if found != "{":
        kind = source.kind_of_value()
        raise JsonFieldError(f"found {kind}, expected an object with the field {field!r}")
    source.expect("{")
    more = source.peek() != "}"
    while more:
        name = source.name()
        if name != field:
            source.skip_value()
        elif name in names:
            raise JsonFieldError(f"the field {field!r} twice in one large object, expected once")
        elif (kind := source.kind_of_value()) != "str":
            raise JsonFieldError(f"field {field!r}: found {kind}, expected a string")
        else:
            yield from source.string()
        if name == field or len(names) < 20:
            names.append(name)
        if more := source.peek() == ",":
            source.expect(",")
    source.expect("}")
    if source.peek():
        raise source.error("data after the object")
    if field not in names:
        raise JsonFieldError(f"no field {field!r}, found {', '.join(map(repr, names)) or 'none'}")


class _JsonSource:
    """The text of some JSON, of which little more than a block is held at a time."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._ended = blocks, False
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._position = "", 0
        self._bytes = self._dropped = 0  # bytes decoded, characters no longer in `_text`

    def _fill(self) -> bool:
        """Reads another block. Returns False at the end."""
        if self._ended:
            return False
        block = next(self._blocks, None)
        self._ended = block is None
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(block or b"", final=self._ended)
        except UnicodeDecodeError as e:
            at = self._bytes - pending + e.start
            raise JsonFieldError(f"not UTF-8 ({e.reason} at byte {at} of the line)") from e
        self._bytes += len(block or b"")
        self._dropped += self._position
        self._text, self._position = self._text[self._position :] + text, 0
        return not self._ended

    def error(self, problem: str) -> JsonFieldError:
        """Returns the error to raise for JSON that is damaged at the current position."""
        return JsonFieldError(f"not JSON ({problem} at character {self._dropped + self._position})")

    def peek(self) -> str:
        """Returns the next character that is not white space, "" at the end."""
        while True:
            self._position = self._end_of(_WHITE_SPACE)
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._fill():
                return ""

    def _end_of(self, pattern: re.Pattern[str]) -> int:
        """Returns where a pattern ends that matches at the current position, if only nothing."""
        match = pattern.match(self._text, self._position)
        assert match is not None
        return match.end()

    def expect(self, character: str) -> None:
        """Reads one character after white space."""
        if self.peek() != character:
            raise self.error(f"expected {character!r}")
        self._position += 1

    def kind_of_value(self) -> str:
        """Returns the Python type of the next value."""
        character = self.peek()
        if not character:
            raise self.error("expected a value")
        return _TYPES.get(character, "number")

    def name(self) -> str:
        """Reads the name of a field, and the colon after it."""
        pieces, size = [], 0
        for piece in self.string():
            pieces.append(piece)
            size += len(piece)
            if size > _LONGEST_NAME:
                raise self.error(f"a name of more than {_LONGEST_NAME:,} characters")
        self.expect(":")
        return "".join(pieces)

    def string(self) -> Iterator[str]:
        """Reads a string and yields it in pieces."""
        self.expect('"')
        while True:
            end = self._end_of(_DECODABLE)
            if end > self._position:
                piece = self._text[self._position : end]
                self._position = end
                yield json.loads(f'"{piece}"') if "\\" in piece else piece
            elif self._text[end : end + 1] == '"':
                self._position = end + 1
                return
            elif len(self._text) - end >= _LONGEST_ESCAPE or not self._fill():
                raise self.error("a string that does not end, or a bad character in it")

    def skip_value(self) -> None:
        """Reads any value."""
        closing: list[str] = []  # of the lists and objects around
        while True:
            character = self.peek()
            if character == '"':
                for _ in self.string():
                    pass
            elif character in ("{", "["):
                self.expect(character)
                closing.append("}" if character == "{" else "]")
                if len(closing) > _DEEPEST:
                    raise self.error(f"nested more than {_DEEPEST} deep")
                if self.peek() != closing[-1]:
                    if character == "{":
                        self.name()
                    continue
            else:
                self._skip_scalar()
            while closing and self.peek() == closing[-1]:
                self.expect(closing.pop())
            if not closing:
                return
            self.expect(",")
            if closing[-1] == "}":
                self.name()

    def _skip_scalar(self) -> None:
        while True:
            match = _SCALAR.match(self._text, self._position)
            end = match.end() if match else self._position
            size = len(self._text) - self._position
            # It may continue in the next block, also after "." or "e+".
            may_continue = end + 2 >= len(self._text) or (match is None and size < len("-Infinity"))
            if may_continue and size < _LONGEST_SCALAR and not self._ended:
                self._fill()
                continue
            if match is None:
                raise self.error("expected a value")
            self._position = end
            return
