"""The table of accelerators."""

from __future__ import annotations

import pytest

from btlm_jax.perf import chips
from btlm_jax.perf.chips import CHIPS, GiB


def test_figures_are_per_chip_and_rates_per_device():
    v5p, ironwood = CHIPS["v5p"].per_device((2, 2, 1)), CHIPS["tpu7x"].per_device((2, 2, 1))
    assert (v5p.flops, v5p.hbm, v5p.memory) == (459e12, 2765e9, int(95.74 * GiB))
    assert (ironwood.flops, ironwood.hbm) == (2307e12 / 2, 7380e9 / 2)  # two devices per chip
    assert ironwood.memory == int(94.75 * GiB)
    for chip in CHIPS.values():
        # XLA gives a program almost all of a device's share; a wrong unit would fail.
        assert 0.9 < chip.per_device().memory * chip.devices / chip.memory <= 1.01


@pytest.mark.parametrize(
    "name, shape, links",
    [
        ("v5e", (1, 1), 0),
        ("v5e", (2, 4), 2),  # lines: a corner has one neighbor along each
        ("v5e", (4, 4), 2),
        ("v5e", (8, 16), 3),  # rings close at 16
        ("v5e", (16, 16), 4),
        ("v5p", (2, 2, 1), 2),
        ("v5p", (2, 4, 4), 3),
        ("v5p", (4, 4, 4), 6),  # cubes of 4 close all rings
        ("h200", (8,), 1),
        ("h200", (1,), 0),
    ],
)
def test_links_of_the_chip_with_the_fewest(name, shape, links):
    chip = CHIPS[name]
    assert chip.links(shape) == links
    assert chip.per_device(shape).ici == links * chip.link


def test_chips_are_found_by_device_kind():
    assert chips.peak_flops("TPU v5 lite") == 197e12
    assert chips.peak_flops("TPU7x") == 2307e12 / 2
    assert chips.peak_flops("NVIDIA H200") == 989e12
    assert chips.peak_flops("cpu") is None and chips.chip_of_device_kind("cpu") is None
    kinds = [k for chip in CHIPS.values() for k in chip.kinds]
    assert len(set(kinds)) == len(kinds)
