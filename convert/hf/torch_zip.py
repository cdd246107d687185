"""Members of a `torch.save` zip archive, located and read with every bound checked.

torch stores members uncompressed, so each is a plain span of bytes of the file. Nothing is
decompressed, and no read can return more than the file holds.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np

from btlm_jax.convert.hf.advice import REDOWNLOAD, RESAVE
from btlm_jax.convert.hf.foreign_files import describe_foreign_weights

# About 300 bytes describe one tensor: this allows 50,000 tensors, and a scan of a few seconds.
_MAX_PICKLE_BYTES = 16 << 20


class Member(NamedTuple):
    """Position, size and checksum of the bytes of one zip member in the file."""

    offset: int
    size: int
    crc: int


@contextmanager
def prefix_errors_with(path: Path) -> Iterator[None]:
    """Prefixes the message of any ValueError raised inside with the file's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def list_zip_members(file: BufferedReader) -> tuple[str, dict[str, zipfile.ZipInfo]]:
    """Returns the archive's prefix and its members by name.

    Raises:
      ValueError: not a zip archive as torch writes it, damaged, or with a hostile member name.
    """
    head = file.read(512)
    if not head.startswith(b"PK\x03\x04"):
        raise ValueError(_explain_not_zip(Path(file.name), head))
    try:
        with zipfile.ZipFile(file) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, OverflowError) as error:
        raise ValueError(f"truncated or corrupt zip archive ({error}). {REDOWNLOAD}") from None
    except (ValueError, IndexError, struct.error) as error:
        raise ValueError(f"corrupt zip directory ({error}). {REDOWNLOAD}") from None
    infos: dict[str, zipfile.ZipInfo] = {}
    for info in listed:
        name = info.orig_filename
        # Names only serve as keys here, but torch never writes such names.
        if ".." in name.split("/") or re.search(r"^/|^[A-Za-z]:/|[\\\0]", name):
            raise ValueError(f"zip member {name[:80]!r} points outside the archive. {REDOWNLOAD}")
        if name in infos:
            raise ValueError(f"zip member {name[:80]!r} occurs twice. {REDOWNLOAD}")
        infos[name] = info
    prefixes = [n[: -len("/data.pkl")] for n in infos if re.fullmatch(r"[^/]+/data\.pkl", n)]
    if len(prefixes) != 1:
        raise ValueError(
            f"found {len(prefixes)} members named <prefix>/data.pkl, expected 1: "
            f"not a torch.save archive. {RESAVE}"
        )
    return prefixes[0], infos


def _explain_not_zip(path: Path, head: bytes) -> str:
    if wrong := describe_foreign_weights(path):
        return wrong
    if head.startswith(b"\x80") or head[257:262] == b"ustar":
        return f"torch's format from before 1.6 (not a zip archive) is not supported. {RESAVE}"
    return f"not a torch.save zip archive (starts with {head[:8]!r}). {REDOWNLOAD}"


def read_pickle_member(
    file: BufferedReader, prefix: str, infos: Mapping[str, zipfile.ZipInfo]
) -> bytes:
    """Reads `<prefix>/data.pkl` of an archive in little-endian byte order.

    Raises:
      ValueError: the member is damaged or too large, or the archive is big-endian.
    """
    if f"{prefix}/byteorder" in infos:
        member = find_member(file, infos, f"{prefix}/byteorder")
        order = read_span(file, member, 0, min(member.size, 16)).tobytes()
        if order != b"little":
            raise ValueError(f"byte order {order!r}, expected b'little'. {RESAVE}")
    member = find_member(file, infos, f"{prefix}/data.pkl")
    if member.size > _MAX_PICKLE_BYTES:
        raise ValueError(f"data.pkl has {member.size} bytes, at most {_MAX_PICKLE_BYTES} are read")
    return read_span(file, member, 0, member.size).tobytes()


def find_member(file: BufferedReader, infos: Mapping[str, zipfile.ZipInfo], name: str) -> Member:
    """Locates the bytes of a stored member and checks that they lie inside the file.

    Raises:
      ValueError: the member is missing, compressed, encrypted or outside the file.
    """
    info = infos.get(name)
    if info is None:
        raise ValueError(f"zip member {name[:80]!r} is missing. {REDOWNLOAD}")
    # torch never compresses. Refusing compressed members prevents zip bombs.
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise ValueError(f"zip member {name[:80]!r} is compressed, expected stored. {RESAVE}")
    if info.flag_bits & 1:
        raise ValueError(f"zip member {name[:80]!r} is encrypted. {RESAVE}")
    end = file.seek(0, 2)
    if 0 <= info.header_offset <= end - 30:
        file.seek(info.header_offset)
        header = file.read(30)
        offset = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if header.startswith(b"PK\x03\x04") and offset + info.file_size <= end:
            return Member(offset, info.file_size, info.CRC)
    raise ValueError(f"zip member {name[:80]!r} does not lie inside the file. {REDOWNLOAD}")


def read_span(file: BufferedReader, member: Member, start: int, size: int) -> np.ndarray:
    """Reads `size` bytes from `start` of a member into a new uint8 array.

    Raises:
      ValueError: the file ends early, or the whole member was read and its checksum differs.
    """
    raw = bytearray(size)
    file.seek(member.offset + start)
    if file.readinto(raw) != size:
        raise ValueError(f"the file ends inside a member. {REDOWNLOAD}")
    # torch writes 0 if checksums are off (set_crc32_options).
    if size == member.size and member.crc and zlib.crc32(raw) != member.crc:
        raise ValueError(f"checksum mismatch: the bytes are damaged. {REDOWNLOAD}")
    return np.frombuffer(raw, np.uint8)
