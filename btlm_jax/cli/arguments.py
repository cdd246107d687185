"""Types of arguments."""

from __future__ import annotations

from typing import Annotated

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
