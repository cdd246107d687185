"""An assembler of the pickles and zip archives that torch.save writes, with arbitrary values."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np


def text(value: str) -> bytes:
    """Pickles a string."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    """Pickles an integer of any size."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values: tuple[int, ...]) -> bytes:
    """Pickles a tuple of integers."""
    return b"(" + b"".join(map(number, values)) + b"t"


ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def storage(key: str = "0", cls: str = "FloatStorage", numel: int = 4) -> bytes:
    """Pickles the persistent id of a storage."""
    fields = text("storage") + f"ctorch\n{cls}\n".encode() + text(key) + text("cpu")
    return b"(" + fields + number(numel) + b"tQ"


def tensor(
    at: bytes | None = None,
    offset: int = 0,
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
    hooks: bytes = ORDERED_DICT,
) -> bytes:
    """Pickles a tensor, a view into the storage `at` (default: `storage()`)."""
    args = (storage() if at is None else at) + number(offset) + numbers(shape) + numbers(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + args + b"\x89" + hooks + b"tR"


def pickled(**entries: bytes) -> bytes:
    """Returns the pickle of a dict of pickled values."""
    return b"\x80\x02}(" + b"".join(text(k) + v for k, v in entries.items()) + b"u."


DATA = np.arange(4, dtype=np.float32).tobytes()


def write_zip(
    path: Path,
    pkl: bytes,
    members: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Writes a torch archive with this pickle; one storage of 4 floats unless given members."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("m/data.pkl", pkl)
        for name, data in ({"m/data/0": DATA} if members is None else members).items():
            file.writestr(name, data)
    return path
