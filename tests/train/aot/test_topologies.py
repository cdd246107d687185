"""Names of topologies, missing compilers, and the order of devices in slices."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

from btlm_jax.model import sharding
from btlm_jax.train.aot import topologies


@pytest.mark.parametrize(
    "name, chip, shape",
    [
        ("v5e:4x4", "v5e", (4, 4)),
        ("V5E:4x4 ", "v5e", (4, 4)),
        ("v5e-16", "v5e", (4, 4)),
        ("v5litepod-256", "v5e", (16, 16)),
        ("v5p-8", "v5p", (2, 2, 1)),  # counted in cores
        ("v5p-128", "v5p", (4, 4, 4)),
        ("v4-32", "v4", (2, 2, 4)),
        ("v6e-16", "v6e", (4, 4)),
        ("tpu7x:2x2x1", "tpu7x", (2, 2, 1)),
        ("v5p:16x16x16", "v5p", (16, 16, 16)),  # larger than the list
        ("h200:8", "h200", (8,)),
    ],
)
def test_names_are_parsed(name, chip, shape):
    topology = topologies.parse_topology(name, 1)
    assert (topology.chip.name, topology.shape) == (chip, shape)
    assert topologies.parse_topology(topology.name) == topology


def test_every_listed_shape_is_parsed():
    for chip, shapes in topologies.SHAPES.items():
        for shape in shapes:
            assert topologies.parse_topology(f"{chip}:{shape}").chip.name == chip
    assert topologies.parse_topology("v5p:2x2x2", 4).name == "4 x v5p:2x2x2"


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5x:4x4", r"--topology v5x:4x4: unknown chip 'v5x'; did you mean v5\w:.*Valid: v4:2x2x1"),
        ("v7x:2x2x1", r"unknown chip 'v7x'; did you mean"),
        ("v5e:4x4x4", r"no such shape; did you mean v5e:4x4\?"),
        ("v5p:4x4", r"no such shape; did you mean v5p:4x4x\d\?"),
        ("v5e:0x4", r"no such shape"),
        ("v5e", r"no such shape; did you mean v5e:"),
        ("v5e-17", r"--topology v5e-17: unknown name; did you mean v5e-1"),
        ("v5p-16x", r"unknown chip"),
        ("tpu7x-8", r"write the shape in chips, such as tpu7x:2x2x1"),
        ("h200:3", r"no such shape; did you mean h200:"),
    ],
)
def test_an_error_suggests_the_nearest_name(name, message):
    with pytest.raises(ValueError, match=message):
        topologies.parse_topology(name)


def test_slices_are_positive_and_only_for_tpus():
    with pytest.raises(ValueError, match="--slices: found 0"):
        topologies.parse_topology("v5e:4x4", 0)
    with pytest.raises(ValueError, match="--slices: found 2, expected 1, because h200 is"):
        topologies.parse_topology("h200:8", 2)


def test_missing_compilers_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs libtpu, .* pip install 'btlm-jax\[tpu\]'"):
        topologies.topology_devices(topologies.parse_topology("v5e:4x4"))
    with pytest.raises(ValueError, match=r"CUDA plugin, .* pip install 'jax\[cuda13\]'"):
        topologies.topology_devices(topologies.parse_topology("h200:8"))


def test_the_h200_target_agrees_with_the_table_of_chips():
    text = topologies._TARGET.read_text()
    fields = dict(
        line.strip().split(": ", 1)
        for line in text.splitlines()
        if ": " in line and "{" not in line
    )
    chip = topologies.CHIPS["h200"]
    assert float(fields["memory_bandwidth"]) == chip.bandwidth
    assert 0.95 < int(fields["device_memory_size"]) / (141 * 2**30) <= 1.0
    assert fields["platform_name"] == '"CUDA"' and "NVIDIA H200" in chip.kinds


def slices_of_v5e(slices: int) -> list:
    """Returns stand-ins for the devices of 2x2 slices of v5e."""
    return [
        SimpleNamespace(
            id=100_000 * (s + 1) + 2 * y + x, slice_index=s, process_index=s, platform="tpu",
            device_kind="TPU v5 lite", coords=[x, y, 0], core_on_chip=0,
        )
        for s in range(slices) for y in range(2) for x in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (1, 8, 1, 1), (1, 2, 1, 4), (4, 1, 2, 1)])
def test_slices_fill_the_first_axes(shape):
    devices = sharding._on_torus(shape, slices_of_v5e(2)[::-1])
    assert devices.shape == shape
    halves = devices.reshape(2, 4)
    assert [{d.slice_index for d in half} for half in halves] == [{0}, {1}]


def test_context_and_tensor_stay_within_a_slice():
    devices = sharding._on_torus((2, 4, 1, 2), slices_of_v5e(4))
    index = np.vectorize(lambda d: d.slice_index)(devices)
    assert (index == index[:, :, :1, :1]).all()
    assert len({*index.flat}) == 4


def test_slices_must_divide_over_data_and_fsdp():
    with pytest.raises(
        ValueError, match=r"2 slices do not divide over these two axes.*multiple of"
    ):
        sharding._on_torus((1, 1, 1, 8), slices_of_v5e(2))


@pytest.mark.parametrize("shape, warns", [((1, 4, 1, 4), False), ((1, 8, 1, 2), True)])
def test_axes_that_share_links_give_a_warning(shape, warns, caplog):
    """On 4 x 4 chips, an axis of 8 needs one dimension and half of the other."""
    chips = [
        SimpleNamespace(
            id=4 * y + x, slice_index=0, process_index=0, platform="tpu",
            device_kind="TPU v6 lite", coords=[x, y, 0], core_on_chip=0,
        )
        for y in range(4) for x in range(4)
    ]  # fmt: skip
    assert sharding._on_torus(shape, chips).shape == shape
    assert ("share links" in caplog.text) == warns
