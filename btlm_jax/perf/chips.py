"""The table of accelerators: peak rates and memory, for MFU, rooflines and memory estimates.

Figures are for a whole chip, from its vendor's data sheet, except `usable`. JAX shows a TPU v4
or v5p chip (two cores as a "megacore"), v5e, v6e and every GPU as one device, a TPU7x chip as two;
`Chip.per_device` divides.

Sources: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} (FLOP/s, HBM, and the interconnect's
aggregate; `link` x links is a tenth less, the rate that jax-ml.github.io/scaling-book/tpus
gives for v4 to v6e); nvidia.com's data sheets of A100, H100 SXM and H200. `dcn` is an assumption:
the host's network card shared by its chips (scaling-book again; 400 Gb/s per GPU). `usable` was
read from libtpu 0.0.42's refusals of programs that do not fit.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

GiB = 1 << 30


class Rates(NamedTuple):
    """Rates and memory of one device, as JAX counts devices."""

    flops: float  # dense bf16, FLOP/s
    hbm: float  # B/s
    ici: float  # B/s received from the devices of its slice
    dcn: float  # B/s received from other slices
    memory: int  # bytes that a program can use


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator chip.

    Attributes:
      name: the name in topology names.
      kinds: the `device_kind`s that JAX reports.
      flops: dense bf16 FLOP/s of the chip.
      memory: bytes of HBM of the chip.
      bandwidth: B/s of the chip's HBM.
      link: B/s in one direction over one link to a neighbor (NVLink: to all of them together).
      dimensions: dimensions of the torus or mesh of links; 0 for a switch.
      wraps: a dimension is a ring only if its size is a multiple of this (in a 3D torus, if all
        sizes are).
      dcn: B/s per chip to other slices; an assumption.
      usable: bytes of HBM per device that XLA gives to a program; None if unknown.
      devices: number of JAX devices per chip.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: int
    bandwidth: float
    link: float
    dimensions: int = 0
    wraps: int = 1
    dcn: float = 0.0
    usable: int | None = None
    devices: int = 1

    def links(self, shape: tuple[int, ...]) -> int:
        """Returns the number of links over which every chip of a slice can receive.

        Two for each dimension that is a ring, and one (as at the ends) for each that is a line.
        """
        if not self.dimensions:
            return int(any(n > 1 for n in shape))
        closed = [n % self.wraps == 0 for n in shape]
        if self.dimensions == 3:
            closed = [all(closed)] * len(shape)
        return sum(0 if n == 1 else 2 if c else 1 for n, c in zip(shape, closed, strict=True))

    def per_device(self, shape: tuple[int, ...] = ()) -> Rates:
        """Returns the rates of one device in a slice of this shape (in chips).

        The devices of a chip share its rates; the link between the two devices of a TPU7x chip is
        left out.
        """
        n = self.devices
        memory = self.usable or self.memory // n
        ici = self.links(shape) * self.link / n
        return Rates(self.flops / n, self.bandwidth / n, ici, self.dcn / n, memory)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), 275e12, 32 * GiB, 1228e9, 45e9, 3, 4, 6.25e9, int(30.75 * GiB)),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GiB, 819e9, 45e9, 2, 16, 3.125e9,
             int(15.75 * GiB)),
        Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * GiB, 2765e9, 90e9, 3, 4, 6.25e9,
             int(95.74 * GiB)),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GiB, 1640e9, 90e9, 2, 16, 12.5e9,
             int(31.25 * GiB)),
        # 1.2 TB/s "bidirectional" over six links is 100 GB/s in a direction; nine tenths of it.
        Chip("tpu7x", ("TPU7x",), 2307e12, 192 * GiB, 7380e9, 90e9, 3, 4, 12.5e9,
             int(94.75 * GiB), devices=2),
        Chip("h200", ("NVIDIA H200",), 989e12, 141 * 10**9, 4800e9, 450e9, dcn=50e9),
        Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 80 * 10**9, 3350e9, 450e9, dcn=50e9),
        Chip("a100", ("NVIDIA A100-SXM4-80GB",), 312e12, 80 * 10**9, 2039e9, 300e9, dcn=25e9),
        Chip("a100-40gb", ("NVIDIA A100-SXM4-40GB",), 312e12, 40 * 10**9, 1555e9, 300e9, dcn=25e9),
    )
}  # fmt: skip


def chip_of_device_kind(kind: str) -> Chip | None:
    """Returns the chip with a JAX `device_kind`; None if it is not in the table."""
    return next((c for c in CHIPS.values() if kind in c.kinds), None)


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bf16 FLOP/s of a device by its `device_kind`; None if unknown."""
    chip = chip_of_device_kind(device_kind)
    return None if chip is None else chip.per_device().flops
