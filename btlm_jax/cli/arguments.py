"""Arguments that several subcommands take."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from btlm_jax.utils.format import format_bytes, parse_bytes

Bytes = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="BYTES",
        instance_from_str=lambda args: parse_bytes(args[0]),
        is_instance=lambda x: isinstance(x, int),
        str_from_instance=lambda n: [format_bytes(n).replace(" ", "")],
    ),
]

Lengths = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT,INT",
        instance_from_str=lambda args: tuple(int(n) for n in args[0].split(",")),
        is_instance=lambda x: isinstance(x, tuple),
        str_from_instance=lambda x: [",".join(map(str, x))],
    ),
]


def check_output(file: Path | None, suffix: str | None = None) -> None:
    """Finds out before the work whether its result can be written; makes nothing.

    Args:
      file: to be written or replaced, its folders to be made; None is none.
      suffix: that its name must end with, such as ".png".

    Raises:
      ValueError: another suffix.
      FileExistsError: it is a directory, or one of its folders is a file.
      PermissionError: it may not be written there.
    """
    if file is None:
        return
    if suffix is not None and file.suffix.lower() != suffix:
        raise ValueError(f"{file}: found the suffix {file.suffix!r}, expected {suffix!r}")
    if file.is_dir():
        raise FileExistsError(f"{file} is a directory: choose another name")
    nearest = next(p for p in (file, *file.absolute().parents) if p.exists())
    if nearest != file and not nearest.is_dir():
        raise FileExistsError(f"{file}: {nearest} is a file, expected a folder: choose another")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"{file}: {nearest} may not be written to: choose another place")


def write_json(file: Path | None, found: Any) -> None:
    """Writes what a command found to the file of its `--json`, if there is one.

    JSON has no numbers that are not finite: null stands for them.
    """
    if file is not None:
        from btlm_jax.utils.format import finite_json

        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(finite_json(found), indent=2, allow_nan=False) + "\n")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices to split the model and its rows over; all 1 takes a single one."""

    data: int = 1
    """Parts of the rows, each with the weights."""
    fsdp: int = 1
    """Parts of the rows, and of the weights."""
    tensor: int = 1
    """Parts of heads, MLP and vocabulary; -1 anywhere takes the devices that are left."""

    def made(self) -> Any:
        """The mesh, or None."""
        sizes = dataclasses.asdict(self)
        if all(n == 1 for n in sizes.values()):
            return None
        import jax

        from btlm_jax.model import sharding

        wanted = None if -1 in sizes.values() else max(1, math.prod(sizes.values()))
        return sharding.make_mesh(**sizes, devices=jax.devices()[:wanted])


@dataclasses.dataclass(frozen=True)
class LongMesh(Mesh):
    """Devices to split the model, its rows and its sequences over; all 1 takes a single one."""

    context: int = 1
    """Parts of every sequence, and of the weights."""
