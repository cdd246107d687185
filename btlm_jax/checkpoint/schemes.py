"""Quantization schemes by name: how the weights of one projection are stored as integers.

This module imports neither NumPy nor JAX, so that the command line can list the names in `--help`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

# int4 is packed in blocks of this many inputs (`packed.unpack`), so inputs are padded to it.
INT4_BLOCK = 128
DEFAULT_GROUP = 64


class ArrayPart(NamedTuple):
    """One of the arrays in which a quantized weight is stored.

    Attributes:
      name: the last component of its path in a checkpoint.
      size: of its last axis; the others are the outputs of the weight.
      dtype: on disk.
    """

    name: str
    size: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A way to store a weight: integers, inputs last, and symmetric scales.

    A weight is its value times its scale.

    Attributes:
      name: as on the command line.
      layout: "int8" or "int4", the name of the array of values. It selects the function that
        quantizes (`quantize_arrays.QUANTIZERS`).
      group: number of consecutive inputs that share a scale; None if all inputs of an output do.
    """

    name: str
    layout: Literal["int8", "int4"]
    group: int | None = None

    @property
    def bits(self) -> int:
        """The bits of a value."""
        return int(self.layout.removeprefix("int"))

    def parts(self, inputs: int) -> tuple[ArrayPart, ArrayPart]:
        """Returns the array of values and the array of scales of a weight with so many inputs."""
        if self.group is None:
            return ArrayPart("int8", inputs, "int8"), ArrayPart("scales", 1, "float32")
        padded = padded_inputs(inputs)
        return (
            ArrayPart("int4", padded // 2, "uint8"),  # two values share a byte
            ArrayPart("scales", padded // self.group, "bfloat16"),
        )


def padded_inputs(inputs: int) -> int:
    """Returns the number of inputs of an int4 weight, padded to whole blocks of 128."""
    return -(-inputs // INT4_BLOCK) * INT4_BLOCK


INT8 = Scheme("int8", "int8")
INT4 = {group: Scheme(f"int4:{group}", "int4", group) for group in (32, 64, 128)}
# By the fields that a checkpoint's metadata holds: bits and group.
KERNEL_SCHEMES = {(scheme.bits, scheme.group): scheme for scheme in (INT8, *INT4.values())}
# By the names that the command line and `Quantization.parse` accept.
SCHEMES = {
    "int8": INT8,
    "int4": INT4[DEFAULT_GROUP],
    **{scheme.name: scheme for scheme in KERNEL_SCHEMES.values()},
}
SCHEME_HELP = ", ".join(
    f"{name} (in groups of {DEFAULT_GROUP})" if name == "int4" else name for name in SCHEMES
)
