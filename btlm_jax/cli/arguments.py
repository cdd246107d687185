"""Arguments that several subcommands take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from btlm_jax import byte_size

Bytes = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="BYTES",
        instance_from_str=lambda args: byte_size.parse(args[0]),
        is_instance=lambda x: isinstance(x, int),
        str_from_instance=lambda n: [byte_size.show(n).replace(" ", "")],
    ),
]


def write_json(file: Path | None, found: Any) -> None:
    """Writes what a command found to the file of its `--json`, if there is one."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=2) + "\n")
