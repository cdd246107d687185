"""Documents of several text files, one after the other.

A reader can start after any document: every document says where the next one begins.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from btlm_jax.data.split import SplitPart
from btlm_jax.data.text_files import OnError, TextFile
from btlm_jax.data.text_records import read_records
from btlm_jax.data.token_shards_metadata import TextSource

logger = logging.getLogger(__name__)

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


class TextDocument(NamedTuple):
    """A text, where the next one begins, and the counts of its file, itself included."""

    text: str
    next: ReadPosition
    counts: DocumentCounts


class TextReader:
    """Reads the documents of several files, one after the other.

    Args:
      files: as returned by `expand_inputs`.
      field: field of JSON objects, or column, that holds the text.
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
        *,
        on_error: OnError = "raise",
        begin: ReadPosition = _BEGINNING,
        counts: Sequence[DocumentCounts] = (),
        part: SplitPart | None = None,
    ) -> None:
        self.counts, self._part = list(counts), part
        self._refused = 0
        self._files, self._field, self._on_error, self._begin = files, field, on_error, begin

    def documents(self) -> Iterator[TextDocument]:
        """Yields the documents that have text.

        Raises:
          ValueError: an unusable record (unless skipped), a damaged file, or one without documents.
        """
        next_bytes = 0  # bytes of all files up to and including the current one
        for i, file in enumerate(self._files):
            file_begin, next_bytes = next_bytes, next_bytes + file.size
            if i < self._begin.file:
                continue
            begin = self._begin if i == self._begin.file else ReadPosition(i)
            if i == len(self.counts):
                self.counts.append(DocumentCounts())
            for record in read_records(file, self._field, begin.record, begin.offset):
                counts = self.counts[i]
                if problem := record.problem or _unicode_problem(record.text):
                    self._refuse(file, record.record, problem)
                    self.counts[i] = counts._replace(skipped=counts.skipped + 1)
                    continue
                text = record.text if self._part is None else self._part.select(record.text)
                if text:
                    counts = counts._replace(
                        documents=counts.documents + 1,
                        text_bytes=counts.text_bytes + len(text.encode()),
                    )
                elif record.text:
                    counts = counts._replace(elsewhere=counts.elsewhere + 1)
                else:
                    counts = counts._replace(empty=counts.empty + 1)
                self.counts[i] = counts
                if text:
                    bytes_read = file_begin + record.bytes_read
                    after = ReadPosition(i, record.record, record.offset, bytes_read)
                    yield TextDocument(text, after, counts)
            if not self.counts[i].documents + self.counts[i].elsewhere:
                problem = f"{file.name}: no documents with text"
                if self._on_error == "raise":
                    raise ValueError(f"{problem}; remove it, or pass on_error='skip'")
                logger.warning("%s", problem)

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
                f"{location}: {problem}; correct it, or pass on_error='skip' to leave such records "
                "out"
            )
        self._refused += 1
        if self._refused <= _MAX_LOGGED:
            logger.warning("skipped %s: %s", location, problem)
        elif self._refused == _MAX_LOGGED + 1:
            logger.warning("further unusable records are skipped without a message")


def _unicode_problem(text: str) -> str:
    """Returns why the text cannot be encoded as UTF-8, "" if it can."""
    try:
        text.encode()
    except UnicodeEncodeError as e:  # JSON can spell half a surrogate pair
        return f"the text is not valid Unicode ({e.reason} at character {e.start})"
    return ""
