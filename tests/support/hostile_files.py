"""Hostile and damaged checkpoints: mutated files, and everything that reading them may do.

Reading ends within seconds in ValueError or FileNotFoundError that names the file, or in the
tensors that the file describes: never in another exception, a hang or a wrong tensor.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from btlm_jax.convert.hf.source import open_hf
from support import golden
from support.torch_pickles import write_zip

BTLM_BIN, TORCH_BIN = golden.GOLDEN / "btlm_bin", golden.GOLDEN / "torch_bin"
# Parts of one storage, which therefore have no checksum.
SHARED = {"shared.head", "shared.tail", "shared.strided"}
MODEL = "model.safetensors"
BIN = "pytorch_model.bin"
Expected = Mapping[str, np.ndarray]
# Examples take milliseconds here, so that there may be more of them than elsewhere.
MANY_EXAMPLES = settings(max_examples=max(200, settings.default.max_examples))


@contextlib.contextmanager
def checkpoint_directory(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A directory with these files, and an empty config.json unless they include one."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "hf"
        path.mkdir()
        for file, data in ({"config.json": b"{}"} | dict(files)).items():
            (path / file).write_bytes(data)
        yield path


@contextlib.contextmanager
def time_limit(seconds: float = 5.0) -> Iterator[None]:
    """Fails a block that needs more CPU time, or that hangs for a minute."""

    def stop(*_):
        raise TimeoutError("the example hangs")

    before, began = signal.signal(signal.SIGALRM, stop), time.process_time()
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - began < seconds


def read_everything(files: Mapping[str, bytes]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Opens a directory of these files and reads every tensor in every way.

    Returns:
      The tensors, and the error messages: by tensor, or under "" if the directory does not open.
    """
    arrays: dict[str, np.ndarray] = {}
    errors: dict[str, str] = {}
    with checkpoint_directory(files) as path, time_limit():
        try:
            source = open_hf(path)
        except (ValueError, FileNotFoundError) as error:
            assert str(path) in str(error)
            return {}, {"": str(error)}
        for name, info in source.tensors.items():
            try:
                array = source.read_tensor(name)
                blocks = list(source.blocks(name, max(info.size // 3, 1)))
            except ValueError as error:
                assert str(info.file) in str(error)
                errors[name] = str(error)
                continue
            assert (array.shape, array.dtype) == (info.shape, info.dtype)
            assert b"".join(b.tobytes() for b in blocks) == array.tobytes()
            part = tuple(slice(n // 2) for n in info.shape)
            # `...` keeps a scalar an array; a NumPy bool would lose a byte other than 0 and 1.
            assert source.read_tensor(name, part).tobytes() == array[(*part, ...)].tobytes()
            arrays[name] = array
    return arrays, errors


def refusal(files: Mapping[str, bytes]) -> str:
    """Returns the message with which opening these files is refused."""
    arrays, errors = read_everything(files)
    assert not arrays and list(errors) == [""]
    return errors[""]


def assert_equal_tensors(arrays: Expected, expected: Expected) -> None:
    """Asserts that arrays equal the expected ones of the same names."""
    for name, array in arrays.items():
        assert (array.shape, array.dtype) == (expected[name].shape, expected[name].dtype), name
        assert array.tobytes() == expected[name].tobytes(), name


def uniform_integers(low: int, high: int) -> st.SearchStrategy[int]:
    """Uniformly distributed numbers from `low` to `high`; Hypothesis prefers the ends."""
    span = high - low + 1
    return st.integers(0, 2**32 - 1).map(lambda n: low + n * 2_654_435_761 % 2**32 % span)


@st.composite
def mutated_bytes(draw, raw: bytes, hot: tuple[int, int] | None = None) -> bytes:
    """Bytes with 1 to 3 changes (flips, numbers, cuts, insertions, copies), half in `hot`."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        low, high = hot if hot and draw(st.booleans()) else (0, len(data))
        last = max(min(high, len(data)) - 1, 0)
        at = draw(uniform_integers(min(low, last), last))
        kind = draw(st.sampled_from(["flip", "byte", "number", "cut", "delete", "insert", "copy"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "number":
            width = draw(st.sampled_from([2, 4, 8]))
            value = draw(st.sampled_from([0, 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1]))
            data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == "cut":
            del data[at:]
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        else:
            source = draw(uniform_integers(0, max(len(data) - 1, 0)))
            data[at:at] = data[source : source + draw(st.integers(1, 200))]
    return bytes(data)


def load_bfloat16(file: Path, names: set[str] | None = None) -> dict[str, np.ndarray]:
    """Loads an .npz, with all arrays (or those named) viewed as bfloat16."""
    with np.load(file) as z:
        arrays = {name: z[name] for name in z.files}
    return {
        n: x.view(ml_dtypes.bfloat16) if n in (names or arrays) else x for n, x in arrays.items()
    }


MASKS = {
    "transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8),
    "transformer.h.0.attn.masked_bias": np.array(-1e4, np.float32),
}
STATE = load_bfloat16(TORCH_BIN / "state_dict.npz", {"bf16.weight"})
BTLM = load_bfloat16(BTLM_BIN / "weights.npz") | MASKS
BTLM["lm_head.weight"] = BTLM["transformer.wte.weight"]


def read_files(path: Path) -> dict[str, bytes]:
    """Returns the files of a directory."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


# Directories of .bin files written by torch, and their tensors.
BINS: dict[str, tuple[dict[str, bytes], Expected]] = {
    "state_dict": ({BIN: (TORCH_BIN / "state_dict.bin").read_bytes()}, STATE),
    "state_dict sharded": (read_files(TORCH_BIN / "sharded"), STATE),
    "btlm": (read_files(BTLM_BIN / "single"), BTLM),
    "btlm sharded": (read_files(BTLM_BIN / "sharded"), BTLM),
}


def zip_bytes(pkl: bytes, members: Mapping[str, bytes] | None = None, **kwargs: Any) -> bytes:
    """Returns the bytes of `torch_pickles.write_zip`."""
    with tempfile.TemporaryDirectory() as name:
        return write_zip(Path(name) / "x", pkl, members and dict(members), **kwargs).read_bytes()
