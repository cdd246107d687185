"""Files compressed by zstd. The package's own reader takes a cut file for whole."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

_BYTES = 16 << 10  # compressed, at a time: all that comes out of it is held


class ZstdFile(io.RawIOBase):
    """The text of a file of any number of frames, to read from.

    Args:
      raw: the file.
      zstandard: the package, which is optional.

    Raises:
      EOFError: on reading, where the file is cut or damaged.
    """

    def __init__(self, raw: BinaryIO, zstandard: Any) -> None:
        self._raw, self._zstandard = raw, zstandard
        self._frame: Any = None
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills some of the buffer with what comes next; 0 bytes are the end.

        Raises:
          EOFError: the file is cut or damaged.
        """
        while not self._output:
            data = self._input or self._raw.read(_BYTES)
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            if self._frame is None:  # as large a window as `zstd --long=31` makes
                self._frame = self._zstandard.ZstdDecompressor(
                    max_window_size=1 << 31
                ).decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(data))
            except self._zstandard.ZstdError as e:
                raise EOFError(str(e)) from e
            self._input = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        n = min(len(buffer), len(self._output))
        buffer[:n], self._output = self._output[:n], self._output[n:]
        return n
