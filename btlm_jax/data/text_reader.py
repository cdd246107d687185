"""Documents of several text files, one after the other.

A reader can start after any document: every document says where the next one begins. Documents
come in pieces that can be encoded separately. Pieces of a large one (`text_records.LARGE_BYTES`)
are read before it is known whether all of it can be used and which part of a split it belongs to,
so its last piece may take it back.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from btlm_jax.data.split import SplitPart, new_document_hash
from btlm_jax.data.text_cutter import CutText, NoCutError, TextCutter
from btlm_jax.data.text_files import OnError, TextFile
from btlm_jax.data.text_records import TextRecord, read_records
from btlm_jax.data.token_shards_metadata import TextSource

logger = logging.getLogger(__name__)

_BLOCK_CHARACTERS = 1 << 20
_MAX_LOGGED = 5  # unusable records that are logged one by one before they are only counted


class ReadPosition(NamedTuple):
    """Where a document begins.

    Attributes:
      file: index of the file.
      record: number of records of that file before the document.
      offset: uncompressed bytes of that file before the document.
      bytes_read: bytes of all files, as stored on disk, before the document.
    """

    file: int = 0
    record: int = 0
    offset: int = 0
    bytes_read: int = 0


_BEGINNING = ReadPosition()


class DocumentCounts(NamedTuple):
    """Counts of one file so far.

    Attributes:
      documents: documents with text.
      text_bytes: bytes of their text, in UTF-8.
      empty: documents without text.
      skipped: records that could not be used.
      elsewhere: documents that lie entirely in the other part of a split.
    """

    documents: int = 0
    text_bytes: int = 0
    empty: int = 0
    skipped: int = 0
    elsewhere: int = 0


class TextPiece(NamedTuple):
    """A document, or a piece of a long one.

    Attributes:
      text: the text.
      context: the beginning of the document's next piece, "" if it ends here.
      ends: whether the document ends here.
      kept: False in the last piece takes all pieces of the document back.
      next: where the next document begins; before the last piece only its `bytes_read` is known.
      counts: the counts of its file, this document included; without it before the last piece.
    """

    text: str
    context: str
    ends: bool
    kept: bool
    next: ReadPosition
    counts: DocumentCounts


class TextReader:
    """Reads the documents of several files, one after the other.

    Args:
      files: as returned by `expand_inputs`.
      field: field of JSON objects, or column, that holds the text.
      cutter: cuts long documents; None yields pieces that are cut anywhere.
      on_error: "raise", or "skip" unusable records and count them.
      begin: where to begin.
      counts: counts of the files up to and including that of `begin`; () at the beginning.
      part: the part of a split to read; None reads everything.

    Attributes:
      counts: counts of the files read so far.
    """

    def __init__(
        self,
        files: Sequence[TextFile],
        field: str,
        cutter: TextCutter | None = None,
        *,
        on_error: OnError = "raise",
        begin: ReadPosition = _BEGINNING,
        counts: Sequence[DocumentCounts] = (),
        part: SplitPart | None = None,
    ) -> None:
        self.counts, self._part = list(counts), part
        self._refused = 0
        self._files, self._field, self._on_error, self._begin = files, field, on_error, begin
        self._cut = cutter.cut if cutter else (lambda blocks: (CutText(b, "") for b in blocks))

    def pieces(self) -> Iterator[TextPiece]:
        """Yields the documents that have text, in pieces.

        Raises:
          ValueError: an unusable record (unless skipped), a damaged or changing file, or one
            without documents.
        """
        next_bytes = 0  # bytes of all files up to and including the current one
        for i, file in enumerate(self._files):
            file_begin, next_bytes = next_bytes, next_bytes + file.size
            if i < self._begin.file:
                continue
            begin = self._begin if i == self._begin.file else ReadPosition(i)
            if i == len(self.counts):
                self.counts.append(DocumentCounts())
            records = read_records(file, self._field, begin.record, begin.offset)
            for first in records:
                if first.ends:
                    yield from self._whole_document(i, first, file_begin)
                else:
                    rest = _until_end(records)
                    blocks = itertools.chain([first], rest)
                    yield from self._large_document(i, blocks, file_begin)
            file.check_unchanged()
            if not self.counts[i].documents + self.counts[i].elsewhere:
                problem = f"{file.name}: no documents with text"
                if self._on_error == "raise":
                    raise ValueError(f"{problem}; remove it, or pass on_error='skip'")
                logger.warning("%s", problem)

    def _whole_document(self, i: int, record: TextRecord, file_begin: int) -> Iterator[TextPiece]:
        problem = record.problem or _unicode_problem(record.text)
        text = ""
        cuts: list[CutText] = []
        if not problem:
            text = record.text if self._part is None else self._part.select(record.text)
            try:
                cuts = [*self._cut(_blocks(text))] if text else []
            except NoCutError as e:
                problem = str(e)
        self._count(i, record, problem, len(text.encode()) if not problem else 0, record.text != "")
        after = ReadPosition(i, record.record, record.offset, file_begin + record.bytes_read)
        for j, (piece, context) in enumerate(cuts if not problem else ()):
            yield TextPiece(piece, context, j == len(cuts) - 1, True, after, self.counts[i])

    def _large_document(
        self, i: int, records: Iterator[TextRecord], file_begin: int
    ) -> Iterator[TextPiece]:
        part, digest = self._part, new_document_hash()
        portion = slice(0, None)
        if part is not None and part.one_document:
            portion = part.portion(self._count_characters(self._files[i]))
        last, problem, nbytes, position = TextRecord("", "", 0, 0, 0), "", 0, 0

        def blocks() -> Iterator[str]:
            nonlocal last, problem, nbytes, position
            for last in records:
                if problem := problem or last.problem or _unicode_problem(last.text, position):
                    if self._on_error == "raise":
                        break
                    continue
                start, position = position, position + len(last.text)
                stop = position if portion.stop is None else portion.stop
                text = last.text[max(0, portion.start - start) : max(0, stop - start)]
                data = text.encode()
                digest.update(data)
                nbytes += len(data)
                yield text

        held: CutText | None = None
        yielded = False
        cuts = self._cut(blocks())
        while True:
            try:
                following = next(cuts, None)
            except NoCutError as e:
                problem, following = str(e), None
            if following is None or problem:
                break
            if held is not None and held.text:
                yielded = True
                after = ReadPosition(i, bytes_read=file_begin + last.bytes_read)
                yield TextPiece(*held, False, True, after, self.counts[i])
            held = following
        if problem and self._on_error == "skip":
            last = deque(records, maxlen=1)[-1] if not last.ends else last  # skip the rest of it
        kept = not problem and (part is None or part.one_document or part.has_document(digest))
        self._count(i, last, problem, nbytes if kept else 0, position > 0)
        kept = kept and nbytes > 0
        if kept or yielded:
            after = ReadPosition(i, last.record, last.offset, file_begin + last.bytes_read)
            text = held.text if held is not None and kept else ""
            yield TextPiece(text, "", True, kept, after, self.counts[i])

    def _count(
        self, i: int, record: TextRecord, problem: str, text_bytes: int, has_text: bool
    ) -> None:
        """Counts a record, with the bytes of its text that are in this part; raises if unusable."""
        counts = self.counts[i]
        if problem:
            self._refuse(self._files[i], record.record, problem)
            counts = counts._replace(skipped=counts.skipped + 1)
        elif text_bytes:
            counts = counts._replace(
                documents=counts.documents + 1, text_bytes=counts.text_bytes + text_bytes
            )
        elif has_text:
            counts = counts._replace(elsewhere=counts.elsewhere + 1)
        else:
            counts = counts._replace(empty=counts.empty + 1)
        self.counts[i] = counts

    def _count_characters(self, file: TextFile) -> int:
        """Returns the length of a text; it is read once more for this."""
        return sum(len(record.text) for record in read_records(file, self._field, 0, 0))

    @property
    def total(self) -> DocumentCounts:
        """The sum of the counts of all files."""
        return DocumentCounts(*(sum(column) for column in zip(*self.counts, strict=True)))

    def sources(self) -> tuple[TextSource, ...]:
        """Returns the files and their counts, for the metadata of token shards."""
        pairs = zip(self._files, self.counts, strict=True)
        return tuple(
            TextSource(f.name, f.size, c.documents, c.text_bytes, c.skipped) for f, c in pairs
        )

    def _refuse(self, file: TextFile, record: int, problem: str) -> None:
        """Raises for an unusable record, or logs that it is skipped."""
        unit = "row " if file.kind == ".parquet" else ""
        location = file.name if file.kind == ".txt" else f"{file.name}:{unit}{record}"
        if self._on_error == "raise":
            raise ValueError(
                f"{location}: {problem}; correct it, or pass on_error='skip' to "
                "leave such records out"
            )
        self._refused += 1
        if self._refused <= _MAX_LOGGED:
            logger.warning("skipped %s: %s", location, problem)
        elif self._refused == _MAX_LOGGED + 1:
            logger.warning("further unusable records are skipped without a message")


def _until_end(records: Iterator[TextRecord]) -> Iterator[TextRecord]:
    """Yields the pieces of a record up to its last one."""
    for record in records:
        yield record
        if record.ends:
            return


def _blocks(text: str) -> Iterable[str]:
    """Returns a text in blocks, so that cutting it does not copy all of it each time."""
    if len(text) <= _BLOCK_CHARACTERS:
        return (text,)
    return (text[i : i + _BLOCK_CHARACTERS] for i in range(0, len(text), _BLOCK_CHARACTERS))


def _unicode_problem(text: str, before: int = 0) -> str:
    """Returns why the text, after some characters, is not valid Unicode, "" if it is."""
    try:
        text.encode()
    except UnicodeEncodeError as e:  # JSON can spell half a surrogate pair
        return f"the text is not valid Unicode ({e.reason} at character {before + e.start})"
    return ""
